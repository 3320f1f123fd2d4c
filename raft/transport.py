"""Links between replicas: one TCP connection a pair, authenticated, bounded both ways.

Who dials: the lexicographically greater id of two voters; an observer always dials. Node ids are names; where a
peer is dialled is a map beside them, so that a proxy can stand on every link.

Handshake, before anything else is read as a message (frames of at most 1 KiB, within ``handshake_ms``):

  dialler  -> Hello(cluster, me, my role, you, nonce)
  acceptor -> Challenge(me, my role, nonce, HMAC(secret, "accept" | transcript))
  dialler  -> Proof(HMAC(secret, "dial" | transcript))

The transcript holds the format, the cluster, both ids, both roles and both nonces, each with its length, so
neither a replay nor a reflection proves anything. An acceptor says nothing to who names another cluster or an
unknown peer. Whoever fails is a stranger: closed, and counted by its reason.

With ``ssl`` contexts all of this runs inside mutual TLS (raft/tls.py), and each side holds the other to the node id
in its certificate: the dialler before its first word, the acceptor at the Hello. Without, the handshake above
authenticates the connection, but the frames after it are open to whoever stands on the path.

A new authenticated connection of a peer replaces its old one, whose unread bytes are dropped: messages arrive
in order and at most once. A link that is silent for ``idle_ms`` is closed; quiet ones carry a ping each
``ping_ms``.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import random
import ssl as ssl_module
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol, cast

from raft.connection import (
    OBSERVER,
    TOO_MANY,
    TOO_SLOW,
    UNPROVEN,
    VOTER,
    Address,
    Connection,
    LinkTimings,
    Peer,
    PeerCounters,
)
from raft.wire import FORMAT, Hello, Message, Ping, encode

__all__ = ["OBSERVER", "VOTER", "Address", "LinkTimings", "Peer", "PeerCounters", "Receiver", "Transport"]

log = logging.getLogger(__name__)


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
        self.refused: Counter[str] = Counter()
        """Why, of those that dialled us and of those that we dialled."""
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
                lambda: Connection(self, None), host, port, reuse_address=True
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
                _, protocol = await loop.create_connection(lambda: Connection(self, peer), host, port)
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
            self._count_stranger(connection)
        elif peer is not None and peer.connection is connection:
            peer.connection = None
            peer.counters.disconnects += 1
            self.receiver.link_down(peer.name)

    def _count_stranger(self, connection: Connection) -> None:
        reason = connection.refused_for
        if self.closed or (connection.dialled and not reason):
            return  # whom we dialled is down or starting: no stranger
        self.strangers += not connection.dialled
        reason = reason or UNPROVEN
        self.refused[reason] += 1
        if (times := self.refused[reason]) & (times - 1) == 0:
            # The 1st, 2nd, 4th, 8th … of a kind: a scanner must not fill the log.
            log.warning("link refused (%s, %d times): %s", reason, times, connection.describe())

    def opened(self, connection: Connection) -> bool:
        waiting = sum(1 for other in self._open if not other.stood)
        if self.closed:
            return False
        if not connection.dialled and waiting >= self.timings.strangers_max:
            self.strangers += 1
            self.refused[TOO_MANY] += 1
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
                connection.close("" if connection.stood else TOO_SLOW)
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
