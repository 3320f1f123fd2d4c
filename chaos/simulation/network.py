"""Links between simulated nodes, in place of raft/transport.py and with its contract.

In order and at most once per connection; a connection that is lost is told to each end, but not to both at once,
and what it had not delivered is dropped. Underneath there are directed *paths*, one each way for a pair of nodes:

- a path that is *cut* delivers nothing. What was sent is held, and delivered when the path heals, as TCP would;
- an end that has heard nothing for ``IDLE_S`` gives the connection up; if its own path stands, the other end hears
  of that. So a short cut is a delay, a long one is a lost connection, and a one-way cut is seen by one end first;
- a path has a latency and a jitter, and may be slow.

Appends, answers and votes are sometimes delivered again some time later, although the contract promises that they
are not: they have to bear it, because a late answer across two connections looks the same. Proposals are not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from chaos.simulation.loop import Actor, ProcessLoop, Scheduler
from raft.transport import VOTER, PeerCounters
from raft.wire import FRAME_BYTES_MAX, FrameReader, Message, Propose, SnapshotChunk, Vote, decode, encode

IDLE_S = 1.6
LOOK_S = 0.2
WINDOW = 256
REPEATED_SNAPSHOTS = 0.3
REPEATS = ((0.004, 0.03), (0.004, 0.03), (0.05, 0.03), (0.03, 0.4))
"""Of a run: how many messages come again, and how late at most."""


class Path:
    """One direction between two nodes."""

    __slots__ = ("cut", "cut_at", "jitter_s", "latency_s")

    def __init__(self) -> None:
        self.latency_s = 0.0002
        self.jitter_s = 0.0006
        self.cut = False
        self.cut_at = 0.0


class SimulatedPeer:
    def __init__(self, name: str) -> None:
        self.name = name
        self.role = VOTER
        self.counters = PeerCounters()
        self.connection: Connection | None = None

    @property
    def connected(self) -> bool:
        return self.connection is not None


class Connection:
    """One connection of a pair. An end is a life of a node; each end has its own idea of whether it stands."""

    def __init__(self, network: Network, ends: tuple[SimulatedTransport, SimulatedTransport]) -> None:
        self.network = network
        self.ends = ends
        self.stands = {end.node_id: False for end in ends}
        self.queues: dict[str, deque[tuple[float, Message]]] = {end.node_id: deque() for end in ends}
        self.full: set[str] = set()
        self._pumping: set[str] = set()
        self._frames = {end.node_id: FrameReader(FRAME_BYTES_MAX) for end in ends}

    def other(self, name: str) -> SimulatedTransport:
        return self.ends[1] if self.ends[0].node_id == name else self.ends[0]

    def send(self, source: str, message: Message) -> None:
        network = self.network
        target = self.other(source)
        queue = self.queues[target.node_id]
        path = network.path(source, target.node_id)
        draw = network.scheduler.random.random()
        due = network.scheduler.now + path.latency_s + path.jitter_s * draw
        if queue and queue[-1][0] > due:
            due = queue[-1][0]
        queue.append((due, message))
        share = REPEATED_SNAPSHOTS if isinstance(message, SnapshotChunk) else network.repeated
        if draw < share and not isinstance(message, Propose):
            network.scheduler.after(
                network.repeat_s * draw / share, network.actor, self._repeat, target, message
            )
        if isinstance(message, Vote) and network.on_vote is not None:
            network.on_vote(source, target.node_id)
        if len(queue) >= WINDOW:
            self.full.add(source)
        self.pump(target)

    def _repeat(self, target: SimulatedTransport, message: Message) -> None:
        name = target.node_id
        if self.stands[name] and self.stands[self.other(name).node_id]:
            queue = self.queues[name]
            queue.append((max(self.network.scheduler.now, queue[-1][0] if queue else 0.0), message))
            self.pump(target)

    def pump(self, target: SimulatedTransport) -> None:
        """See to it that what is due at ``target`` will be delivered."""
        name = target.node_id
        queue = self.queues[name]
        source = self.other(name).node_id
        if name in self._pumping or not queue or self.network.path(source, name).cut:
            return
        self._pumping.add(name)
        # Kept by the kernel of the target, whether its process is held or not: delivery waits for that process.
        self.network.scheduler.at(
            max(queue[0][0], self.network.scheduler.now), target.loop, self._deliver, target
        )

    def _deliver(self, target: SimulatedTransport) -> None:
        name = target.node_id
        self._pumping.discard(name)
        queue, source = self.queues[name], self.other(name)
        if self.network.path(source.node_id, name).cut:
            return
        if not self.stands[name]:
            return  # this end stands not yet (then it pumps), or no more (then all is dropped)
        now = self.network.scheduler.now
        messages = []
        while queue and queue[0][0] <= now:
            messages.append(queue.popleft()[1])
        if source.node_id in self.full and len(queue) < WINDOW // 4:
            self.full.discard(source.node_id)
            if self.stands[source.node_id] and not source.loop.dead:
                source.loop.call_soon(source.receiver.writable, name)
        if messages:
            target.loop.enter(self._receive, target, source.node_id, messages)
        self.pump(target)

    def _receive(self, target: SimulatedTransport, source: str, messages: list[Message]) -> None:
        for message in messages:
            if not self.stands[target.node_id]:
                return
            if self.network.on_wire:
                message = self._over_the_wire(target.node_id, message)
            target.receiver.message(source, message)

    def _over_the_wire(self, name: str, message: Message) -> Message:
        frames = self._frames[name]
        frames.feed(encode(message))
        body = frames.next()
        assert body is not None
        decoded: Message = decode(body)
        return decoded

    def close(self, name: str, tell: bool = True) -> None:
        """One end gives up. ``tell``: the other end hears of it, if there is a path."""
        if not self.stands[name]:
            return
        end, other = (self.ends[0], self.ends[1]) if self.ends[0].node_id == name else self.ends[::-1]
        self.stands[name] = False
        self.queues[name].clear()
        peer = end.peers[other.node_id]
        if peer.connection is self:
            peer.connection = None
            peer.counters.disconnects += 1
            if not end.closed and not end.loop.dead:
                end.loop.call_soon(end.receiver.link_down, other.node_id)
        network = self.network
        if tell and self.stands[other.node_id] and not network.path(name, other.node_id).cut:
            delay = network.path(name, other.node_id).latency_s + 0.002 * network.scheduler.random.random()
            network.scheduler.after(delay, other.loop, self.close, other.node_id, False)


class SimulatedTransport:
    """What raft/replica.py takes for its Transport."""

    def __init__(self, network: Network, loop: ProcessLoop, options: Mapping[str, Any]) -> None:
        self.network = network
        self.loop = loop
        self.node_id: str = options["node_id"]
        self.receiver: Any = options["receiver"]
        self.peers = {name: SimulatedPeer(name) for name in sorted(options["peers"])}
        self.strangers = 0
        self.refused: dict[str, int] = {}
        self.closed = False

    async def start(self) -> None:
        self.network.opened(self)

    async def stop(self) -> None:
        self.shut()

    def shut(self) -> None:
        """Close as the kernel does when the process has ended, whatever way it did."""
        if self.closed:
            return
        self.closed = True
        for peer in self.peers.values():
            if peer.connection is not None:
                peer.connection.close(self.node_id)
        self.network.gone(self)

    def vanish(self) -> None:
        """The machine lost power: nobody is told."""
        self.closed = True
        for peer in self.peers.values():
            if peer.connection is not None:
                peer.connection.close(self.node_id, tell=False)
        self.network.gone(self)

    def send(self, name: str, message: Message) -> bool:
        peer = self.peers.get(name)
        if peer is None or peer.connection is None:
            return False
        peer.connection.send(self.node_id, message)
        return True

    def has_room(self, name: str) -> bool:
        peer = self.peers.get(name)
        if peer is None or peer.connection is None:
            return False
        return self.node_id not in peer.connection.full


class Network:
    def __init__(self, scheduler: Scheduler, names: list[str], on_wire: bool) -> None:
        self.scheduler = scheduler
        self.names = names
        self.on_wire = on_wire
        """Whether messages go through their encoding: slower, and not needed in every run."""
        self.repeated, self.repeat_s = scheduler.random.choice(REPEATS)
        self.actor = Actor(900)
        self.on_vote: Callable[[str, str], None] | None = None
        """Told of each vote that is given: (voter, candidate)."""
        self._paths = {(a, b): Path() for a in names for b in names if a != b}
        self._open: dict[str, SimulatedTransport] = {}
        for pair in [(a, b) for a in names for b in names if a < b]:
            scheduler.after(LOOK_S * scheduler.random.random(), self.actor, self._look, *pair)

    def path(self, source: str, target: str) -> Path:
        return self._paths[source, target]

    def opened(self, transport: SimulatedTransport) -> None:
        self._open[transport.node_id] = transport
        for name in self.names:
            if name != transport.node_id:
                self._dial_soon(*sorted((name, transport.node_id)))

    def gone(self, transport: SimulatedTransport) -> None:
        if self._open.get(transport.node_id) is transport:
            del self._open[transport.node_id]

    # --- faults -------------------------------------------------------------------------------------------------

    def cut(self, source: str, target: str) -> None:
        path = self._paths[source, target]
        if not path.cut:
            path.cut, path.cut_at = True, self.scheduler.now

    def heal(self, source: str, target: str) -> None:
        path = self._paths[source, target]
        path.cut = False
        end = self._open.get(target)
        peer = end.peers.get(source) if end is not None else None
        if end is not None and peer is not None and peer.connection is not None:
            peer.connection.pump(end)

    def reset(self, a: str, b: str) -> None:
        """The connection of a pair breaks, though the paths stand."""
        end = self._open.get(a)
        peer = end.peers.get(b) if end is not None else None
        if peer is not None and peer.connection is not None:
            peer.connection.close(a)

    def heal_all(self) -> None:
        for (source, target), path in self._paths.items():
            self.heal(source, target)
            path.latency_s, path.jitter_s = 0.0002, 0.0006

    # --- making and losing connections --------------------------------------------------------------------------

    def _look(self, a: str, b: str) -> None:
        """What both ends do from time to time: give up what is silent, dial what is lost."""
        for name, other in ((a, b), (b, a)):
            end = self._open.get(name)
            if end is None or end.loop.held_until > self.scheduler.now:
                continue
            connection = end.peers[other].connection
            if connection is not None and self._silent_s(connection, other, name) > IDLE_S:
                connection.close(name)
        self._dial_soon(a, b)
        self.scheduler.after(LOOK_S, self.actor, self._look, a, b)

    def _silent_s(self, connection: Connection, source: str, target: str) -> float:
        """For how long nothing can have come from ``source``."""
        now = self.scheduler.now
        path = self._paths[source, target]
        since = path.cut_at if path.cut else now
        far = connection.other(target)
        if far.loop.dead or far.closed or not connection.stands[source]:
            since = min(since, now - IDLE_S / 2)  # a half-open connection: found out within a while
            if not path.cut and self.scheduler.random.random() < 0.3:
                return IDLE_S + 1
        held = far.loop.held_until - now
        if held > 0:
            since = min(since, far.loop.held_since)
        return now - since

    def _dial_soon(self, a: str, b: str) -> None:
        # The greater id dials, as in raft/transport.py.
        dialler = self._open.get(b)
        if dialler is not None and dialler.peers[a].connection is None:
            delay = 0.002 + 0.03 * self.scheduler.random.random()
            self.scheduler.after(delay, dialler.loop, self._dial, a, b)

    def _dial(self, a: str, b: str) -> None:
        acceptor, dialler = self._open.get(a), self._open.get(b)
        if acceptor is None or dialler is None or dialler.peers[a].connection is not None:
            return
        if self._paths[a, b].cut or self._paths[b, a].cut or acceptor.loop.held_until > self.scheduler.now:
            return  # no answer: tried again at the next look
        connection = Connection(self, (acceptor, dialler))
        self._stand(connection, dialler, acceptor)
        delay = self._paths[b, a].latency_s
        self.scheduler.after(delay, acceptor.loop, self._stand, connection, acceptor, dialler)

    def _stand(self, connection: Connection, end: SimulatedTransport, other: SimulatedTransport) -> None:
        if end.closed:
            return
        peer = end.peers[other.node_id]
        if peer.connection is not None:
            peer.connection.close(end.node_id)
        peer.connection = connection
        connection.stands[end.node_id] = True
        peer.counters.connects += 1
        end.loop.call_soon(end.receiver.link_up, other.node_id, False)
        connection.pump(end)
