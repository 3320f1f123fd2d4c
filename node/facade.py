"""What the HTTP layer needs from the running node, and no more.

The node's service implements ``NodeFacade``; the contract tests of node/http implement it with a fake.
Everything runs on the node's one event loop. What would block (the task log, the work history) runs in
threads: the log by ``with_log``, the history because ``Records`` may be read from any thread.

The merged views (``/v1/status`` and ``/v1/tasks``) are sums of ``LocalStatus``. For "idle" to be true when it
is said, a ``LocalStatus`` must be one moment of one node: its partitions reflect every event of every ledger
entry up to its ``applied_index``, and every offset below a partition's ``frontier``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from dedup.ids import TaskId
from node.records import Records
from node.workers.port import HandlerInfo
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.port import Appended, TaskLog
from raft.commands import Answer, Command
from raft.ledger import Ledger

T = TypeVar("T")


class Unavailable(Exception):
    """It was surely not done: no quorum, no leader, a full queue, or the node is stopping. Try again."""


class OutcomeUnknown(Exception):
    """It may or may not have been done (a proposal without an answer in time). Asking again is safe."""


class PeerUnreachable(Exception):
    """A peer did not answer in time, or what it answered was no answer of ours."""


class NodeIdentity(msgspec.Struct, frozen=True):
    """Who this node is, and the part of its configuration that people ask for. Never a secret."""

    node: str
    cluster_id: str
    incarnation: int
    version: str
    pid: int
    started_ms: int  # epoch
    app: str
    app_dir: str
    data_dir: str
    log: str  # "embedded", or the log's URL without credentials
    partitions: int
    raft: str  # address, host:port
    http: str  # address, host:port
    session_timeout_ms: int
    fence_margin_ms: int


class PartitionStatus(msgspec.Struct, frozen=True):
    """A partition as its owner sees it. Offsets from ``position`` to ``frontier`` are in the owner's hands.

    waiting + delayed + running + suspect = the unsettled tasks among them, and those in hand that were
    delayed; the others are settled, but stand
    behind an unsettled one. What lies from ``frontier`` to the log's end has not been read: it is waiting
    too.
    """

    partition: int
    position: int  # the lowest unsettled offset
    frontier: int  # the next offset to be read
    waiting: int = 0
    delayed: int = 0  # waits for the due time of its next attempt
    running: int = 0  # claimed by any node
    suspect: int = 0
    in_hand: int = 0  # of all these, those that the log's store of delayed tasks counts too


class LocalStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One node at one moment, without a word from the others."""

    node: str
    incarnation: int
    session: int  # 0: none is open
    role: str  # "leader", "follower", "candidate", "observer"
    leader: str | None
    term: int
    applied_index: int
    lease_left_ms: int  # until this node fences itself
    takes_work: bool
    pid: int
    partitions: tuple[PartitionStatus, ...]  # those it owns
    running: int  # claims of this node that are not settled, of any partition, its own or not
    tasks_settled: int = 0  # since its start
    workers: dict[str, int] = {}  # statistics for people, e.g. {"cpu": 2, "io": 1, "busy": 1, "restarts": 0}
    refused: dict[str, int] = {}  # raft connections refused, by reason (raft/tls.py, raft/connection.py)
    notes: tuple[str, ...] = ()  # what a person should know ("history.db cannot be written: …")


class PeerAnswer(msgspec.Struct, frozen=True):
    status: int
    body: Any  # decoded JSON


class NodeFacade(Protocol):
    @property
    def identity(self) -> NodeIdentity: ...

    @property
    def ledger(self) -> Ledger:
        """This node's replica. Read only, from the loop only."""
        ...

    @property
    def records(self) -> Records: ...

    @property
    def handlers(self) -> Mapping[str, HandlerInfo]: ...

    @property
    def peers(self) -> Mapping[str, str]:
        """The HTTP address (host:port) of each other node of the cluster, whether it is up or not."""
        ...

    def local_status(self) -> LocalStatus: ...

    async def propose(self, commands: tuple[Command, ...], timeout_ms: int) -> tuple[Answer, ...]:
        """Answers parallel to commands, applied here too. Raises Unavailable or OutcomeUnknown."""
        ...

    async def barrier(self, timeout_ms: int) -> None:
        """After it, ``ledger`` holds all that was acknowledged anywhere before. Raises Unavailable."""
        ...

    async def validate(self, handler: str, bodies: Sequence[bytes]) -> tuple[int, str] | None:
        """The first body that does not fit the handler's types and why (naming the field), or None.

        Raises Unavailable when no worker can tell.
        """
        ...

    async def append(self, batches: Sequence[TaskBatch]) -> list[Appended]:
        """Store durably, all or none, and wake the owners. Raises the log's Unsent or UnknownAppend."""
        ...

    async def with_log(self, work: Callable[[TaskLog], T]) -> T:
        """Run ``work`` in the node's log thread, on that thread's own log; what it raises is raised here."""
        ...

    async def ask_peer(
        self, node: str, method: str, path: str, body: Any = None, *, timeout_ms: int = 1500
    ) -> PeerAnswer:
        """Any HTTP status is an answer. Raises PeerUnreachable. node/http/peers.py has an implementation."""
        ...

    def skip(self, partition: int) -> bool:
        """Pass over what the log deleted before it was run; False: the partition does not wait for that here."""
        ...

    async def delays_changed(self, partitions: frozenset[int], timeout_ms: int) -> bool:
        """Delayed tasks of these were moved: forget what is known of them; whether nothing of it is in a claim."""
        ...

    async def wait_settled(self, task_id: TaskId, timeout_ms: int) -> bool:
        """Wait until the ledger here has the id executed, dead or cancelled; whether it has."""
        ...
