"""The history file: one SQLite database a node (WAL), a row for each run of tasks that ended alike.

Which rows concern an id is answered by two small tables a kind of row: ``*_runs`` (first, count) for range
ids and ``*_keys`` for keyed ids. No stored run is longer than RUN_MAX, so the rows that cover an id start
within RUN_MAX below it: one short range scan of an index, however the runs overlap.

Not safe for threads: ``HistoryFile`` is one connection. records.py keeps one to write and one to read.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from dedup.ids import Ids, TaskId
from node.records_model import Attempt, Cursor, Ending, EventKind, RecordedEvent, TaskFilter

FORMAT = 1
RUN_MAX = 4096

_SCHEMA = """
CREATE TABLE attempts (
    row INTEGER PRIMARY KEY, ids BLOB NOT NULL, queue TEXT NOT NULL, handler TEXT NOT NULL,
    node TEXT NOT NULL, fence INTEGER NOT NULL, attempt INTEGER NOT NULL, claimed_ms INTEGER NOT NULL,
    started_ms INTEGER NOT NULL, ended_ms INTEGER NOT NULL, ending INTEGER NOT NULL, results BLOB,
    error TEXT NOT NULL, trace TEXT NOT NULL, traceparent TEXT NOT NULL
);
CREATE INDEX attempts_by_ending ON attempts (ending);
CREATE TABLE events (
    row INTEGER PRIMARY KEY, idx INTEGER NOT NULL, number INTEGER NOT NULL, kind INTEGER NOT NULL,
    ids BLOB NOT NULL, at_ms INTEGER NOT NULL, fence INTEGER NOT NULL, node TEXT NOT NULL,
    incarnation INTEGER NOT NULL, what TEXT NOT NULL, by TEXT NOT NULL, reason TEXT NOT NULL,
    UNIQUE (idx, number)
);
CREATE TABLE attempts_runs (
    first INTEGER, count INTEGER, row INTEGER, PRIMARY KEY (first, row)
) WITHOUT ROWID;
CREATE TABLE attempts_keys (key BLOB, row INTEGER, PRIMARY KEY (key, row)) WITHOUT ROWID;
CREATE TABLE events_runs (
    first INTEGER, count INTEGER, row INTEGER, PRIMARY KEY (first, row)
) WITHOUT ROWID;
CREATE TABLE events_keys (key BLOB, row INTEGER, PRIMARY KEY (key, row)) WITHOUT ROWID;
"""
_ATTEMPT = (
    "row, ids, queue, handler, node, fence, attempt, claimed_ms, started_ms, ended_ms, ending, results,"
    " error, trace, traceparent"
)
_EVENT = "row, idx, number, kind, ids, at_ms, fence, node, incarnation, what, by, reason"

_encode = msgspec.msgpack.Encoder().encode
_decode_ids = msgspec.msgpack.Decoder(Ids).decode
_decode_results = msgspec.msgpack.Decoder(tuple[bytes, ...]).decode


class HistoryUnusable(Exception):
    """The file cannot be opened; the message names it and says what to do."""


class HistoryFile:
    def __init__(self, path: Path) -> None:
        try:
            # The threads of records.py take turns under a lock; SQLite's own check would refuse even that.
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._prepare(path)
        except sqlite3.Error as error:
            raise HistoryUnusable(
                f"history file {path}: {error}; free the disk or mend its permissions; if it is damaged, move"
                " it away: history is lost then, tasks are not"
            ) from error

    def _prepare(self, path: Path) -> None:
        db = self._db
        db.create_function("fold", 1, str.casefold, deterministic=True)
        # FULL: what was flushed survives a power cut. A flush comes at most every 100 ms, so this is cheap.
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA journal_size_limit=16777216")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > FORMAT:
            raise HistoryUnusable(
                f"history file {path} has format {version}, and this program knows up to {FORMAT}:"
                " start it with the newer program, or move the file away"
            )
        if version == 0:
            db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version={FORMAT};COMMIT;")

    def rows_next(self) -> int:
        """A row number above all in use."""
        (top,) = self._db.execute(
            "SELECT max(coalesce((SELECT max(row) FROM attempts), 0),"
            " coalesce((SELECT max(row) FROM events), 0))"
        ).fetchone()
        return int(top) + 1

    # --- writing -------------------------------------------------------------------------------------------

    def write(
        self, attempts: Sequence[tuple[int, Attempt]], events: Sequence[tuple[int, RecordedEvent]]
    ) -> None:
        """All or none.

        An event whose (index, number) is known is left out: a restart applies entries again.
        """
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany(
                f"INSERT INTO attempts ({_ATTEMPT}) VALUES ({_marks(15)})",
                [_attempt_row(row, attempt) for row, attempt in attempts],
            )
            self._index("attempts", [(row, attempt.ids) for row, attempt in attempts])
            fresh: list[tuple[int, Ids]] = []
            for row, event in events:
                done = db.execute(
                    f"INSERT OR IGNORE INTO events ({_EVENT}) VALUES ({_marks(12)})", _event_row(row, event)
                )
                if done.rowcount == 1:
                    fresh.append((row, event.ids))
            self._index("events", fresh)
            db.execute("COMMIT")
        except BaseException:
            # Nothing of it stands; the caller keeps the rows and tries again.
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _index(self, table: str, rows: list[tuple[int, Ids]]) -> None:
        db = self._db
        db.executemany(
            f"INSERT OR IGNORE INTO {table}_runs (first, count, row) VALUES (?, ?, ?)",
            [(first, count, row) for row, ids in rows for first, count in _short_runs(ids)],
        )
        keys = [(key, row) for row, ids in rows for key in ids.keys]
        if keys:
            db.executemany(f"INSERT OR IGNORE INTO {table}_keys (key, row) VALUES (?, ?)", keys)

    def prune(self, before_ms: int, bytes_max: int, rows: int = 500) -> int:
        """Forget up to ``rows`` of the oldest attempts and events that are too old or too many; how many."""
        db = self._db
        old_attempts = "ended_ms < ?"
        old_events = "at_ms < ?"
        limit: tuple[int, ...] = (before_ms,)
        if self.bytes_used() > bytes_max:
            old_attempts = old_events = "?"
            limit = (1,)
        forgotten = 0
        db.execute("BEGIN IMMEDIATE")
        try:
            for table, old in (("attempts", old_attempts), ("events", old_events)):
                # Rows are numbered as they were added, so the oldest ones are at the head.
                found = db.execute(
                    f"SELECT row, ids, {old} FROM {table} ORDER BY row LIMIT {rows}", limit
                ).fetchall()
                gone = [(row, _decode_ids(ids)) for row, ids, is_old in found if is_old]
                self._forget(table, gone)
                forgotten += len(gone)
            db.execute("COMMIT")
        except BaseException:
            # Pruning is tried again later; nothing depends on it but space.
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return forgotten

    def _forget(self, table: str, rows: list[tuple[int, Ids]]) -> None:
        db = self._db
        db.executemany(f"DELETE FROM {table} WHERE row = ?", [(row,) for row, _ in rows])
        db.executemany(
            f"DELETE FROM {table}_runs WHERE first = ? AND row = ?",
            [(first, row) for row, ids in rows for first, _ in _short_runs(ids)],
        )
        db.executemany(
            f"DELETE FROM {table}_keys WHERE key = ? AND row = ?",
            [(key, row) for row, ids in rows for key in ids.keys],
        )

    def bytes_used(self) -> int:
        """Without the free pages, which are filled again before the file grows."""
        ((pages,), (free,), (size,)) = (
            self._db.execute(f"PRAGMA {name}").fetchone()
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int(pages - free) * int(size)

    # --- reading -------------------------------------------------------------------------------------------

    def attempts(self, task_id: TaskId) -> dict[int, Attempt]:
        return {row[0]: _attempt(row) for row in self._of("attempts", _ATTEMPT, task_id)}

    def events(self, task_id: TaskId) -> dict[int, RecordedEvent]:
        return {row[0]: _event(row) for row in self._of("events", _EVENT, task_id)}

    def _of(self, table: str, columns: str, task_id: TaskId) -> list[tuple[Any, ...]]:
        if isinstance(task_id, int):
            which = f"SELECT row FROM {table}_runs WHERE first BETWEEN ? AND ? AND first + count > ?"
            values: tuple[int | bytes, ...] = (task_id - RUN_MAX + 1, task_id, task_id)
        else:
            which = f"SELECT row FROM {table}_keys WHERE key = ?"
            values = (task_id,)
        return self._db.execute(f"SELECT {columns} FROM {table} WHERE row IN ({which})", values).fetchall()

    def search(self, wanted: TaskFilter, after: Cursor | None) -> Iterator[tuple[int, Attempt]]:
        """Rows that match, newest first, from the cursor's own row on."""
        where, values = _where(wanted)
        if after is not None:
            where.append("row <= ?")
            values.append(after.row)
        clause = " WHERE " + " AND ".join(where) if where else ""
        for row in self._db.execute(f"SELECT {_ATTEMPT} FROM attempts{clause} ORDER BY row DESC", values):
            yield row[0], _attempt(row)

    def events_of(self, kind: EventKind, below: int | None, limit: int) -> dict[int, RecordedEvent]:
        """Events of a kind, newest first, with rows not above ``below``."""
        rows = self._db.execute(
            f"SELECT {_EVENT} FROM events WHERE kind = ? AND row <= ? ORDER BY row DESC LIMIT ?",
            (kind, 2**63 - 1 if below is None else below, limit),
        )
        return {row[0]: _event(row) for row in rows}

    def close(self) -> None:
        self._db.close()


