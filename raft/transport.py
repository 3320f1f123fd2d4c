"""Links between replicas: one TCP connection a pair, authenticated, bounded both ways.

Who dials: the lexicographically greater id of two voters; an observer always dials. Node ids are names; where a
peer is dialled is a map beside them, so that a proxy can stand on every link.

Handshake, before anything else is read as a message (frames of at most 1 KiB, within ``handshake_ms``):

  dialler  -> Hello(cluster, me, my role, you, nonce)
  acceptor -> Challenge(me, my role, nonce, HMAC(secret, "accept" | transcript))
  dialler  -> Proof(HMAC(secret, "dial" | transcript))

The transcript holds the format, the cluster, both ids, both roles and both nonces, each with its length, so
neither a replay nor a reflection proves anything. An acceptor says nothing to who names another cluster or an
unknown peer. Whoever fails is a stranger: closed and counted. This authenticates the connection; the frames
after it are protected from others on the path only when ``ssl`` contexts are given.

A new authenticated connection of a peer replaces its old one, whose unread bytes are dropped: messages arrive
in order and at most once. A link that is silent for ``idle_ms`` is closed; quiet ones carry a ping each
``ping_ms``.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import random
import socket
import ssl as ssl_module
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from raft.wire import (
    FORMAT,
    FRAME_BYTES_MAX,
    HANDSHAKE_FRAME_BYTES_MAX,
    Challenge,
    FrameReader,
    Handshake,
    Hello,
    Malformed,
    Message,
    Ping,
    Proof,
    decode,
    decode_handshake,
    encode,
)

log = logging.getLogger(__name__)

NONCE_BYTES: Final = 32
VOTER: Final = "voter"
OBSERVER: Final = "observer"

Address = tuple[str, int]


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


class Receiver(Protocol):
    """Who is told. Called on the loop."""

    def link_up(self, peer: str, observer: bool) -> None: ...
    def link_down(self, peer: str) -> None: ...
    def message(self, peer: str, message: Message) -> None: ...
    def writable(self, peer: str) -> None: ...


class Transport:
    """All links of one replica."""

    def __init__(
        self,
        *,
        node_id: str,
        role: str,
        cluster_id: str,
        secret: bytes,
        listen: Address,
        peers: Mapping[str, Address],
        observers: Iterable[str] = (),
        receiver: Receiver,
        timings: LinkTimings | None = None,
        server_ssl: ssl_module.SSLContext | None = None,
        client_ssl: ssl_module.SSLContext | None = None,
    ) -> None:
        self.node_id = node_id
        self.role = role
        self.cluster_id = cluster_id
        self.secret = secret
        self.listen = listen
        self.receiver = receiver
        self.timings = timings or LinkTimings()
        self.server_ssl = server_ssl
        self.client_ssl = client_ssl
        self.strangers = 0
        """Connections closed because they did not prove to be a peer."""
        self.peers: dict[str, Peer] = {}
        for name, address in peers.items():
            dials = role == OBSERVER or node_id > name
            self.peers[name] = Peer(name, VOTER, address if dials else None)
        for name in observers:
            self.peers[name] = Peer(name, OBSERVER, None)
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._open: set[Connection] = set()
        self._pinger: asyncio.TimerHandle | None = None
        self._shared: tuple[Message, bytes] | None = None
        self.closed = False

    # --- life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen and begin to dial. OSError if the address is taken."""
        loop = asyncio.get_running_loop()
        if self.role == VOTER:
            host, port = self.listen
            self._server = await loop.create_server(
                lambda: Connection(self, None), host, port, ssl=self.server_ssl, reuse_address=True
            )
        for peer in self.peers.values():
            if peer.address is not None:
                self._tasks.append(loop.create_task(self._keep_dialling(peer)))
        self._pinger = loop.call_later(self.timings.ping_ms / 1000, self._check_links)

    async def stop(self) -> None:
        self.closed = True
        if self._pinger:
            self._pinger.cancel()
        for task in self._tasks:
            task.cancel()
        if self._server:
            self._server.close()
        for connection in list(self._open):
            connection.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- sending ----------------------------------------------------------------------------------------------

    def send(self, name: str, message: Message) -> bool:
        peer = self.peers.get(name)
        if peer is None or peer.connection is None:
            return False
        # The same append goes to all peers that stand at the same place: encode it once.
        if self._shared is not None and self._shared[0] is message:
            frame = self._shared[1]
        else:
            frame = encode(message)
            self._shared = (message, frame)
        peer.connection.write(frame)
        peer.counters.frames_out += 1
        peer.counters.bytes_out += len(frame)
        return True

    def has_room(self, name: str) -> bool:
        peer = self.peers.get(name)
        if peer is None or peer.connection is None:
            return False
        if peer.connection.full:
            peer.counters.held += 1
            return False
        return True

    # --- dialling ---------------------------------------------------------------------------------------------

    async def _keep_dialling(self, peer: Peer) -> None:
        timings = self.timings
        retry_ms = timings.retry_ms_min
        while not self.closed:
            if peer.connection is None:
                connection = await self._dial(peer)
                if connection is not None:
                    await connection.ended
                    # A link that stood starts over with quick retries; one that never did backs off.
                    retry_ms = timings.retry_ms_min if connection.stood else retry_ms
            await asyncio.sleep(retry_ms * random.uniform(0.5, 1.0) / 1000)
            retry_ms = min(2 * retry_ms, timings.retry_ms_max)

    async def _dial(self, peer: Peer) -> Connection | None:
        loop = asyncio.get_running_loop()
        host, port = cast(Address, peer.address)
        try:
            # Defect 13: a dial whose first packet is dropped would wait for ever.
            async with asyncio.timeout(self.timings.connect_ms / 1000):
                _, protocol = await loop.create_connection(
                    lambda: Connection(self, peer), host, port, ssl=self.client_ssl
                )
        except (OSError, TimeoutError):
            return None  # nobody there: the caller tries again later
        return protocol

    # --- standing links ---------------------------------------------------------------------------------------

    def adopt(self, connection: Connection, peer: Peer) -> None:
        """The connection proved to be the peer's."""
        old, peer.connection = peer.connection, connection
        if old is not None:
            old.close()
            peer.counters.disconnects += 1
            self.receiver.link_down(peer.name)
        peer.counters.connects += 1
        self.receiver.link_up(peer.name, peer.role == OBSERVER)

    def lost(self, connection: Connection) -> None:
        if connection not in self._open:
            return  # known already, or never let in
        self._open.remove(connection)
        peer = connection.peer
        if not connection.stood:
            if not connection.dialled and not self.closed:
                self.strangers += 1
        elif peer is not None and peer.connection is connection:
            peer.connection = None
            peer.counters.disconnects += 1
            self.receiver.link_down(peer.name)

    def opened(self, connection: Connection) -> bool:
        waiting = sum(1 for other in self._open if not other.stood)
        if self.closed:
            return False
        if not connection.dialled and waiting >= self.timings.strangers_max:
            self.strangers += 1
            return False
        self._open.add(connection)
        return True

    def _check_links(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        ping = encode(Ping())
        for connection in list(self._open):
            limit_ms = self.timings.idle_ms if connection.stood else self.timings.handshake_ms
            since = connection.heard_at if connection.stood else connection.opened_at
            if now - since > limit_ms / 1000:
                connection.close()
            elif connection.stood and now - connection.wrote_at > self.timings.ping_ms / 2000:
                connection.write(ping)
        self._pinger = loop.call_later(self.timings.ping_ms / 1000, self._check_links)

    # --- the handshake's arithmetic ---------------------------------------------------------------------------

    def proof(
        self, side: bytes, hello: Hello, answer_id: str, answer_role: str, answer_nonce: bytes
    ) -> bytes:
        parts = (
            b"oncekeeper raft link",
            side,
            bytes([FORMAT]),
            hello.cluster_id.encode(),
            hello.node_id.encode(),
            hello.role.encode(),
            hello.nonce,
            answer_id.encode(),
            answer_role.encode(),
            answer_nonce,
        )
        text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.new(self.secret, text, hashlib.sha256).digest()


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
        self._frames.feed(data)
        try:
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
            self.close()

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
            self._transport.write(frame)

    def close(self) -> None:
        """At once: what is unsent or unread is dropped."""
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
            raise Malformed("hello for another")
        if peer is None or peer.role != hello.role or peer.address is not None:
            raise Malformed("hello of no peer that dials here")
        self._hello, self.peer = hello, peer
        nonce = os.urandom(NONCE_BYTES)
        proof = owner.proof(b"accept", hello, owner.node_id, owner.role, nonce)
        self._answer = Challenge(owner.node_id, owner.role, nonce, proof)
        self.write(encode(self._answer))

    def _on_challenge(self, answer: Challenge) -> None:
        owner, hello, peer = self.owner, cast(Hello, self._hello), cast(Peer, self.peer)
        if answer.node_id != peer.name or answer.role != peer.role or len(answer.nonce) != NONCE_BYTES:
            raise Malformed("answered by another than was dialled")
        expected = owner.proof(b"accept", hello, answer.node_id, answer.role, answer.nonce)
        if not hmac.compare_digest(expected, answer.proof):
            raise Malformed("the acceptor does not know the secret")
        self.write(encode(Proof(owner.proof(b"dial", hello, answer.node_id, answer.role, answer.nonce))))
        self._stand(peer)

    def _on_proof(self, word: Proof) -> None:
        owner, hello, answer = self.owner, cast(Hello, self._hello), cast(Challenge, self._answer)
        expected = owner.proof(b"dial", hello, answer.node_id, answer.role, answer.nonce)
        if not hmac.compare_digest(expected, word.proof):
            raise Malformed("the dialler does not know the secret")
        self._stand(cast(Peer, self.peer))

    def _stand(self, peer: Peer) -> None:
        self.stood = True
        self._frames.frame_bytes_max = FRAME_BYTES_MAX
        self.owner.adopt(self, peer)
