"""The rows of delayed tasks in an SQLite file, and the statements that keep them; for any log with such a file.

A row is a batch that waits together: (place, count, partition, due time, way), and rows never overlap. By place
they lie in the order in which they were appended; by due time each owner wants its own partitions in order.

An index by due time over all rows would be ruined by its own size: due times of a year fall all over it, and a
transaction writes each page that it touches, so that with 10^7 rows each new one costs a page. So only rows that
are *near* are in it, and those that are *far* are merely sorted into spans of some three days, each of which a new
row is appended to: a few hundred pages, whatever waits. ``draw_near`` moves the rows of the next spans into the
index in small steps, days before they are due (the levels of a hierarchical timing wheel, Varghese and Lauck
1987, on disk). Whether a row is near is said by the row itself, and a reader looks at both: a clock that is wrong
or an upkeep that is late costs time, and nothing else.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from oncekeeper.envelope import BATCH_TASKS_MAX
from oncekeeper.log.delayed import Place

SHIFT = 44
"""A place is ``partition << SHIFT | offset``."""
OFFSETS = (1 << SHIFT) - 1
SPAN_SHIFT = 28
"""A span is 2**28 ms: 3.1 days."""
SPANS_NEAR = 1
"""How many spans after the present one are near."""
DRAW_ROWS, DRAW_STEPS = 2_000, 10
"""Of a transaction of ``draw_near``, and how many of them at most in one upkeep."""

SCHEMA = """
CREATE TABLE delayed (
    place INTEGER PRIMARY KEY,     -- partition << 44 | offset of the first task
    count INTEGER NOT NULL,
    partition INTEGER NOT NULL,
    due_ms INTEGER NOT NULL,       -- epoch
    way INTEGER NOT NULL,          -- what happens then: 0 run, 1 enqueue
    span INTEGER                   -- of the due time, if it is far off; NULL: it is in delayed_by_due
);
CREATE INDEX delayed_by_due ON delayed (partition, due_ms) WHERE span IS NULL;
CREATE INDEX delayed_by_span ON delayed (partition, span) WHERE span IS NOT NULL;
CREATE TABLE delayed_counts (partition INTEGER PRIMARY KEY, tasks INTEGER NOT NULL);
"""
UPGRADE = """
ALTER TABLE delayed ADD COLUMN span INTEGER;
DROP INDEX delayed_by_due;
CREATE INDEX delayed_by_due ON delayed (partition, due_ms) WHERE span IS NULL;
CREATE INDEX delayed_by_span ON delayed (partition, span) WHERE span IS NOT NULL;
"""
"""From a table that has no spans: all of its rows are near."""

Row = tuple[int, int, int, int, int]
"""place, count, partition, due_ms, way."""
Ask = Callable[[str, Sequence[object]], list[tuple[Any, ...]]]

_NEIGHBOURS = 4 * BATCH_TASKS_MAX
_INSERT = "INSERT INTO delayed VALUES (?, ?, ?, ?, ?, ?)"
_OVERLAPPING = (
    "SELECT place, count, partition, due_ms, way FROM delayed WHERE place >= coalesce("
    "  (SELECT max(place) FROM delayed WHERE place <= ?1), ?1) AND place < ?2 ORDER BY place"
)
_AFTER = "(due_ms, place) > (?2, ?3) AND due_ms <= ?4 ORDER BY due_ms, place LIMIT ?5"
_NEAR = (
    "SELECT due_ms, place, count, way FROM delayed INDEXED BY delayed_by_due"
    f" WHERE partition = ?1 AND span IS NULL AND due_ms >= ?2 AND {_AFTER}"
)
_FAR = (
    "SELECT due_ms, place, count, way FROM delayed INDEXED BY delayed_by_span"
    f" WHERE partition = ?1 AND span = ?6 AND {_AFTER}"
)
_NEXT_SPAN = "SELECT min(span) FROM delayed INDEXED BY delayed_by_span WHERE partition = ? AND span >= ?"
_DRAW = (
    "UPDATE delayed SET span = NULL WHERE place IN (SELECT place FROM delayed INDEXED BY delayed_by_span"
    " WHERE partition = ? AND span <= ? ORDER BY span, place LIMIT ?)"
)


def overlapping(ask: Ask, start: int, end: int) -> list[Row]:
    """Rows of which a task lies at start .. end - 1, in order."""
    return [(*row[:5],) for row in ask(_OVERLAPPING, (start, end)) if row[0] + row[1] > start]


def due(
    ask: Ask, partition: int, after: tuple[int, int], until_ms: int, limit: int
) -> list[tuple[int, int, int, int]]:
    """(due_ms, place, count, way) of the first rows behind the cursor (due_ms, place), in this order.

    All that it asks must see one snapshot: a row that is drawn near meanwhile would be seen nowhere.
    """
    cursor = (partition, *after, until_ms, limit)
    found = ask(_NEAR, cursor)
    if len(found) == limit:
        until_ms = found[-1][0]
    far: list[tuple[Any, ...]] = []
    span = after[0] >> SPAN_SHIFT
    while len(far) < limit:
        ((span,),) = ask(_NEXT_SPAN, (partition, span))
        if span is None or span > until_ms >> SPAN_SHIFT:
            break
        far += ask(_FAR, (*cursor[:3], until_ms, limit - len(far), span))
        span += 1
    return sorted((*found, *far))[:limit] if far else found


def insert(database: sqlite3.Connection, rows: Sequence[Row], now_ms: int) -> None:
    _put(database, rows, now_ms)
    _count(database, rows, 1)


def not_standing(database: sqlite3.Connection, rows: Sequence[Row]) -> list[Row]:
    """The parts of these rows (in order) at whose places nothing waits yet, nor an earlier one of them."""
    free: list[Row] = []
    for near in _clusters(rows):
        taken = overlapping(_asking(database), near[0][0], max(row[0] + row[1] for row in near))
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


def _clusters(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows near to one another, so that asking what stands among them reads little else."""
    near: list[Row] = []
    for row in rows:
        if near and row[0] - near[-1][0] > _NEIGHBOURS:
            yield near
            near = []
        near.append(row)
    if near:
        yield near


