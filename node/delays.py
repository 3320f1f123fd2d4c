"""The on-disk index of delayed tasks, for a log that cannot look them up by itself (Kafka): one file a node.

The source of truth is a compacted topic that is keyed by task id: a record is a delayed task, a later record of
its id replaces it, and a tombstone ends it. A node reads the partitions that it owns into this file and finds in
it what is due, in due order, and any task by its id. The embedded log needs no index: its delayed tasks are rows
of its own (oncekeeper/log/embedded_delayed.py).

``apply`` stores records and the *position*, the source's offset up to which everything is here, in one
transaction. So the file says by itself what it holds, a crash leaves it at some earlier position with exactly the
rows of it, and whoever opens it reads on from there. For this synchronous=NORMAL is enough: after a loss of power
SQLite may have lost the last transactions, rows and position together, and they are read from the source again.
A file that is damaged, of another cluster, or of another generation of the source (a topic that was made anew has
other offsets) is worth nothing: it is deleted, begun anew, and the log says so.

A compacted topic forgets a tombstone after a while (``delete.retention.ms``). An index that has not followed its
source for longer may have missed one, and would keep a task that ended long ago: ``seen_ms`` tells how old it is,
and what is too old is to be forgotten and read anew.

Before a node fires anything of a partition it reads the source to its end (``position`` shows how far it is):
what it fires may have been moved or ended by a record that it has not seen. Even then nothing runs twice; the
claim decides.

Each row has a checksum over what it is for, because SQLite checks no pages: a due time that a disk has changed
would start a task early. Due times fall all over the index by due time, and each page that a transaction touches
is written once for all of its rows: ``apply`` wants tens of thousands of records at a time when there are many.
"""

from __future__ import annotations

import heapq
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import google_crc32c
import msgspec

from dedup.ids import TaskId
from oncekeeper.envelope import batch_of, validate_message
from oncekeeper.errors import InvalidTask, LogUnusable
from oncekeeper.log.delayed import WAYS, Delayed, after_in, counted
from oncekeeper.log.port import Fetched, Undecodable

_log = logging.getLogger("oncekeeper.node")

FORMAT = 1
CACHE_BYTES = 64 << 20
FORGET_ROWS = 20_000  # deleted in one transaction
SLOTS_MAX = 1 << 18

