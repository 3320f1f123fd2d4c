"""Engines on a simulated network, disk and clock: everything happens in an order that the test decides.

``Net`` delivers in order on each link and at most once, as the real transport does; a test may hold, drop, repeat
or alter messages. Time moves only to the next thing that is due.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from raft.engine import Engine, Limits, Timings
from raft.snapshots import Snapshot
from raft.wire import PAYLOAD, Message, command, token_numbers
from tests.support.raft_machine import TallyMachine


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class MemoryJournal:
    """PySyncObj's journal interface; remembers what was synced, so that a power cut can be played."""

    def __init__(self) -> None:
        self.entries: list[tuple[bytes, int, int]] = []
        self.synced: list[tuple[bytes, int, int]] = []
        self.term = 0
        self.vote: str | None = None
        self.syncs = 0
        self.closed = False
        self.rejoining = False

    def finish_rejoining(self) -> None:
        self.rejoining = False

    @property
    def dirty(self) -> bool:
        return self.entries != self.synced

    def after_power_cut(self) -> MemoryJournal:
        other = MemoryJournal()
        other.entries, other.synced = list(self.synced), list(self.synced)
        other.term, other.vote = self.term, self.vote
        return other

    def add(self, command: bytes, idx: int, term: int) -> None:
        if self.entries and idx != self.entries[-1][1] + 1:
            raise ValueError(f"{idx} does not follow {self.entries[-1][1]}")
        self.entries.append((command, idx, term))

    def clear(self) -> None:
        self.entries = []

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        del self.entries[entryFrom:]

    def deleteEntriesTo(self, entryTo: int) -> None:
        del self.entries[:entryTo]

    def __getitem__(self, item: Any) -> Any:
        return self.entries[item]

    def __len__(self) -> int:
        return len(self.entries)

    def sync(self) -> None:
        if self.dirty:
            self.syncs += 1
            self.synced = list(self.entries)

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        self.term, self.vote = term, votedForNodeId
        self.sync()

    def getCurrentTerm(self) -> int:
        return self.term

    def getVotedForNodeId(self) -> str | None:
        return self.vote

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        pass

    def getRaftCommitIndex(self) -> int:
        return 1

    def onOneSecondTimer(self) -> None:
        pass

    def _destroy(self) -> None:
        self.closed = True


class MemorySnapshots:
    def __init__(self) -> None:
        self.current: Snapshot | None = None

    def load(self) -> Snapshot | None:
        return self.current

    def write(self, snapshot: Snapshot) -> Callable[[], None]:
        def install() -> None:
            self.current = snapshot

        return install


