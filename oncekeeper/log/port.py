"""The task log: a durable, partitioned log of tasks, and the port that every log implements.

A partition is a sequence of *offsets*, one a task, never reused. Tasks that were submitted together rest and
travel as one ``TaskBatch`` over consecutive offsets. A node reads batches, and moves the *committed position*
of a partition forward: the lowest offset that is neither terminal nor durably handed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from dedup.ids import Ids, TaskId
from oncekeeper.envelope import TaskBatch

READ_ITEMS_MAX = 512
"""Of one read: each costs what a large batch costs, and while thousands of single tasks are taken in one go,
their node answers no peer."""


class Appended(msgspec.Struct, frozen=True):
    """Where a batch came to rest: offsets base .. base + count - 1 of a partition."""

    partition: int
    base: int
    count: int


class Fetched(msgspec.Struct, frozen=True):
    """A batch as read: its tasks have the offsets base .. base + len(batch) - 1."""

    partition: int
    base: int
    batch: TaskBatch

    @property
    def end(self) -> int:
        """The first offset after it."""
        return self.base + len(self.batch)


class Undecodable(msgspec.Struct, frozen=True):
    """Offsets whose content is no task message. The node gives it to dead letters and moves on."""

    partition: int
    base: int
    count: int
    raw: bytes
    reason: str

    @property
    def end(self) -> int:
        return self.base + self.count


class Gap(msgspec.Struct, frozen=True):
    """Offsets that hold no task and never will: a transaction's marker, or what compaction took away."""

    partition: int
    base: int
    count: int

    @property
    def end(self) -> int:
        return self.base + self.count


Item = Fetched | Undecodable | Gap
"""What a read finds: each covers ``base .. base + its count - 1``, and the next one begins where it ends, but
where retention has passed the reader."""


class Aside(msgspec.Struct, frozen=True):
    """A task put aside, out of its partition's way: a dead letter, or a suspect that waits for a human."""

    kind: str  # "dead" or "suspect"
    id: TaskId
    message: bytes  # the task message (JSON), or the raw bytes of what could not be decoded
    reason: str
    at_ms: int  # epoch


class Located(msgspec.Struct, frozen=True):
    """Where a task stands in the log, with its message as a single task."""

    partition: int
    offset: int
    batch: TaskBatch  # of length 1


class Unsent(Exception):
    """The append failed, and surely nothing of it was stored."""


class UnknownAppend(Exception):
    """The append may or may not have been stored. Appending the same ids again is safe."""


@runtime_checkable
class TaskLog(Protocol):
    """Not safe for threads: each thread opens its own.

    Writes raise Unsent or UnknownAppend, all of them; repeating one is safe. Reads raise LogUnusable.
    """

    @property
    def partitions(self) -> int: ...

    def append(self, batches: Sequence[TaskBatch]) -> list[Appended]:
        """Store batches durably, all or none, before returning. Raises Unsent or UnknownAppend.

        Kafka has no "all or none" over partitions: there, a call of which a part is stored is an UnknownAppend.

        The log chooses partitions and cuts batches into rows; the answer says where every row came to rest.
        """
        ...

    def read(self, partition: int, offset: int, tasks_max: int, bytes_max: int) -> list[Item]:
        """What stands from ``offset`` on: whole batches, the first one cut to start at ``offset``.

        Ends before the batch that would exceed ``tasks_max`` or ``bytes_max``, but gives one if any is
        there. A first base above ``offset`` means that retention has passed the reader. A log that nodes read on
        their loop (all but one that is remote) ends after READ_ITEMS_MAX batches, too.
        """
        ...

    def ends(self) -> dict[int, int]:
        """Per partition the next offset to be given out."""
        ...

    def committed(self) -> dict[int, int]:
        """Per partition the committed position (0 where none was)."""
        ...

    def commit(self, positions: Mapping[int, int]) -> None:
        """Move committed positions forward, durably. They never go back: a lower one is ignored.

        On Kafka a person can set them back all the same, and only a group without members can be committed for
        from outside: nodes commit by their membership.
        """
        ...

    def find(self, task_id: TaskId) -> list[Located]:
        """Every place where the id stands (an id submitted twice stands twice).

        On Kafka, which has no index: every place above the committed positions, within bounds of time and number.
        """
        ...

    def put_aside(self, tasks: Sequence[Aside]) -> None:
        """Store durably, by (kind, id); storing again replaces."""
        ...

    def aside(self, kind: str, after: int, limit: int) -> list[tuple[int, Aside]]:
        """A page of what was put aside, each with its place; the next page is ``after`` the last place."""
        ...

    def find_aside(self, ids: Ids) -> list[Aside]: ...

    def drop_aside(self, tasks: Sequence[Aside]) -> None:
        """Forget these, each only as it was read: what was put aside since, under the same id, stays."""
        ...

    def retain(self, keep_ms: int, now_ms: int) -> int:
        """Delete what is below the committed positions and older than keep_ms; how many tasks that were."""
        ...

    def close(self) -> None: ...