_SHIFT = 44
_OFFSETS = (1 << _SHIFT) - 1
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE sources (
    slot INTEGER PRIMARY KEY,       -- a small number for a partition, whose own may have 53 bits
    partition INTEGER UNIQUE,       -- NULL: forgotten; its rows are being deleted, and count for nothing
    position INTEGER NOT NULL,      -- everything below this offset is in the index
    seen_ms INTEGER NOT NULL,       -- when the source was last read up to there
    tasks INTEGER NOT NULL
);
CREATE TABLE tasks (
    place INTEGER PRIMARY KEY,      -- slot << 44 | offset
    slot INTEGER NOT NULL,
    due_ms INTEGER NOT NULL,
    way INTEGER NOT NULL,           -- what happens then: 0 run, 1 enqueue
    id NOT NULL,                    -- INTEGER for a range id, BLOB for a keyed id
    id_hash INTEGER NOT NULL,       -- the range id itself, or eight bytes of the keyed id: half the index
    crc INTEGER NOT NULL,           -- CRC32C of due time, way, id and message
    message BLOB NOT NULL
);
CREATE INDEX tasks_by_due ON tasks (slot, due_ms);
CREATE INDEX tasks_by_id ON tasks (id_hash);
"""
_DELETE = "DELETE FROM tasks WHERE id_hash = ? AND id = ? AND slot = ?"


class IndexUnusable(LogUnusable):
    """The index could not be read or written (a full disk, an I/O error); it is as it was before the call."""


class IndexDamaged(IndexUnusable):
    """What stands in the file cannot be trusted: ``reset`` it, and read the source from its beginning."""


class DelayRecord(msgspec.Struct, frozen=True, gc=False):
    """A record of the source: a task that waits, or (``message`` is None) the end of one."""

    offset: int
    id: TaskId
    due_ms: int = 0
    then: str = WAYS[0]
    message: bytes | None = None


def open_index(file: Path, cluster_id: str, generation: str, *, cache_bytes: int = CACHE_BYTES) -> DelayIndex:
    """The index in ``file``; a new one if none is there, or none that this cluster and source can use."""
    index = DelayIndex(file, cluster_id, generation, cache_bytes)
    try:
        index.open()
    except IndexDamaged as error:
        index.reset(str(error))
    return index


class DelayIndex:
    """DelayReads over one SQLite file that one process writes. One thread at a time."""

    def __init__(self, file: Path, cluster_id: str, generation: str, cache_bytes: int) -> None:
        self.file = file
        self._meta = {"format": FORMAT, "cluster_id": cluster_id, "generation": generation}
        self._cache_bytes = cache_bytes
        self._database: sqlite3.Connection | None = None
        self._slots: dict[int, int] = {}

    def open(self) -> None:
        """Raises IndexDamaged for a file that is none, or another's."""
        with self._guarded():
            # Messages may be confidential. SQLite gives its WAL the permissions of its database.
            try:
                os.close(os.open(self.file, os.O_CREAT | os.O_RDWR, 0o600))
            except OSError as error:
                raise IndexUnusable(f"{self.file}: {error.strerror}") from error
            self._database = sqlite3.connect(self.file, isolation_level=None, check_same_thread=False)
            for pragma in (
                "journal_mode = WAL",
                "synchronous = NORMAL",
                f"cache_size = -{self._cache_bytes >> 10}",
                "mmap_size = 0",  # an I/O error must be an error, not a SIGBUS
                "wal_autocheckpoint = 8192",
                "journal_size_limit = 67108864",
                "cell_size_check = 1",
            ):
                self._database.execute(f"PRAGMA {pragma}")
            if self._rows("SELECT 1 FROM sqlite_master LIMIT 1") == []:
                self._make()
            found = dict(self._rows("SELECT name, value FROM meta"))
            if found != self._meta:
                here, wanted = _named(found), _named(self._meta)
                raise IndexDamaged(f"{self.file}: it belongs to {here}, not to {wanted}")
            slots = "SELECT partition, slot FROM sources WHERE partition IS NOT NULL"
            self._slots = dict(self._rows(slots))

    def _make(self) -> None:
        with self._write() as database:
            for statement in _SCHEMA.split(";\n"):
                database.execute(statement)
            database.executemany("INSERT INTO meta VALUES (?, ?)", list(self._meta.items()))

    def reset(self, why: str) -> None:
        """Delete the file and begin anew: every position is 0 then."""
        _log.warning("the index of delayed tasks is deleted, and rebuilt from its source: %s", why)
        self.close()
        try:
            for suffix in ("-wal", "-shm", ""):
                Path(f"{self.file}{suffix}").unlink(missing_ok=True)
        except OSError as error:
            raise IndexUnusable(f"{self.file}: it cannot be deleted: {error.strerror}") from error
        self._slots = {}
        self.open()

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    # --- the file -------------------------------------------------------------------------------------------

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            text = f"{self.file}: {error}"
            if code == sqlite3.SQLITE_FULL:
                raise IndexUnusable(f"{text}: delayed tasks are indexed again when there is room") from error
            # An I/O error or a lock passes; anything else (a missing table, a malformed page) does not.
            passing = (
                sqlite3.SQLITE_IOERR,
                sqlite3.SQLITE_BUSY,
                sqlite3.SQLITE_CANTOPEN,
                sqlite3.SQLITE_READONLY,
            )
            raise (IndexUnusable if code in passing else IndexDamaged)(text) from error

    def _open_database(self) -> sqlite3.Connection:
        if self._database is None:
            raise IndexUnusable(f"{self.file}: the index is closed")
        return self._database

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or nothing."""
        database = self._open_database()
        with self._guarded():
            try:
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:  # SQLite rolls back by itself on some errors
                    database.execute("ROLLBACK")
                raise

    def _rows(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._guarded():
            return self._open_database().execute(statement, values).fetchall()

    # --- following the source -------------------------------------------------------------------------------

    def position(self, partition: int) -> int:
        """The offset of the source from which on records are wanted; 0 for a partition that is not here."""
        rows = self._rows("SELECT position FROM sources WHERE partition = ?", (partition,))
        return int(rows[0][0]) if rows else 0

    def seen_ms(self, partition: int) -> int:
        """When the source was last followed to the position; 0 for a partition that is not here."""
        rows = self._rows("SELECT seen_ms FROM sources WHERE partition = ?", (partition,))
        return int(rows[0][0]) if rows else 0

    def partitions(self) -> frozenset[int]:
        return frozenset(self._slots)

    def apply(self, partition: int, records: Sequence[DelayRecord], next_offset: int, now_ms: int) -> None:
        """Store records in the order of the source, and that everything below ``next_offset`` is here now."""
        with self._write() as database:
            slot = self._slot_for(database, partition)
            ((position,),) = database.execute(
                "SELECT position FROM sources WHERE slot = ?", (slot,)
            ).fetchall()
            # The last word on each id counts. What lies below the position is here already, and may be ended.
            last = {record.id: record for record in records if record.offset >= position}
            ended = database.executemany(
                _DELETE, [(_id_hash(task_id), task_id, slot) for task_id in last]
            ).rowcount
            rows = [_row(slot, record) for record in last.values() if record.message is not None]
            rows.sort()
            database.executemany("INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            database.execute(
                "UPDATE sources SET position = max(position, ?), seen_ms = ?, tasks = tasks + ? WHERE slot = ?",
                (next_offset, now_ms, len(rows) - max(0, ended), slot),
            )
        self._slots[partition] = slot

    def _slot_for(self, database: sqlite3.Connection, partition: int) -> int:
        slot = self._slots.get(partition)
        if slot is None:
            # The lowest that is free: one that was forgotten is so again when its last row is gone.
            taken = {row[0] for row in database.execute("SELECT slot FROM sources")}
            slot = next(number for number in range(SLOTS_MAX) if number not in taken)
            database.execute("INSERT INTO sources VALUES (?, ?, 0, 0, 0)", (slot, partition))
        return slot

    def ended(self, partition: int, ids: Iterable[TaskId]) -> None:
        """These need not wait here any more, although their tombstones were not read yet."""
        slot = self._slots.get(partition)
        if slot is None:
            return
        with self._write() as database:
            gone = database.executemany(
                _DELETE, [(_id_hash(task_id), task_id, slot) for task_id in ids]
            ).rowcount
            database.execute("UPDATE sources SET tasks = tasks - ? WHERE slot = ?", (max(0, gone), slot))

    def forget(self, partition: int) -> None:
        """A partition is not here any more: it went to another node, or its source is another one now. At once
        and for good; ``sweep`` frees its room."""
        slot = self._slots.get(partition)
        if slot is None:
            return
        with self._write() as database:
            database.execute("UPDATE sources SET partition = NULL WHERE slot = ?", (slot,))
        del self._slots[partition]

    def sweep(self) -> bool:
        """Delete some of what was forgotten, in a short transaction; False: nothing is left of it."""
        slots = self._rows("SELECT slot FROM sources WHERE partition IS NULL LIMIT 1")
        for (slot,) in slots:
            with self._write() as database:
                gone = database.execute(
                    "DELETE FROM tasks WHERE place IN"
                    " (SELECT place FROM tasks WHERE place >= ? AND place <= ? LIMIT ?)",
                    (slot << _SHIFT, slot << _SHIFT | _OFFSETS, FORGET_ROWS),
                ).rowcount
                if gone < FORGET_ROWS:
                    database.execute("DELETE FROM sources WHERE slot = ?", (slot,))
        return bool(slots)

    # --- reading --------------------------------------------------------------------------------------------

    def due(
        self, partitions: Iterable[int], until_ms: int, after: Delayed | None, limit: int
    ) -> list[Delayed]:
        found = []
        for partition in sorted(self._slots.keys() & set(partitions)):
            slot = self._slots[partition]
            due_ms, offset = after_in(partition, after)
            rows = self._rows(
                "SELECT due_ms, place, way FROM tasks INDEXED BY tasks_by_due"
                " WHERE slot = ?1 AND due_ms >= ?2 AND due_ms <= ?4 AND (due_ms, place) > (?2, ?3)"
                " ORDER BY due_ms, place LIMIT ?5",
                (slot, due_ms, (slot << _SHIFT) + min(offset, _OFFSETS), until_ms, limit),
            )
            found.append([Delayed(due, partition, at & _OFFSETS, 1, WAYS[way]) for due, at, way in rows])
        return list(islice(heapq.merge(*found), limit))

    def fetch(self, rows: Sequence[Delayed]) -> list[tuple[Delayed, Fetched | Undecodable]]:
        found: list[tuple[Delayed, Fetched | Undecodable]] = []
        for row in rows:
            slot = self._slots.get(row.partition, SLOTS_MAX)
            for way, task_id, crc, message in self._rows(
                "SELECT way, id, crc, message FROM tasks WHERE place = ? AND due_ms = ?",
                (slot << _SHIFT | row.offset, row.due_ms),
            ):
                # A bit of a record's header makes a text of a blob, or a fraction of a number.
                sound = isinstance(message, bytes) and isinstance(task_id, int | bytes) and way in (0, 1)
                if not sound or _crc(row.due_ms, way, task_id, message) != crc:
                    raise IndexDamaged(f"{self.file}: task {task_id!r}: its checksum is not {crc!r}")
                found.append((row, _item(row, task_id, message)))
        return found

    def find(self, task_id: TaskId) -> list[Delayed]:
        partitions = {slot: partition for partition, slot in self._slots.items()}
        rows = self._rows(
            "SELECT due_ms, place, slot, way FROM tasks WHERE id_hash = ? AND id = ?",
            (_id_hash(task_id), task_id),
        )
        return sorted(
            Delayed(due, partitions[slot], place & _OFFSETS, 1, WAYS[way])
            for due, place, slot, way in rows
            if slot in partitions
        )

    def counts(self) -> dict[int, int]:
        return counted(dict(self._rows("SELECT partition, tasks FROM sources WHERE partition IS NOT NULL")))


def _named(meta: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(meta.items()))


def _id_hash(task_id: TaskId) -> int:
    return task_id if isinstance(task_id, int) else int.from_bytes(task_id[:8], "big", signed=True)


def _row(slot: int, record: DelayRecord) -> tuple[int, int, int, int, TaskId, int, int, bytes]:
    message, way = record.message or b"", WAYS.index(record.then)
    crc = _crc(record.due_ms, way, record.id, message)
    place = slot << _SHIFT | record.offset
    return place, slot, record.due_ms, way, record.id, _id_hash(record.id), crc, message


def _crc(due_ms: int, way: int, task_id: TaskId, message: bytes) -> int:
    head = b"%d %d %b" % (due_ms, way, task_id if isinstance(task_id, bytes) else b"%d" % task_id)
    return int(google_crc32c.extend(google_crc32c.value(head), message))


def _item(row: Delayed, task_id: TaskId, message: bytes) -> Fetched | Undecodable:
    try:
        task = msgspec.structs.replace(validate_message(message), id=task_id)
    except InvalidTask as error:
        return Undecodable(row.partition, row.offset, 1, message, str(error))
    return Fetched(row.partition, row.offset, batch_of([task]))
