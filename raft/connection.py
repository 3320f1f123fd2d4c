"""One socket of a link: TLS where there is any, then the handshake of raft/transport.py, then frames."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from raft.tls import WRONG_ID, Channel, TlsRefused, certified_node
from raft.wire import (
    FRAME_BYTES_MAX,
    HANDSHAKE_FRAME_BYTES_MAX,
    Challenge,
    FrameReader,
    Handshake,
    Hello,
    Malformed,
    Ping,
    Proof,
    decode,
    decode_handshake,
    encode,
)

if TYPE_CHECKING:
    from raft.transport import Transport

log = logging.getLogger(__name__)

NONCE_BYTES: Final = 32
VOTER: Final = "voter"
OBSERVER: Final = "observer"

Address = tuple[str, int]

# Why a stranger was refused, beside the reasons of raft/tls.py.
BAD_HELLO: Final = "bad_hello"
BAD_SECRET: Final = "bad_secret"
TOO_MANY: Final = "too_many"
TOO_SLOW: Final = "too_slow"
UNPROVEN: Final = "unproven"  # it left, or spoke no word of ours, before it had proved anything


class Stranger(Malformed):
    """The other end does not prove to be the peer; ``reason`` is what is counted."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class LinkTimings:
    connect_ms: int = 1000
    handshake_ms: int = 2000
    ping_ms: int = 1000
    idle_ms: int = 4000
    retry_ms_min: int = 30
    retry_ms_max: int = 1000
    window_bytes: int = 4 * 1024 * 1024
    """Unsent bytes to one peer above which the engine holds back."""
    strangers_max: int = 64
    """Connections in handshake at once; more are closed unread."""

    def __post_init__(self) -> None:
        if not self.ping_ms * 2 < self.idle_ms:
            raise ValueError(
                f"idle_ms={self.idle_ms} must be above 2 * ping_ms={self.ping_ms}: a lost ping is not a lost link"
            )


@dataclass
class PeerCounters:
    """Of one peer, over all its connections."""

    connects: int = 0
    disconnects: int = 0
    frames_in: int = 0
    frames_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    malformed: int = 0
    held: int = 0
    """Times the send window was found full."""


@dataclass
class Peer:
    name: str
    role: str
    address: Address | None  # None: it dials us
    counters: PeerCounters = field(default_factory=PeerCounters)
    connection: Connection | None = None

    @property
    def connected(self) -> bool:
        return self.connection is not None


