"""Delayed tasks of the embedded log: narrow rows (place, count, due time) beside the batches they point at.

A task's message stays where it was appended, and is neither copied nor moved; retention spares it while a row
points at it. So deferring costs some twenty bytes a row, whatever the message holds, and a row is a whole batch
where a batch waits together. By id a task is found as the log finds it.

``delayed_by_due`` is ordered by (partition, due time, place): each owner reads its own partitions in due order.
Due times of a large backlog fall all over that index, and a transaction writes each page that it touches to the
WAL: fewer, larger transactions are what makes it fast (a page of hundreds of entries is written once for all).
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Protocol

from dedup.ids import TaskId
from oncekeeper.envelope import BATCH_TASKS_MAX, TaskBatch
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

SCHEMA = """
CREATE TABLE delayed (
    place INTEGER PRIMARY KEY,     -- partition << 44 | offset of the first task
    count INTEGER NOT NULL,
    partition INTEGER NOT NULL,
    due_ms INTEGER NOT NULL,       -- epoch
    way INTEGER NOT NULL           -- what happens then: 0 run, 1 enqueue
);
CREATE INDEX delayed_by_due ON delayed (partition, due_ms);
CREATE TABLE delayed_counts (partition INTEGER PRIMARY KEY, tasks INTEGER NOT NULL);
"""

_SHIFT = 44
_OFFSETS = (1 << _SHIFT) - 1
_NEAR = 4 * BATCH_TASKS_MAX
_INSERT = "INSERT INTO delayed VALUES (?, ?, ?, ?, ?)"
_OVERLAPPING = (
    "SELECT place, count, partition, due_ms, way FROM delayed WHERE place >= coalesce("
    "  (SELECT max(place) FROM delayed WHERE place <= ?1), ?1) AND place < ?2 ORDER BY place"
)
_Row = tuple[int, int, int, int, int]


class LogFile(Protocol):
    """What of the log this module needs: its transactions and rows, and its ways to find, read and append."""

    def _write(self) -> AbstractContextManager[sqlite3.Connection]: ...

    def _rows(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]: ...

    def batch_at(self, partition: int, offset: int, count: int) -> Fetched | Undecodable: ...

    def find(self, task_id: TaskId) -> list[Located]: ...

    def _append_to(
        self, database: sqlite3.Connection, batches: Sequence[tuple[int, TaskBatch]]
    ) -> list[Appended]: ...


class EmbeddedDelays:
    """DelayStore within the file of an embedded log."""

    def __init__(self, log: LogFile) -> None:
        self._log = log

    # --- writing --------------------------------------------------------------------------------------------

    def defer(self, tasks: Sequence[Deferral]) -> None:
        if not tasks:
            return
        rows = sorted(_row(task) for task in tasks)
        with self._log._write() as database:
            rows = _not_standing(database, rows)
            database.executemany(_INSERT, rows)
            _count(database, rows, 1)

    def move(self, places: Sequence[Place], due_ms: int, was_ms: int | None = None) -> int:
        with self._log._write() as database:
            moved = _carve(database, gathered(places), was_ms)
            database.executemany(_INSERT, [(*row[:3], due_ms, row[4]) for row in moved])
            _count(database, moved, 1)
        return sum(row[1] for row in moved)

    def drop(self, places: Iterable[Place]) -> int:
        wanted = gathered(places)
        if not wanted:
            return 0
        with self._log._write() as database:
            dropped = _carve(database, wanted)
        return sum(row[1] for row in dropped)

    def enqueue(self, rows: Sequence[Delayed]) -> list[Appended]:
        if not rows:
            return []
        with self._log._write() as database:
            # Read within the transaction: nobody moves or drops them between this and the append.
            # What cannot be decoded stays: whoever fetches it gives it to dead letters.
            standing = [(row, item) for row, item in self.fetch(rows) if isinstance(item, Fetched)]
            again = [(row.partition, enqueued(item.batch)) for row, item in standing]
            _carve(database, gathered(Place(row.partition, row.offset, row.count) for row, _ in standing))
            return self._log._append_to(database, again)

    # --- reading --------------------------------------------------------------------------------------------

    def due(
        self, partitions: Iterable[int], until_ms: int, after: Delayed | None, limit: int
    ) -> list[Delayed]:
        found = []
        for partition in sorted(set(partitions)):
            due_ms, offset = after_in(partition, after)
            rows = self._log._rows(
                "SELECT due_ms, place, count, way FROM delayed INDEXED BY delayed_by_due"
                " WHERE partition = ?1 AND due_ms >= ?2 AND due_ms <= ?4 AND (due_ms, place) > (?2, ?3)"
                " ORDER BY due_ms, place LIMIT ?5",
                (partition, due_ms, (partition << _SHIFT) + min(offset, _OFFSETS), until_ms, limit),
            )
            found.append([Delayed(due, partition, at & _OFFSETS, n, WAYS[way]) for due, at, n, way in rows])
        return list(islice(heapq.merge(*found), limit))

    def fetch(self, rows: Sequence[Delayed]) -> list[tuple[Delayed, Fetched | Undecodable]]:
        found: list[tuple[Delayed, Fetched | Undecodable]] = []
        for row in rows:
            start = row.partition << _SHIFT | row.offset
            for place, count, partition, due_ms, way in self._overlapping(start, start + row.count):
                if due_ms != row.due_ms:
                    continue
                low, high = max(place, start), min(place + count, start + row.count)
                part = Delayed(due_ms, partition, low & _OFFSETS, high - low, WAYS[way])
                found.append((part, self._log.batch_at(partition, part.offset, part.count)))
        return found

    def find(self, task_id: TaskId) -> list[Delayed]:
        found = []
        for located in self._log.find(task_id):
            place = located.partition << _SHIFT | located.offset
            found += [
                Delayed(due_ms, partition, located.offset, 1, WAYS[way])
                for _, _, partition, due_ms, way in self._overlapping(place, place + 1)
            ]
        return sorted(found)

    def _overlapping(self, start: int, end: int) -> list[_Row]:
        rows = self._log._rows(_OVERLAPPING, (start, end))
        return [row for row in rows if row[0] + row[1] > start]

    def counts(self) -> dict[int, int]:
        return counted(dict(self._log._rows("SELECT partition, tasks FROM delayed_counts", ())))


def _row(task: Deferral) -> _Row:
    place = task.partition << _SHIFT | task.offset
    return place, len(task.batch), task.partition, task.due_ms, WAYS.index(task.then)


def _overlaps(database: sqlite3.Connection, start: int, end: int) -> list[_Row]:
    rows: list[_Row] = database.execute(_OVERLAPPING, (start, end)).fetchall()
    return [row for row in rows if row[0] + row[1] > start]


def _not_standing(database: sqlite3.Connection, rows: list[_Row]) -> list[_Row]:
    """The parts of these rows (in order) at whose places nothing waits yet, nor an earlier one of them."""
    free: list[_Row] = []
    for near in _clusters(rows):
        taken = _overlaps(database, near[0][0], max(row[0] + row[1] for row in near))
        at = free_from = 0
        for place, count, *rest in near:
            end = place + count
            place = max(place, free_from)
            while at < len(taken) and taken[at][0] < end:
                if taken[at][0] > place:
                    free.append((place, taken[at][0] - place, *rest))  # type: ignore[arg-type]
                place = max(place, taken[at][0] + taken[at][1])
                if place > end:
                    break  # it reaches into the next one's places
                at += 1
            if place < end:
                free.append((place, end - place, *rest))  # type: ignore[arg-type]
            free_from = max(free_from, place, end)
    return free


def _clusters(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Rows near to one another, so that asking what stands among them reads little else."""
    near: list[_Row] = []
    for row in rows:
        if near and row[0] - near[-1][0] > _NEAR:
            yield near
            near = []
        near.append(row)
    if near:
        yield near