class Node:
    """An engine's host and links."""

    def __init__(self, net: Net, name: str, observer: bool) -> None:
        self.net = net
        self.name = name
        self.observer = observer
        self.journal = MemoryJournal()
        self.snapshots = MemorySnapshots()
        self.origin = sum(name.encode())
        self.sequence = 0
        self.lives = 0
        self.defer_background = False
        self.start()

    def start(self) -> None:
        self.lives += 1
        self.machine = TallyMachine()
        self.woken = False
        self.queue: deque[bytes] = deque()
        self.results: dict[int, object] = {}
        self.refusals: list[int] = []
        self.restores: list[int] = []
        self.sent: list[tuple[str, Message]] = []
        self.deferred: list[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = []
        self.engine = Engine(
            node_id=self.name,
            voters=self.net.voters,
            observer=self.observer,
            machine=self.machine,
            journal=self.journal,
            snapshots=self.snapshots,
            links=self,
            host=self,
            clock=self.net.clock,
            random=self.net.random,
            timings=self.net.timings,
            limits=self.net.limits,
        )

    def propose(self, payload: bytes) -> int:
        self.sequence += 1
        self.queue.append(command(PAYLOAD, self.origin, self.sequence, payload))
        self.woken = True
        return self.sequence

    # Links
    def send(self, peer: str, message: Message) -> bool:
        if frozenset((self.name, peer)) not in self.net.links:
            return False
        self.sent.append((peer, message))
        self.net.carry(self.name, peer, message)
        return True

    def has_room(self, peer: str) -> bool:
        return frozenset((self.name, peer)) in self.net.links and peer not in self.net.full

    # Host
    def wake(self) -> None:
        self.woken = True

    def take(self, term: int, bytes_max: int) -> list[bytes]:
        taken = list(self.queue)
        self.queue.clear()
        return taken

    def refused(self, tokens: list[bytes]) -> None:
        self.refusals += [token_numbers(b"\0" + token)[1] for token in tokens]

    def applied(self, index: int, term: int, command: bytes, result: object) -> None:
        origin, sequence = token_numbers(command)
        if origin == self.origin:
            self.results[sequence] = result

    def restored(self, index: int, term: int) -> None:
        self.restores.append(index)

    def background(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        self.deferred.append((work, done))

    def finish_background(self) -> None:
        for work, done in self.deferred[:]:
            self.deferred.remove((work, done))
            done(work(), None)

    def step(self) -> None:
        self.woken = False
        self.engine.step()


class Net:
    def __init__(
        self,
        voters: int = 3,
        observers: int = 0,
        *,
        seed: int = 1,
        limits: Limits | None = None,
        timings: Timings | None = None,
    ) -> None:
        self.clock = Clock()
        self.random = random.Random(seed)
        self.limits = limits or Limits()
        self.timings = timings or Timings()
        self.links: set[frozenset[str]] = set()
        self.full: set[str] = set()
        self.flying: deque[tuple[str, str, Message]] = deque()
        self.alter: Callable[[str, str, Message], list[Message]] = lambda source, target, message: [message]
        """What becomes of a message: delivered, dropped (empty), repeated, altered."""
        self.voters = [f"n{number + 1}" for number in range(voters)]
        names = self.voters + [f"o{number + 1}" for number in range(observers)]
        self.nodes = {name: Node(self, name, name not in self.voters) for name in names}
        self.down: set[str] = set()

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    # --- links

    def carry(self, source: str, target: str, message: Message) -> None:
        for one in self.alter(source, target, message):
            self.flying.append((source, target, one))

    def connect(self, one: str, other: str) -> None:
        pair = frozenset((one, other))
        if pair not in self.links and not pair & self.down and (one in self.voters or other in self.voters):
            self.links.add(pair)
            for name, peer in ((one, other), (other, one)):
                self[name].engine.connected(peer, self[peer].observer)

    def disconnect(self, one: str, other: str) -> None:
        pair = frozenset((one, other))
        if pair in self.links:
            self.links.remove(pair)
            self.flying = deque(item for item in self.flying if frozenset(item[:2]) != pair)
            for name, peer in ((one, other), (other, one)):
                if name not in self.down:
                    self[name].engine.disconnected(peer)

    def connect_all(self) -> None:
        for one in self.nodes:
            for other in self.nodes:
                if one < other:
                    self.connect(one, other)

    def isolate(self, name: str) -> None:
        for other in self.nodes:
            if other != name:
                self.disconnect(name, other)

    def join(self, name: str) -> None:
        for other in self.nodes:
            if other != name:
                self.connect(name, other)

    def crash(self, name: str) -> None:
        """Power cut: what was not synced is gone."""
        self.down.add(name)
        self.isolate(name)
        self[name].journal = self[name].journal.after_power_cut()

    def restart(self, name: str) -> None:
        self.down.discard(name)
        self[name].start()
        self.join(name)

    # --- time

    def settle(self) -> None:
        """Everything that can happen at this instant."""
        for _ in range(10_000):
            quiet = True
            for name, node in self.nodes.items():
                if name in self.down or node.engine.stopped:
                    continue
                if not node.defer_background and node.deferred:
                    node.finish_background()
                    quiet = False
                if node.woken or node.engine.deadline() <= self.clock.now:
                    node.step()
                    quiet = False
            for _ in range(len(self.flying)):
                source, target, message = self.flying.popleft()
                if target not in self.down:
                    self[target].engine.receive(source, message)
                quiet = False
            if quiet:
                return
        raise AssertionError("the network does not come to rest")

    def run(self, seconds: float, until: Callable[[], Any] | None = None) -> None:
        end = self.clock.now + seconds
        while True:
            self.settle()
            if until is not None and until():
                return
            due = min(
                (node.engine.deadline() for name, node in self.nodes.items() if name not in self.down),
                default=end,
            )
            if due >= end:
                self.clock.now = max(self.clock.now, end)
                self.settle()
                assert until is None or until(), f"not within {seconds} s"
                return
            self.clock.now = max(self.clock.now, due)

    # --- questions

    def leaders(self) -> list[str]:
        return [n for n, node in self.nodes.items() if n not in self.down and node.engine.is_leader]

    def elect(self) -> str:
        """Connect all, and wait for one leader whom all follow."""
        self.connect_all()

        def agreed() -> bool:
            alive = [node for name, node in self.nodes.items() if name not in self.down]
            leaders = {node.engine.leader_id for node in alive}
            return (
                leaders == set(self.leaders())
                and len(leaders) == 1
                and all(node.engine.ready for node in alive)
            )

        self.run(10, agreed)
        return self.leaders()[0]

    def propose(self, name: str, payload: bytes) -> object:
        """Propose and wait for the result at the proposer."""
        node = self[name]
        sequence = node.propose(payload)
        self.run(5, lambda: sequence in node.results)
        return node.results[sequence]

    def logs(self) -> dict[str, list[tuple[int, int, bytes]]]:
        return {n: [(i, t, c) for c, i, t in node.journal.entries] for n, node in self.nodes.items()}
