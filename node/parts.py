"""What a node's service is made of, so that the same service runs on real parts and on simulated ones.

The service (node/service.py) decides nothing by itself about clocks, disks, sockets or processes: all of that is
behind these protocols. node/assembly.py builds the real parts; a simulation builds its own, under virtual time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from node.config import NodeConfig
from node.facade import NodeFacade
from node.records_model import Attempt, RecordedEvent
from node.workers.events import PoolEvent, PoolStats
from node.workers.port import HandlerInfo, Report, Work
from node.workers.testimony import Evidence
from oncekeeper.log.port import Item, TaskLog
from raft.ledger import Ledger
from raft.proposals import Outcome
from raft.replica_config import ReplicaStatus

T = TypeVar("T")


class Clock(Protocol):
    def lease_ms(self) -> int:
        """Monotonic, the same in all processes of the machine, and it counts time spent suspended."""
        ...

    def monotonic_ms(self) -> float:
        """Monotonic; what the ledger's time is measured by."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds of the epoch; may jump. For due times and for people, never for leases."""
        ...


class ReplicaPart(Protocol):
    @property
    def is_leader(self) -> bool: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def propose(self, payload: bytes, *, timeout_ms: int) -> Outcome: ...

    async def barrier(self, timeout_ms: int) -> bool: ...

    def status(self) -> ReplicaStatus: ...


class PoolsPart(Protocol):
    handlers: dict[str, HandlerInfo]

    async def start(self) -> None: ...

    async def stop(self, grace_s: float = ...) -> None: ...

    def kill_all(self) -> None: ...

    def set_lease(self, until_ns: int) -> None: ...

    def submit(self, work: Work) -> None: ...

    def release(self, number: int, at: int, count: int) -> None: ...

    async def validate(self, handler: str, bodies: Sequence[bytes]) -> tuple[int, str] | None: ...

    def stats(self) -> PoolStats: ...


class LogReader(Protocol):
    """What of a task log the loop uses at once (oncekeeper/log/port.py: TaskLog)."""

    @property
    def partitions(self) -> int: ...

    def read(self, partition: int, offset: int, tasks_max: int, bytes_max: int) -> list[Item]: ...

    def committed(self) -> dict[int, int]: ...


class GroupPart(Protocol):
    """A log that decides by itself which partitions are a member's (oncekeeper/log/kafka_group.py)."""

    @property
    def positions(self) -> Mapping[int, int]:
        """The partitions that are ours, and from where."""
        ...

    @property
    def trouble(self) -> str: ...

    def want(self, member: bool) -> None: ...

    def skip(self, partition: int) -> bool:
        """Pass over what the log deleted before it was run; False: the partition does not wait for that."""
        ...

    def listen(
        self, on_change: Callable[[], None], on_more: Callable[[frozenset[int] | None], None]
    ) -> None: ...


class DelayIndexPart(Protocol):
    """A log's delayed tasks, where a node finds them by an index that is a moment behind (node/grouplog.py)."""

    def watch(self, on_change: Callable[[frozenset[int]], None]) -> None:
        """Tell the loop that calls this of partitions of ours for which others put or moved delayed tasks."""
        ...

    def expect(self) -> None:
        """Start nothing by the index before it has what was written until now."""
        ...

    async def see(self, within_s: float) -> None:
        """The same, and know it already if that does not take long."""
        ...


class LogPart(Protocol):
    """node/logthread.py: reads at once, writes awaited."""

    @property
    def reader(self) -> LogReader: ...

    @property
    def group(self) -> GroupPart | None:
        """None: who owns what is computed from the ledger (node/ownership.py)."""
        ...

    @property
    def delay_index(self) -> DelayIndexPart | None:
        """None: what anybody wrote of delayed tasks is seen at once, or the log keeps none."""
        ...

    async def run(self, work: Callable[[TaskLog], T]) -> T: ...

    async def look(self, work: Callable[[TaskLog], T]) -> T:
        """For what only reads, and may take its time."""
        ...

    def close(self) -> None: ...


class RecordsPart(Protocol):
    @property
    def room(self) -> bool: ...

    @property
    def trouble(self) -> str | None: ...

    def add_attempts(self, attempts: Iterable[Attempt]) -> bool: ...

    def add_events(self, events: Iterable[RecordedEvent]) -> bool: ...

    def close(self) -> Any: ...


class WakePart(Protocol):
    async def listen(self, on_wake: Callable[[frozenset[int] | None], None]) -> None: ...

    def wake(self, partitions: Iterable[int]) -> None: ...

    def close(self) -> None: ...


class HttpPart(Protocol):
    async def start(self) -> Any: ...

    async def stop(self) -> None: ...


class EvidencePart(Protocol):
    """The work journals of this node's former lives (node/workers/testimony.py)."""

    def lives(self) -> tuple[int, ...]: ...

    async def read(self, life: int) -> Evidence: ...

    def forget(self, life: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    config: NodeConfig
    clock: Clock
    log: LogPart
    records: RecordsPart
    wake: WakePart
    evidence: EvidencePart
    slots: Mapping[str, int]
    """How many tasks each kind of pool runs at once."""
    proposer_name: int
    """64 random bits, drawn anew at each start: the ledger takes an old name's sequences for repeats."""
    next_incarnation: Callable[[int], int]
    """Durable before it returns; above every earlier one, and at least the argument."""
    make_replica: Callable[
        [
            Ledger,
            Callable[[int, bytes, Any], None],
            Callable[[ReplicaStatus], None],
            Callable[[BaseException], None],
            Callable[[int], None],
        ],
        ReplicaPart,
    ]
    """(ledger, on_applied, on_status, on_fatal, on_restored) -> the replica, not started."""
    make_pools: Callable[[int, Callable[[list[Report]], None], Callable[[PoolEvent], None]], PoolsPart]
    """(incarnation, on_reports, on_event) -> the pools, not started."""
    make_http: Callable[[NodeFacade], HttpPart]
    ask_peer: Callable[..., Awaitable[Any]]
    close_peers: Callable[[], Awaitable[None]]
