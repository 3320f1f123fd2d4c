"""What the parts of the engine share: its ports, its timings, and who is followed.

The engine (raft/engine.py) is one object in layers, each a module: LibraryCore (engine_library.py: the hold on
PySyncObj), this one, snapshots (engine_snapshot.py), replication (engine_append.py), elections
(engine_election.py), and on top proposals, applying and the step.
"""

from __future__ import annotations

import random as random_module
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from pysyncobj.node import Node

from raft.engine_library import FOLLOWER, Journal, LibraryCore
from raft.snapshots import Snapshot as StoredSnapshot
from raft.wire import AppendReply, Message


class EngineCorrupt(Exception):
    """A broken invariant: going on could lose acknowledged entries, so the replica stops."""


class MachineFailed(EngineCorrupt):
    """The state machine raised on a committed entry; its state is no longer known to equal its peers'."""


class Machine(Protocol):
    """The replicated state machine. ``apply`` is total and deterministic."""

    def apply(self, index: int, payload: bytes) -> object: ...
    def snapshot(self) -> bytes: ...
    def restore(self, state: bytes) -> None: ...


class Links(Protocol):
    """Connections to peers. In order and at most once per connection; a lost connection is reported."""

    def send(self, peer: str, message: Message) -> bool:
        """False: there is no connection, and the message will surely not arrive."""

    def has_room(self, peer: str) -> bool:
        """Whether the send window has room. When it has again, the host calls ``Engine.wake``."""