def _carve(database: sqlite3.Connection, places: Sequence[Place], was_ms: int | None = None) -> list[_Row]:
    """Take what waits at these places (apart, in order) out of its rows; the parts that were taken out.

    With ``was_ms`` only what waits for that time.
    """
    taken: list[_Row] = []
    gone: list[tuple[int]] = []
    for wanted in places:
        start = wanted.partition << _SHIFT | wanted.offset
        end = start + wanted.count
        for place, count, partition, due_ms, way in _overlaps(database, start, end):
            if was_ms not in (None, due_ms):
                continue
            low, high = max(place, start), min(place + count, end)
            taken.append((low, high - low, partition, due_ms, way))
            if (low, high) == (place, place + count):
                gone.append((place,))
                continue
            # Rewritten at once, so that the next place sees what is left of a row that it shares.
            database.execute("DELETE FROM delayed WHERE place = ?", (place,))
            ends = ((place, low - place), (high, place + count - high))
            database.executemany(_INSERT, [(at, n, partition, due_ms, way) for at, n in ends if n])
    database.executemany("DELETE FROM delayed WHERE place = ?", gone)
    _count(database, taken, -1)
    return taken


def _count(database: sqlite3.Connection, rows: Iterable[_Row], sign: int) -> None:
    tasks: dict[int, int] = {}
    for _, count, partition, _, _ in rows:
        tasks[partition] = tasks.get(partition, 0) + sign * count
    database.executemany(
        "INSERT INTO delayed_counts VALUES (?, ?) ON CONFLICT (partition)"
        " DO UPDATE SET tasks = tasks + excluded.tasks",
        list(tasks.items()),
    )
