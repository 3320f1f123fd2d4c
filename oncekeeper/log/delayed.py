"""Tasks that were read and are not due: where they wait, so that the position of their partition may pass them.

A task is named here by its *place*, the (partition, offset) at which it was read, and waits in *rows* of
neighbouring places with one due time: what was submitted together waits together. A row never overlaps another.

    read, not due --defer--> waits --due, fetch--> run --settled--> drop
                                   --enqueue-----> appended anew, and no longer here
                                   --move--------> waits for another time (a reschedule, a retry)

``defer`` is durable when it returns, and only then may the position pass. Everything can be repeated after a
crash: what is deferred twice stands once, what is dropped twice is gone. What still stands after it ran (a crash
before ``drop``) falls due again at once, and the ledger says that it was executed. The ledger is the only judge
of what runs; a store only remembers what to ask about, and when.

A store belongs to the log: what a partition's owner deferred, its next owner finds, with nothing handed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from dedup.ids import TaskId
from oncekeeper.envelope import ENQUEUED, THENS, TaskBatch
from oncekeeper.log.port import Appended, Fetched, Undecodable

WAYS = THENS
RUN, ENQUEUE = WAYS
"""What happens when a task is due: it runs at once on the node that holds it, or takes its turn in its queue."""


class Deferral(msgspec.Struct, frozen=True):
    """Tasks to be kept until ``due_ms`` (epoch): those at offset .. offset + len(batch) - 1 of a partition."""

    partition: int
    offset: int
    due_ms: int  # the batch's own, or the time of a retry
    then: str  # RUN or ENQUEUE
    batch: TaskBatch


class Delayed(msgspec.Struct, frozen=True, order=True, gc=False):
    """A row, or a part of one. Their order is the due order, and the last of a page is the cursor of the next."""

    due_ms: int
    partition: int
    offset: int
    count: int = 1
    then: str = RUN

    @property
    def end(self) -> int:
        return self.offset + self.count


class Place(msgspec.Struct, frozen=True, gc=False):
    """``count`` tasks from ``offset`` on, whatever rows they are in."""

    partition: int
    offset: int
    count: int = 1


class DelayReads(Protocol):
    """What can be asked of delayed tasks. Raises LogUnusable."""

    def due(
        self, partitions: Iterable[int], until_ms: int, after: Delayed | None, limit: int
    ) -> list[Delayed]:
        """Rows due at or before ``until_ms``, in due order, the first ``limit`` after the cursor."""
        ...

    def fetch(self, rows: Sequence[Delayed]) -> list[tuple[Delayed, Fetched | Undecodable]]:
        """What still waits of these rows for the time that they name, in as many parts as it stands in; what was
        dropped since, or moved to another time, is left out."""
        ...

    def find(self, task_id: TaskId) -> list[Delayed]:
        """Where the id waits, each as a row of one."""
        ...

    def standing(self, place: Place) -> list[Delayed]:
        """What waits at these places, whatever time it waits for; in their order."""
        ...

    def counts(self) -> dict[int, int]:
        """How many tasks wait in each partition that has any."""
        ...


@runtime_checkable
class DelayStore(DelayReads, Protocol):
    """Writes are durable when they return, all or none. They raise Unsent or UnknownAppend, as the log's do.

    A log that can keep delayed tasks shows its store as ``log.delays`` (``delays_of``); the same thread rules hold
    for both.
    """

    def defer(self, tasks: Sequence[Deferral]) -> None:
        """Keep tasks. A place that waits already stays as it is: it was read again after a crash, and may have
        been moved since."""
        ...

    def move(self, places: Sequence[Place], due_ms: int, was_ms: int | None = None) -> int:
        """Let what waits at these places wait for ``due_ms`` instead; how many tasks that were. With ``was_ms``
        only what waits for that time: somebody may have moved it meanwhile."""
        ...

    def drop(self, places: Iterable[Place]) -> int:
        """Forget what waits at these places; how many tasks that were."""
        ...

    def enqueue(self, rows: Sequence[Delayed]) -> list[Appended]:
        """Append what ``fetch`` would give of these rows to their partitions anew, and drop it: both or neither, or
        else the append first, so that a crash between leaves a task twice and one claim wins."""
        ...


def delays_of(log: object) -> DelayStore | None:
    """The store of a log, or of what stands for one; None: it keeps no delayed tasks, and nodes let them wait in
    memory."""
    store: DelayStore | None = getattr(log, "delays", None)
    return store


def store_of(log: object) -> DelayStore:
    """The store of a log that is known to have one."""
    store = delays_of(log)
    if store is None:
        raise TypeError(f"{type(log).__name__} keeps no delayed tasks")
    return store


def enqueued(batch: TaskBatch, due_ms: int = 0) -> TaskBatch:
    """What is appended when these tasks are due: they tell by which time that was (0: by the message's own), and
    wait for it no more."""
    return msgspec.structs.replace(batch, then=ENQUEUED, due_ms=due_ms or batch.due_ms)


def gathered(places: Iterable[Place]) -> list[Place]:
    """The same places in order, each once, neighbours joined."""
    joined: list[Place] = []
    for place in sorted(places, key=lambda place: (place.partition, place.offset)):
        if joined and joined[-1].partition == place.partition:
            last = joined[-1]
            end = last.offset + last.count
            if place.offset <= end:
                joined[-1] = Place(
                    last.partition, last.offset, max(end, place.offset + place.count) - last.offset
                )
                continue
        joined.append(place)
    return joined


def after_in(partition: int, after: Delayed | None) -> tuple[int, int]:
    """(due_ms, offset) after which a partition's own rows follow a cursor that may stand in another partition."""
    if after is None:
        return -1, -1
    if partition < after.partition:
        return after.due_ms, 1 << 62
    return after.due_ms, after.offset if partition == after.partition else -1


def counted(tasks: Mapping[int, int]) -> dict[int, int]:
    return {partition: count for partition, count in sorted(tasks.items()) if count}
