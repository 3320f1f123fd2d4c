"""The durable work history of this node: which attempts ran here, and what the ledger decided beside.

The loop only appends to a list (O(1) a batch, whatever its length); one writer thread stores what has
gathered, at most every FLUSH_MS, in one transaction. Reads see the unwritten rows too: each row gets its
number when it is added, so a read takes the unwritten rows first and the file second, and a row that is met
twice is one row.

A crash of the node loses what was added in the last FLUSH_MS. Nothing rests on it: whether a task ran is the
ledger's to say.

Nothing is dropped. When the file cannot be written (disk full) the rows stay in memory and are tried again,
and once more than ``rows_max`` wait, ``add_*`` answers False: the node takes no new work until there is
``room``. What is already in flight is bounded by the node's window, and so is the list.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from dedup.ids import TaskId
from node.records_file import HistoryFile, HistoryUnusable
from node.records_model import (
    Attempt,
    Cursor,
    Ending,
    EventKind,
    Page,
    RecordedEvent,
    TaskFilter,
    recorded,
)

__all__ = [
    "Attempt",
    "Cursor",
    "Ending",
    "EventKind",
    "HistoryUnusable",
    "Page",
    "RecordedEvent",
    "Records",
    "RecordsLimits",
    "TaskFilter",
    "recorded",
]

FLUSH_MS = 100
RETRY_MS = 1000
PRUNE_MS = 60_000
_READERS_IDLE_MAX = 4

_log = logging.getLogger("oncekeeper.records")


class RecordsLimits(msgspec.Struct, frozen=True):
    keep_ms: int = 7 * 24 * 3600 * 1000
    bytes_max: int = 1 << 30
    rows_max: int = 20_000  # unwritten rows above which there is no room
    rows_flush: int = 2_000  # unwritten rows that are written without waiting for FLUSH_MS


class Records:
    """``add_*`` from one thread (the loop); everything else from any thread."""

    def __init__(
        self,
        path: Path,
        limits: RecordsLimits,
        clock_ms: Callable[[], int],
        on_change: Callable[[], None] | None,
    ) -> None:
        self._path = path
        self._limits = limits
        self._clock_ms = clock_ms
        self._on_change = on_change
        self._file = HistoryFile(path)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._written = threading.Condition(self._lock)
        self._attempts: list[tuple[int, Attempt]] = []
        self._events: list[tuple[int, RecordedEvent]] = []
        self._row = self._file.rows_next()
        self._hurry = False
        self._closing = False
        self._trouble: str | None = None
        self._readers: list[HistoryFile] = []
        self._pruned_ms = 0
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        path: Path,
        limits: RecordsLimits | None = None,
        *,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        on_change: Callable[[], None] | None = None,
    ) -> Records:
        """Raises HistoryUnusable.

        ``on_change`` is called from the writer thread when ``trouble`` or ``room`` changes.
        """
        return cls(path, limits or RecordsLimits(), clock_ms, on_change)

    # --- adding --------------------------------------------------------------------------------------------

    def add_attempts(self, attempts: Iterable[Attempt]) -> bool:
        """Takes them in any case; False: take no new work until ``room``."""
        with self._lock:
            row = self._row
            for attempt in attempts:
                self._attempts.append((row, attempt))
                row += 1
            return self._added(row)

    def add_events(self, events: Iterable[RecordedEvent]) -> bool:
        """As add_attempts.

        All events of an index belong into one call; known (index, number) are left out.
        """
        with self._lock:
            row = self._row
            for event in events:
                self._events.append((row, event))
                row += 1
            return self._added(row)

    def _added(self, row: int) -> bool:
        waiting = len(self._attempts) + len(self._events)
        if row != self._row:
            # The writer sleeps without a deadline while there is nothing to write, so that a node at rest is
            # at rest.
            first = waiting == row - self._row
            self._row = row
            if waiting >= self._limits.rows_flush and not self._hurry:
                self._hurry = first = True
            if first:
                self._work.notify()
        return waiting < self._limits.rows_max

    @property
    def room(self) -> bool:
        return self.unwritten < self._limits.rows_max

    @property
    def unwritten(self) -> int:
        return len(self._attempts) + len(self._events)

    @property
    def trouble(self) -> str | None:
        """Why the file cannot be written now; None when all is well."""
        return self._trouble

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until what was added before is in the file; False if it is not by then."""
        with self._lock:
            goal = self._row
            self._hurry = True
            self._work.notify()
            return self._written.wait_for(lambda: self._lowest() >= goal, timeout_s)

    def close(self, timeout_s: float = 10.0) -> int:
        """Write what is left and stop; how many rows could not be written."""
        with self._lock:
            self._closing = True
            self._work.notify()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._file.close()
        with self._lock:
            readers, self._readers = self._readers, []
        for reader in readers:
            reader.close()
        return self.unwritten

    def _lowest(self) -> int:
        """The lowest unwritten row, or the next one. Both lists ascend."""
        firsts = [rows[0][0] for rows in (self._attempts, self._events) if rows]
        return min(firsts, default=self._row)

    # --- the writer thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                self._work.wait_for(lambda: self.unwritten or self._closing)
                if not self._closing and not self._hurry:
                    # Gather: one transaction for what comes in the meantime.
                    self._work.wait_for(lambda: self._hurry or self._closing, FLUSH_MS / 1000)
                self._hurry = False
                attempts, events = self._attempts[:], self._events[:]
                closing = self._closing
            if not attempts and not events:
                if closing:
                    return
                continue
            if not self._write(attempts, events):
                if closing:
                    return
                with self._lock:
                    self._work.wait_for(lambda: self._closing, RETRY_MS / 1000)
                continue
            self._prune()

    def _write(
        self, attempts: Sequence[tuple[int, Attempt]], events: Sequence[tuple[int, RecordedEvent]]
    ) -> bool:
        trouble: str | None = None
        try:
            self._file.write(attempts, events)
        except sqlite3.Error as error:
            trouble = f"{self._path} cannot be written: {error}"
        with self._lock:
            was_full = not self.room
            if trouble is None:
                # Only now do they leave memory: until the file has them, a read must find them here.
                del self._attempts[: len(attempts)]
                del self._events[: len(events)]
                self._written.notify_all()
            changed = trouble != self._trouble or (was_full and self.room)
            if trouble is not None and trouble != self._trouble:
                _log.error("%s; %d rows wait in memory and are tried again", trouble, self.unwritten)
            self._trouble = trouble
        if changed and self._on_change is not None:
            try:
                self._on_change()
            except RuntimeError as error:
                # The loop that wanted to know is closed. Writing goes on: what is left must reach the file.
                _log.warning("nobody hears that the history's state changed: %s", error)
        return trouble is None

    def _prune(self) -> None:
        now = self._clock_ms()
        if now - self._pruned_ms < PRUNE_MS:
            return
        self._pruned_ms = now
        try:
            # A bounded piece at a time, so that a flush never waits long behind it.
            for _ in range(20):
                if self._hurry or not self._file.prune(now - self._limits.keep_ms, self._limits.bytes_max):
                    return
            self._pruned_ms = 0  # there is more to forget: go on after the next flush
        except sqlite3.Error as error:
            # Space comes back a minute later, or never; either way the writing of rows reports its own
            # trouble.
            _log.warning("%s cannot be pruned: %s", self._path, error)

    # --- reading -------------------------------------------------------------------------------------------

    def attempts(self, task_id: TaskId) -> list[Attempt]:
        """Every attempt of the task that ran here, oldest first, each narrowed to this one id."""
        found: dict[int, Attempt] = {}
        fresh, _ = self._unwritten_rows()
        with self._reader() as file:
            rows = file.attempts(task_id) | dict(fresh)
        for row, attempt in rows.items():
            one = attempt.of(task_id)
            if one is not None:
                found[row] = one
        return [found[row] for row in sorted(found)]

    def events(self, task_id: TaskId) -> list[RecordedEvent]:
        """What the ledger decided about the task, in its order, each narrowed to this one id."""
        found: dict[tuple[int, int], RecordedEvent] = {}
        _, fresh = self._unwritten_rows()
        with self._reader() as file:
            rows = file.events(task_id) | dict(fresh)
        for event in rows.values():
            one = event.of(task_id)
            if one is not None:
                # The stored one wins over one applied again after a restart: its time is the true one.
                found.setdefault((event.index, event.number), one)
        return [found[place] for place in sorted(found)]

    def search(self, wanted: TaskFilter, limit: int, after: str | None = None) -> Page:
        """Single tasks whose attempt here matches, newest first. ValueError for a bad ``after``."""
        cursor = Cursor.parse(after) if after else None
        fresh, _ = self._unwritten_rows()
        found: list[Attempt] = []
        places: list[str] = []
        for row, attempt in self._matching(wanted, cursor, fresh):
            place = cursor.place + 1 if cursor is not None and cursor.row == row else 0
            for at in range(place, len(attempt.ids)):
                if len(found) == limit:
                    return Page(tuple(found), tuple(places), places[-1] if places else after)
                found.append(attempt.at(at))
                places.append(Cursor(row, at).text())
        return Page(tuple(found), tuple(places), None)

    def cancelled(self, limit: int) -> list[RecordedEvent]:
        """The newest cancellations that this node has seen, newest first."""
        _, fresh = self._unwritten_rows()
        with self._reader() as file:
            rows = file.events_of(EventKind.CANCELLED, None, limit)
        rows |= {row: event for row, event in fresh if event.kind is EventKind.CANCELLED}
        return [rows[row] for row in sorted(rows, reverse=True)[:limit]]

    def _matching(
        self, wanted: TaskFilter, cursor: Cursor | None, fresh: list[tuple[int, Attempt]]
    ) -> Iterator[tuple[int, Attempt]]:
        known = {row for row, _ in fresh}
        for row, attempt in reversed(fresh):
            if (cursor is None or row <= cursor.row) and wanted.matches(attempt):
                yield row, attempt
        with self._reader() as file:
            for row, attempt in file.search(wanted, cursor):
                if row not in known:
                    yield row, attempt

    def _unwritten_rows(self) -> tuple[list[tuple[int, Attempt]], list[tuple[int, RecordedEvent]]]:
        """Before the file is read, not after: a row that is written in between would be in neither."""
        with self._lock:
            return self._attempts[:], self._events[:]

    @contextmanager
    def _reader(self) -> Iterator[HistoryFile]:
        """A connection for one read, so that a long search delays nobody."""
        with self._lock:
            file = self._readers.pop() if self._readers else None
        if file is None:
            file = HistoryFile(self._path)
        try:
            yield file
        finally:
            with self._lock:
                keep = len(self._readers) < _READERS_IDLE_MAX and not self._closing
                if keep:
                    self._readers.append(file)
            if not keep:
                file.close()
