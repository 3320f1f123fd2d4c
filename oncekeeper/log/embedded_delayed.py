"""Delayed tasks of the embedded log: narrow rows (place, count, due time) beside the batches they point at.

A task's message stays where it was appended, and is neither copied nor moved; retention spares it while a row
points at it. So deferring costs some twenty bytes a row, whatever the message holds, and a row is a whole batch
where a batch waits together. By id a task is found as the log finds it. The rows themselves: delay_rows.py.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Protocol

from dedup.ids import TaskId
from oncekeeper.envelope import TaskBatch
from oncekeeper.log import delay_rows as rows_of
from oncekeeper.log.delay_rows import OFFSETS, SHIFT, Row
from oncekeeper.log.delayed import (
    WAYS,
    Deferral,
    Delayed,
    Place,
    after_in,
    counted,
    enqueued,
    gathered,
)
from oncekeeper.log.port import Appended, Fetched, Located, Undecodable


class LogFile(Protocol):
    """What of the log this module needs: its transactions and rows, and its ways to find, read and append."""

    def _write(self) -> AbstractContextManager[sqlite3.Connection]: ...

    def _snapshot(self) -> AbstractContextManager[None]: ...

    def _rows(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]: ...

    def batch_at(self, partition: int, offset: int, count: int) -> Fetched | Undecodable: ...

    def find(self, task_id: TaskId) -> list[Located]: ...

    def _append_to(
        self, database: sqlite3.Connection, batches: Sequence[tuple[int, TaskBatch]]
    ) -> list[Appended]: ...


class EmbeddedDelays:
    """DelayStore within the file of an embedded log."""

    def __init__(self, log: LogFile, clock_ms: Callable[[], int]) -> None:
        self._log = log
        self._clock_ms = clock_ms

    # --- writing --------------------------------------------------------------------------------------------

    def defer(self, tasks: Sequence[Deferral]) -> None:
        if not tasks:
            return
        rows = sorted(_row(task) for task in tasks)
        with self._log._write() as database:
            rows_of.insert(database, rows_of.not_standing(database, rows), self._clock_ms())

    def move(self, places: Sequence[Place], due_ms: int, was_ms: int | None = None) -> int:
        now_ms = self._clock_ms()
        with self._log._write() as database:
            moved = rows_of.carve(database, gathered(places), now_ms, was_ms)
            rows_of.insert(database, [(*row[:3], due_ms, row[4]) for row in moved], now_ms)
        return sum(row[1] for row in moved)

    def drop(self, places: Iterable[Place]) -> int:
        wanted = gathered(places)
        if not wanted:
            return 0
        with self._log._write() as database:
            dropped = rows_of.carve(database, wanted, self._clock_ms())
        return sum(row[1] for row in dropped)

    def enqueue(self, rows: Sequence[Delayed]) -> list[Appended]:
        if not rows:
            return []
        with self._log._write() as database:
            # Read within the transaction: nobody moves or drops them between this and the append.
            # What cannot be decoded stays: whoever fetches it gives it to dead letters.
            standing = [(row, item) for row, item in self.fetch(rows) if isinstance(item, Fetched)]
            again = [(row.partition, enqueued(item.batch, row.due_ms)) for row, item in standing]
            places = gathered(Place(row.partition, row.offset, row.count) for row, _ in standing)
            rows_of.carve(database, places, self._clock_ms())
            return self._log._append_to(database, again)

    def draw_near(self, partitions: Iterable[int], now_ms: int) -> int:
        """Upkeep: bring rows that are due in the next days into due order; how many that were."""
        drawn = 0
        for partition in rows_of.to_draw(self._log._rows, partitions, now_ms):
            for _ in range(rows_of.DRAW_STEPS):
                with self._log._write() as database:
                    step = rows_of.draw_near(database, partition, now_ms)
                drawn += step
                if step < rows_of.DRAW_ROWS:
                    break
        return drawn

    # --- reading --------------------------------------------------------------------------------------------

    def due(
        self, partitions: Iterable[int], until_ms: int, after: Delayed | None, limit: int
    ) -> list[Delayed]:
        found = []
        with self._log._snapshot():
            for partition in sorted(set(partitions)):
                due_ms, offset = after_in(partition, after)
                cursor = due_ms, (partition << SHIFT) + min(offset, OFFSETS)
                rows = rows_of.due(self._log._rows, partition, cursor, until_ms, limit)
                found.append(
                    [Delayed(at, partition, place & OFFSETS, n, WAYS[way]) for at, place, n, way in rows]
                )
        return list(islice(heapq.merge(*found), limit))

    def fetch(self, rows: Sequence[Delayed]) -> list[tuple[Delayed, Fetched | Undecodable]]:
        found: list[tuple[Delayed, Fetched | Undecodable]] = []
        for row in rows:
            start = row.partition << SHIFT | row.offset
            for place, count, partition, due_ms, way in self._overlapping(start, start + row.count):
                if due_ms != row.due_ms:
                    continue
                low, high = max(place, start), min(place + count, start + row.count)
                part = Delayed(due_ms, partition, low & OFFSETS, high - low, WAYS[way])
                found.append((part, self._log.batch_at(partition, part.offset, part.count)))
        return found

    def find(self, task_id: TaskId) -> list[Delayed]:
        found = []
        for located in self._log.find(task_id):
            place = located.partition << SHIFT | located.offset
            found += [
                Delayed(due_ms, partition, located.offset, 1, WAYS[way])
                for _, _, partition, due_ms, way in self._overlapping(place, place + 1)
            ]
        return sorted(found)

    def standing(self, place: Place) -> list[Delayed]:
        start = place.partition << SHIFT | place.offset
        end = start + place.count
        found = []
        for at, count, partition, due_ms, way in self._overlapping(start, end):
            low, high = max(at, start), min(at + count, end)
            found.append(Delayed(due_ms, partition, low & OFFSETS, high - low, WAYS[way]))
        return found

    def _overlapping(self, start: int, end: int) -> list[Row]:
        return rows_of.overlapping(self._log._rows, start, end)

    def counts(self) -> dict[int, int]:
        return counted(rows_of.counts(self._log._rows))


def _row(task: Deferral) -> Row:
    place = task.partition << SHIFT | task.offset
    return place, len(task.batch), task.partition, task.due_ms, WAYS.index(task.then)