def carve(
    database: sqlite3.Connection, places: Sequence[Place], now_ms: int, was_ms: int | None = None
) -> list[Row]:
    """Take what waits at these places (apart, in order) out of its rows; the parts that were taken out.

    With ``was_ms`` only what waits for that time.
    """
    taken: list[Row] = []
    gone: list[tuple[int]] = []
    for wanted in places:
        start = wanted.partition << SHIFT | wanted.offset
        end = start + wanted.count
        for place, count, partition, due_ms, way in overlapping(_asking(database), start, end):
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
            _put(database, [(at, n, partition, due_ms, way) for at, n in ends if n], now_ms)
    database.executemany("DELETE FROM delayed WHERE place = ?", gone)
    _count(database, taken, -1)
    return taken


def draw_near(database: sqlite3.Connection, partition: int, now_ms: int) -> int:
    """Move the first DRAW_ROWS rows of a partition that are near by now, and were far, into the index."""
    return database.execute(_DRAW, (partition, _near_until(now_ms), DRAW_ROWS)).rowcount


def to_draw(ask: Ask, partitions: Iterable[int], now_ms: int) -> list[int]:
    """Of which of these partitions rows are to be drawn near."""
    return [
        partition
        for partition in partitions
        for ((span,),) in (ask(_NEXT_SPAN, (partition, -1)),)
        if span is not None and span <= _near_until(now_ms)
    ]


def counts(ask: Ask) -> dict[int, int]:
    return dict(ask("SELECT partition, tasks FROM delayed_counts", ()))


def _near_until(now_ms: int) -> int:
    return (now_ms >> SPAN_SHIFT) + SPANS_NEAR


def _put(database: sqlite3.Connection, rows: Iterable[Row], now_ms: int) -> None:
    near = _near_until(now_ms)
    spans = ((row, row[3] >> SPAN_SHIFT) for row in rows)
    database.executemany(_INSERT, [(*row, None if span <= near else span) for row, span in spans])


def _asking(database: sqlite3.Connection) -> Ask:
    return lambda statement, values: database.execute(statement, values).fetchall()


def _count(database: sqlite3.Connection, rows: Iterable[Row], sign: int) -> None:
    tasks: dict[int, int] = {}
    for _, count, partition, _, _ in rows:
        tasks[partition] = tasks.get(partition, 0) + sign * count
    database.executemany(
        "INSERT INTO delayed_counts VALUES (?, ?) ON CONFLICT (partition)"
        " DO UPDATE SET tasks = tasks + excluded.tasks",
        list(tasks.items()),
    )