class Connection(asyncio.Protocol):
    """One socket: first a handshake, then frames."""

    def __init__(self, owner: Transport, dialled: Peer | None) -> None:
        self.owner = owner
        self.dialled = dialled is not None
        self.peer = dialled
        self.stood = False
        self.full = False
        self.opened_at = self.heard_at = self.wrote_at = 0.0
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._time: Callable[[], float] = loop.time
        self._transport: asyncio.Transport | None = None
        self._frames = FrameReader(HANDSHAKE_FRAME_BYTES_MAX)
        self._hello: Hello | None = None
        self._answer: Challenge | None = None
        self._tls: Channel | None = None
        self._certified: str | None = None
        """The node id in the peer's certificate."""
        self.refused_for = ""
        self._from: object = None

    def describe(self) -> str:
        return f"{'dialled' if self.dialled else 'from'} {self.peer.name if self.peer else '?'} {self._from}"

    # --- asyncio's calls ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.opened_at = self.heard_at = self.wrote_at = self._time()
        if not self.owner.opened(self):
            self._transport.abort()
            return
        window = self.owner.timings.window_bytes
        self._transport.set_write_buffer_limits(high=window, low=window // 4)
        raw = self._transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._from = self._transport.get_extra_info("peername")
        context = self.owner.client_ssl if self.dialled else self.owner.server_ssl
        if context is None:
            self._begin()
            return
        self._tls = Channel(context, server_side=not self.dialled)
        if self.dialled:
            self._tls.start()
            self._transport.write(self._tls.outgoing())

    def _begin(self) -> None:
        """Bytes pass: the dialler speaks first."""
        if self.dialled and self.peer is not None:
            owner = self.owner
            self._hello = Hello(
                owner.cluster_id, owner.node_id, owner.role, self.peer.name, os.urandom(NONCE_BYTES)
            )
            self.write(encode(self._hello))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.owner.lost(self)
        if not self.ended.done():
            self.ended.set_result(None)

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        if self.stood and self.peer is not None and self.peer.connection is self:
            self.owner.receiver.writable(self.peer.name)

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        self.heard_at = self._time()
        try:
            for part in (data,) if self._tls is None else self._decrypt(self._tls, data):
                self._frames.feed(part)
            while self._transport is not None:
                body = self._frames.next()
                if body is None:
                    return
                if self.stood:
                    self._on_frame(body)
                else:
                    self._on_handshake(decode_handshake(body))
        except Malformed as error:
            # Such a peer is broken or an enemy: nothing after this byte can be trusted.
            if self.stood and self.peer is not None:
                self.peer.counters.malformed += 1
                log.warning("link to %s closed: %s", self.peer.name, error)
            self.close(error.reason if isinstance(error, Stranger) else "")

    def _decrypt(self, tls: Channel, data: bytes) -> list[bytes]:
        transport = cast(asyncio.Transport, self._transport)
        before = tls.established
        try:
            plain = tls.feed(data)
            if tls.established and not before:
                self._identify(tls)
        except TlsRefused as error:
            raise Stranger(error.reason, str(error)) from error
        finally:
            if out := tls.outgoing():
                transport.write(out)  # a handshake's next words, or the alert that says why there are none
        if tls.established and not before:
            self._begin()
        return plain

    def _identify(self, tls: Channel) -> None:
        """Hold the peer to its certificate: the dialler now, before a word is said; the acceptor at the Hello."""
        self._certified = certified_node(tls.certificate(), self.owner.cluster_id)
        if self.dialled and self.peer is not None and self._certified != self.peer.name:
            raise TlsRefused(WRONG_ID, f"dialled {self.peer.name}, answered by {self._certified}")

    # --- frames -------------------------------------------------------------------------------------------------

    def _on_frame(self, body: bytearray) -> None:
        peer = cast(Peer, self.peer)
        message = decode(body)
        if peer.connection is not self:
            return  # replaced meanwhile
        peer.counters.frames_in += 1
        peer.counters.bytes_in += len(body)
        if not isinstance(message, Ping):
            self.owner.receiver.message(peer.name, message)

    def write(self, frame: bytes) -> None:
        if self._transport is not None:
            self.wrote_at = self._time()
            try:
                self._transport.write(frame if self._tls is None else self._tls.seal(frame))
            except ssl.SSLError as error:
                # The session broke. Closed in a turn of its own: who writes may be in the middle of a step.
                log.warning("link to %s closed: %s", self.peer.name if self.peer else "?", error)
                asyncio.get_running_loop().call_soon(self.close)

    def close(self, reason: str = "") -> None:
        """At once: what is unsent or unread is dropped. ``reason``: why a stranger is refused."""
        self.refused_for = self.refused_for or reason
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
            # Not by asyncio's later call: the owner must not believe in this link for one more turn of the loop.
            self.owner.lost(self)

    # --- handshake ----------------------------------------------------------------------------------------------

    def _on_handshake(self, word: Handshake) -> None:
        match word:
            case Hello() if not self.dialled and self._hello is None:
                self._on_hello(word)
            case Challenge() if self.dialled and not self.stood:
                self._on_challenge(word)
            case Proof() if not self.dialled and self._answer is not None:
                self._on_proof(word)
            case _:
                raise Malformed(f"{type(word).__name__} out of turn")

    def _on_hello(self, hello: Hello) -> None:
        owner = self.owner
        peer = owner.peers.get(hello.node_id)
        if (
            hello.cluster_id != owner.cluster_id
            or hello.to != owner.node_id
            or len(hello.nonce) != NONCE_BYTES
        ):
            raise Stranger(BAD_HELLO, "hello for another")
        if peer is None or peer.role != hello.role or peer.address is not None:
            raise Stranger(BAD_HELLO, "hello of no peer that dials here")
        if self._tls is not None and self._certified != hello.node_id:
            raise Stranger(WRONG_ID, f"the certificate is {self._certified}'s, the hello {hello.node_id}'s")
        self._hello, self.peer = hello, peer
        nonce = os.urandom(NONCE_BYTES)
        proof = owner.proof(b"accept", hello, owner.node_id, owner.role, nonce)
        self._answer = Challenge(owner.node_id, owner.role, nonce, proof)
        self.write(encode(self._answer))

    def _on_challenge(self, answer: Challenge) -> None:
        owner, hello, peer = self.owner, cast(Hello, self._hello), cast(Peer, self.peer)
        if answer.node_id != peer.name or answer.role != peer.role or len(answer.nonce) != NONCE_BYTES:
            raise Stranger(BAD_HELLO, "answered by another than was dialled")
        expected = owner.proof(b"accept", hello, answer.node_id, answer.role, answer.nonce)
        if not hmac.compare_digest(expected, answer.proof):
            raise Stranger(BAD_SECRET, "the acceptor does not know the secret")
        self.write(encode(Proof(owner.proof(b"dial", hello, answer.node_id, answer.role, answer.nonce))))
        self._stand(peer)

    def _on_proof(self, word: Proof) -> None:
        owner, hello, answer = self.owner, cast(Hello, self._hello), cast(Challenge, self._answer)
        expected = owner.proof(b"dial", hello, answer.node_id, answer.role, answer.nonce)
        if not hmac.compare_digest(expected, word.proof):
            raise Stranger(BAD_SECRET, "the dialler does not know the secret")
        self._stand(cast(Peer, self.peer))

    def _stand(self, peer: Peer) -> None:
        self.stood = True
        self._frames.frame_bytes_max = FRAME_BYTES_MAX
        self.owner.adopt(self, peer)
