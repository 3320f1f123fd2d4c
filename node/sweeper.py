"""Bringing back what was put aside, once the ledger lets it run again.

A dead letter that somebody revives, and a held suspect that somebody rules "not executed", are free in the
ledger, but their place in the log was passed long ago. So they are appended again, under the same id, and only
then dropped from the aside store, as they were read: one that ran and died again in between was put aside anew,
and stays. A crash between the two appends them twice, which is harmless: one claim wins. A crash before the
first leaves them aside, and the next sweep finds them: nothing is lost whatever the moment. The ruling itself
needs no order with this; the ledger is the only judge of what may run.

One node sweeps at a time: the Raft leader, on every event that frees ids, and over all that lies aside when it
became leader and once a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dedup.ids import Ids, ids_of
from oncekeeper.envelope import TaskBatch, decode_task
from oncekeeper.errors import InvalidTask
from oncekeeper.log.port import Aside, TaskLog
from raft.commands import Outcome
from raft.ledger import Ledger

PAGE = 500


class Verdicts:
    """What to do with tasks that lie aside, by the ledger's word (pure)."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def split(self, tasks: Sequence[Aside]) -> tuple[list[Aside], list[Aside]]:
        """(to append again and drop, to drop). The rest stays where it is."""
        again: list[Aside] = []
        drop: list[Aside] = []
        for task in tasks:
            outcome = self._ledger.classify(ids_of([task.id]))[0].outcome
            if outcome in (Outcome.NEW, Outcome.EARLY):
                again.append(task)
            elif outcome is Outcome.EXECUTED or (task.kind == "suspect" and outcome is Outcome.DEAD):
                drop.append(task)
        return again, drop


def append_again(log: TaskLog, tasks: Sequence[Aside], on_appended: Callable[[set[int]], None]) -> None:
    """Runs in the log's thread. Append first, drop then: see above."""
    batches: list[TaskBatch] = []
    kept: list[Aside] = []
    for task in tasks:
        try:
            batches.append(decode_task(task.message))
        except InvalidTask:
            continue  # it could not be decoded when it came: reviving it cannot mend it, it stays aside
        kept.append(task)
    if batches:
        on_appended({place.partition for place in log.append(batches)})
    log.drop_aside(kept)


def aside_of(log: TaskLog, ids: Ids) -> list[Aside]:
    return log.find_aside(ids)


def all_aside(log: TaskLog, kind: str, after: int) -> list[tuple[int, Aside]]:
    return log.aside(kind, after, PAGE)