def _where(wanted: TaskFilter) -> tuple[list[str], list[object]]:
    where: list[str] = []
    values: list[object] = []
    if wanted.endings:
        where.append(f"ending IN ({_marks(len(wanted.endings))})")
        values += wanted.endings
    for column, value in (("queue", wanted.queue), ("handler", wanted.handler)):
        if value:
            where.append(f"{column} = ?")
            values.append(value)
    if wanted.since_ms:
        where.append("ended_ms >= ?")
        values.append(wanted.since_ms)
    if wanted.until_ms:
        where.append("ended_ms < ?")
        values.append(wanted.until_ms)
    if wanted.error:
        # instr and not LIKE: a person's text may hold % and _.
        where.append("instr(fold(error), ?) > 0")
        values.append(wanted.error.casefold())
    return where, values


def _marks(count: int) -> str:
    return ", ".join("?" * count)


def _short_runs(ids: Ids) -> Iterator[tuple[int, int]]:
    for start, count in ids.runs:
        for at in range(0, count, RUN_MAX):
            yield start + at, min(RUN_MAX, count - at)


def _clean(text: str) -> str:
    # A lone surrogate (from somebody's exception text) cannot be stored, and would block the history for
    # good.
    return text.encode(errors="replace").decode()


def _attempt_row(row: int, a: Attempt) -> tuple[object, ...]:
    results = None if a.results is None else _encode(a.results)
    head = (row, _encode(a.ids), a.queue, a.handler, a.node, a.fence, a.attempt)
    times = (a.claimed_ms, a.started_ms, a.ended_ms)
    return (*head, *times, int(a.ending), results, _clean(a.error), _clean(a.trace), a.traceparent)


def _event_row(row: int, e: RecordedEvent) -> tuple[object, ...]:
    head = (row, e.index, e.number, int(e.kind), _encode(e.ids), e.at_ms, e.fence)
    return (*head, e.node, e.incarnation, e.what, _clean(e.by), _clean(e.reason))


def _attempt(row: tuple[Any, ...]) -> Attempt:
    _, ids, queue, handler, node, fence, attempt, claimed, started, ended, ending, results, *texts = row
    known = None if results is None else _decode_results(results)
    times = (claimed, started, ended)
    return Attempt(
        _decode_ids(ids), queue, handler, node, fence, attempt, *times, Ending(ending), known, *texts
    )


def _event(row: tuple[Any, ...]) -> RecordedEvent:
    _, index, number, kind, ids, *rest = row
    return RecordedEvent(index, number, EventKind(kind), _decode_ids(ids), *rest)