class Host(Protocol):
    """The engine's owner. Everything is called from within engine methods: it must not call back into them."""

    def wake(self) -> None:
        """Call ``Engine.step`` soon (once is enough)."""

    def take(self, term: int, bytes_max: int) -> list[bytes]:
        """Commands to append or forward right now, under this term; they count as sent."""

    def refused(self, tokens: list[bytes]) -> None:
        """Taken commands that were surely not appended."""

    def applied(self, index: int, term: int, command: bytes, result: object) -> None: ...

    def restored(self, index: int, term: int) -> None:
        """The machine's state was replaced by a leader's snapshot up to this index."""

    def background(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run ``work`` beside the loop, then ``done(result, error)`` on it."""


class SnapshotStore(Protocol):
    def load(self) -> StoredSnapshot | None: ...

    def write(self, snapshot: StoredSnapshot) -> Callable[[], None]:
        """Write and sync beside the loop. The returned call makes it the current one, durably."""


@dataclass(frozen=True)
class Timings:
    """Milliseconds. An election is decided by pre-vote first, so short timeouts cost no terms."""

    heartbeat_ms: int = 150
    election_ms_min: int = 500
    election_ms_max: int = 900
    fallback_ms: int = 1000
    """A leader that a majority has not answered for so long steps down."""
    hurry_ms_min: int = 30
    hurry_ms_max: int = 120
    """When the connection to the leader breaks, a follower asks for pre-votes after a delay drawn from here."""

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_ms * 3 < self.election_ms_min:
            raise ValueError(
                f"election_ms_min={self.election_ms_min} must be above 3 * heartbeat_ms={self.heartbeat_ms}: "
                "one late heartbeat must not start an election"
            )
        if not self.election_ms_min < self.election_ms_max:
            raise ValueError(
                f"election_ms_max={self.election_ms_max} must be above election_ms_min={self.election_ms_min}: "
                "equal timeouts split votes"
            )
        if self.fallback_ms < self.election_ms_min:
            raise ValueError(
                f"fallback_ms={self.fallback_ms} must not be below election_ms_min={self.election_ms_min}"
            )
        if not 0 < self.hurry_ms_min < self.hurry_ms_max:
            raise ValueError(
                f"hurry_ms_max={self.hurry_ms_max} must be above hurry_ms_min={self.hurry_ms_min} > 0"
            )


@dataclass(frozen=True)
class Limits:
    """When to compact, and how much may wait."""

    compact_entries: int = 100_000
    compact_bytes: int = 64 * 1024 * 1024
    tail_entries: int = 10_000
    """Kept below a snapshot, so that a follower slightly behind needs entries only."""
    uncommitted_entries: int = 200_000
    uncommitted_bytes: int = 128 * 1024 * 1024
    snapshot_bytes: int = 1024 * 1024 * 1024
    apply_ms: int = 25
    """Applying pauses after this long, so that a long catch-up does not silence the replica."""


class Peer(Node):  # type: ignore[misc]  # the library has no types
    """A node of the library whose hash is the same in every process.

    The library walks sets of nodes; with Python's salted string hashes a simulation could not be replayed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._hash = zlib.crc32(name.encode())

    def __hash__(self) -> int:
        return self._hash


class EngineBase(LibraryCore):
    """Fields and the rules of following."""

    def __init__(
        self,
        *,
        node_id: str,
        voters: Iterable[str],
        observer: bool,
        machine: Machine,
        journal: Journal,
        snapshots: SnapshotStore,
        links: Links,
        host: Host,
        clock: Callable[[], float],
        random: random_module.Random,
        timings: Timings,
        limits: Limits,
    ) -> None:
        self.node_id = node_id
        self.observer = observer
        self.timings = timings
        self.limits = limits
        self.machine = machine
        self.snapshots = snapshots
        self.links = links
        self.host = host
        self.random = random
        self.stopped = False
        self.ready = False
        """An entry of the present term was applied, and all the leader had committed: the state is fresh."""
        self.ignored = 0
        """Messages from peers that may not send them."""
        self._heard = float("-inf")
        self._applied_term = 0
        self._prevote_term = 0
        self._prevoted = False
        self._hurries = 0
        """Pre-votes yet to be asked for in quick succession, since the link to the leader broke."""
        self._beat_due = False
        self._forward_hold = False
        others = {name: Peer(name) for name in sorted(voters) if name != node_id}
        self._nodes: dict[str, Node] = dict(others)
        super().__init__(
            None if observer else Peer(node_id),
            list(others.values()),
            journal,
            links.send,
            clock,
            {
                "appendEntriesPeriod": timings.heartbeat_ms / 1000,
                "raftMinTimeout": timings.election_ms_min / 1000,
                "raftMaxTimeout": timings.election_ms_max / 1000,
                # Defect 9: the library's 30 s leave a stale leader in office.
                "leaderFallbackTimeout": timings.fallback_ms / 1000,
                "connectionTimeout": 60.0,
            },
        )

    @property
    def votes(self) -> bool:
        """Not an observer, and not a voter that lost its journal: that one has forgotten votes and entries which
        others count on, so it only learns until it has caught up (Journal.rejoining)."""
        return not self.observer and not getattr(self.log, "rejoining", False)

    @property
    def learns(self) -> bool:
        """A voter that lost its journal: what it acknowledges counts for no commit (engine_rejoin.py). Of two
        voters the other one has been part of everything, so that there its word may count."""
        return not self.observer and not self.votes and len(self._SyncObj__otherNodes) > 1

    def reply(self, match: int, next_index: int = 0) -> AppendReply:
        return AppendReply(self.term, match, next_index, self.learns)

    def _SyncObj__generateRaftTimeout(self) -> float:
        # The library draws from the global random source; a simulation must be able to replay.
        return self.random.uniform(self.timings.election_ms_min, self.timings.election_ms_max) / 1000

    def _fresh_deadline(self) -> float:
        return self.clock() + self._SyncObj__generateRaftTimeout()

    def _hurried_deadline(self) -> float:
        return self.clock() + self.random.uniform(self.timings.hurry_ms_min, self.timings.hurry_ms_max) / 1000

    def _step_down(self, term: int) -> None:
        """Adopt a higher term at once (defect 5: the library ignores it in most messages)."""
        if term <= self.term:
            return
        if self.is_leader:
            self.election_deadline = self._fresh_deadline()
        self._SyncObj__setCurrentTerm(term, None)
        self._SyncObj__setState(FOLLOWER)
        self.leader = None
        self._give_up_standing()
        self._forget_leadership()

    def _follow(self, node: Node, term: int) -> None:
        """A message that only the leader of ``term`` sends has come from ``node``; ``term`` is not old."""
        if term == self.term and self.is_leader:
            raise EngineCorrupt(f"{node.id} leads term {term}, and so does {self.node_id}")
        self._step_down(term)
        if self.leader is not None and self.leader != node:
            raise EngineCorrupt(f"{node.id} leads term {term}, and so does {self.leader.id}")
        if self.leader is None:
            self._forward_hold = False
        self.leader = node
        self._SyncObj__setState(FOLLOWER)
        self._give_up_standing()
        self._hurries = 0
        self._heard = self.clock()
        self.election_deadline = self._fresh_deadline()

    def _give_up_standing(self) -> None:
        self._prevote_term = 0
        self._prevoted = False

    def _forget_leadership(self) -> None:
        raise NotImplementedError

    def send(self, node: Node, message: Message) -> bool:
        return self.links.send(node.id, message)
