"""What the embedded log forgets: rows below the committed position that are old, and hold nothing delayed.

A year's delayed tasks lie below the position, and a sweep that passed over all of them each time would read
millions of rows to delete a few. So a sweep stops after ``SPARED_MAX`` of them, and the next one goes on there.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from oncekeeper.envelope import decode_batch
from oncekeeper.errors import InvalidTask

ROWS = 200  # looked at, and deleted, in one transaction
SPARED_MAX = 10_000

_SHIFT = 44
_LOOK = (
    "SELECT place, count, first_id, stored_ms,"
    "  EXISTS (SELECT 1 FROM delayed d WHERE d.place >= b.place AND d.place < b.place + b.count)"
    f" FROM batches b WHERE place >= ? AND place < ? ORDER BY place LIMIT {ROWS}"
)
_Row = tuple[int, int, int | None, int, int]


class Retention:
    def __init__(
        self,
        write: Callable[[], AbstractContextManager[sqlite3.Connection]],
        rows: Callable[[str, Sequence[object]], list[tuple[Any, ...]]],
    ) -> None:
        self._write = write
        self._rows = rows
        self._next: dict[int, int] = {}  # where the next sweep of a partition goes on

    def sweep(self, partition: int, committed: int, before_ms: int) -> int:
        """Delete what may go of a partition; how many tasks that were."""
        low = partition << _SHIFT
        end = low + committed
        at = self._next.pop(partition, low)
        deleted = spared = 0
        while True:
            # Looked at without the lock first: often there is nothing to delete, and others write.
            rows = _old(self._rows(_LOOK, (at, end)), end, before_ms)
            if any(not delayed for *_, delayed in rows):
                deleted += self._delete(at, end, before_ms)
            spared += sum(delayed for *_, delayed in rows)
            if len(rows) < ROWS:
                return deleted
            at = rows[-1][0] + rows[-1][1]
            if spared >= SPARED_MAX:
                self._next[partition] = at
                return deleted

    def _delete(self, at: int, end: int, before_ms: int) -> int:
        with self._write() as database:
            # Looked at again, under the lock: something may have been deferred meanwhile.
            old = _old(database.execute(_LOOK, (at, end)).fetchall(), end, before_ms)
            gone = [row for row in old if not row[4]]
            for place, _, first_id, _, _ in gone:
                if first_id is None:
                    _forget_keys(database, place)
            database.executemany("DELETE FROM batches WHERE place = ?", [row[:1] for row in gone])
        return sum(row[1] for row in gone)


def _old(rows: list[tuple[Any, ...]], end: int, before_ms: int) -> list[_Row]:
    """The first rows, up to the first that is too young or not wholly passed."""
    for at, (place, count, _, stored_ms, _) in enumerate(rows):
        if place + count > end or stored_ms > before_ms:
            return rows[:at]
    return rows


def _forget_keys(database: sqlite3.Connection, place: int) -> None:
    (message,) = database.execute("SELECT message FROM batches WHERE place = ?", (place,)).fetchone()
    try:
        keys = decode_batch(message).ids.keys
    except InvalidTask:
        return  # no key of it can be known; an entry that leads nowhere is passed over by find
    database.executemany(
        "DELETE FROM keys WHERE key = ? AND place = ?", [(key, place + at) for at, key in enumerate(keys)]
    )
