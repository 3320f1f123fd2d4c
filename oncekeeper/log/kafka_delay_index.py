"""The on-disk index of delayed tasks, for a log that cannot look them up by itself (Kafka): one file a node.

The source of truth is a compacted topic (kafka_delayed.py). A node applies its records to this file and finds in
it what is due, in due order, and any task by its id. Waiting tasks are rows as in the embedded log's file, and are
kept by the same statements (delay_rows.py); their messages stand beside them, one a task.

``apply`` stores records and the *position*, the source's offset up to which everything is here, in one
transaction. So the file says by itself what it holds, a crash leaves it at some earlier position with exactly the
rows of it, and whoever opens it reads on from there. For this synchronous=NORMAL is enough: after a loss of power
SQLite may have lost the last transactions, rows and position together, and they are read from the source again.
A file that is damaged, of another cluster, or of another generation of the source (a topic that was made anew has
other offsets) is worth nothing: it is deleted, begun anew, and the log says so.

A compacted topic forgets a tombstone after a while (``delete.retention.ms``). An index that has not followed its
source for longer may have missed one, and would keep a task that ended long ago: ``seen_ms`` tells how old it is,
and what is too old is to be begun anew.

Each message has a checksum, because SQLite checks no pages, and repeats the due time of its row: one that a disk
has changed would start a task early.
"""

from __future__ import annotations

import heapq
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import google_crc32c
import msgspec

from dedup.ids import TaskId
from oncekeeper.errors import LogUnusable
from oncekeeper.log import delay_rows as rows_of
from oncekeeper.log.delay_rows import OFFSETS, SHIFT, Row
from oncekeeper.log.delayed import WAYS, Delayed, Place, after_in, counted, gathered
from oncekeeper.log.kafka_codec import items
from oncekeeper.log.port import Fetched, Gap, Undecodable

_log = logging.getLogger("oncekeeper.kafka")

FORMAT = 3
CACHE_BYTES = 32 << 20
READ_CACHE_BYTES = 8 << 20
BUSY_S = 5.0

PUT, MOVE, END = "put", "move", "end"

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE sources (
    source INTEGER PRIMARY KEY,     -- a partition of the topic
    position INTEGER NOT NULL       -- everything below this offset is in the index
);
CREATE TABLE seen (
    ms INTEGER NOT NULL             -- when the sources were last at their ends; epoch
);
-- A small number for a queue's partition, whose own may have 53 bits: what "partition" means in the tables below.
CREATE TABLE slots (slot INTEGER PRIMARY KEY, partition INTEGER NOT NULL UNIQUE);
CREATE TABLE messages (
    place INTEGER PRIMARY KEY,      -- slot << 44 | offset
    id NOT NULL,                    -- INTEGER for a range id, BLOB for a keyed id
    id_hash INTEGER NOT NULL,       -- the range id itself, or eight bytes of the keyed id: half the index
    crc INTEGER NOT NULL,           -- CRC32C of id, way and message
    message BLOB NOT NULL
);
CREATE INDEX messages_by_id ON messages (id_hash);
"""


class IndexUnusable(LogUnusable):
    """The index could not be read or written (a full disk, an I/O error); it is as it was before the call."""


class IndexDamaged(IndexUnusable):
    """What stands in the file cannot be trusted: ``reset`` it, and read the source from its beginning."""


class Change(msgspec.Struct, frozen=True, gc=False):
    """A record of the source: a task that waits (PUT), waits for another time (MOVE), or does so no more (END).

    A place that waits already stays as it is by PUT. What was put or moved together has one ``head``, the first
    offset of it: neighbours of one head are one row.
    """

    kind: str
    partition: int
    offset: int
    id: TaskId
    due_ms: int = 0
    way: int = 0
    head: int = 0
    message: bytes = b""


class _Record(msgspec.Struct, frozen=True, gc=False):
    """A message of the index as kafka_codec reads it."""

    at: int
    text: bytes

    def offset(self) -> int:
        return self.at

    def value(self) -> bytes:
        return self.text


class IndexFile:
    """What both who writes and who reads the file have."""

    def __init__(self, file: Path, cache_bytes: int) -> None:
        self.file = file
        self._cache_bytes = cache_bytes
        self._database: sqlite3.Connection | None = None
        self._slots: dict[int, int] = {}

    def _connect(self) -> None:
        self._database = sqlite3.connect(
            f"{self.file.resolve().as_uri()}?mode=rw",
            uri=True,
            isolation_level=None,
            check_same_thread=False,  # one at a time all the same
            timeout=BUSY_S,
        )
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

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

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

    def _rows(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._guarded():
            return self._open_database().execute(statement, values).fetchall()


class DelayIndex(IndexFile):
    """The writer's side: one thread of one process."""

    def __init__(
        self,
        file: Path,
        cluster_id: str,
        generation: str,
        cache_bytes: int = CACHE_BYTES,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        super().__init__(file, cache_bytes)
        self._clock_ms = clock_ms
        self._meta = {"format": FORMAT, "cluster_id": cluster_id, "generation": generation}

    def open(self) -> None:
        """Raises IndexDamaged for a file that is none, or another's."""
        with self._guarded():
            # Messages may be confidential. SQLite gives its WAL the permissions of its database.
            try:
                os.close(os.open(self.file, os.O_CREAT | os.O_RDWR, 0o600))
            except OSError as error:
                raise IndexUnusable(f"{self.file}: {error.strerror}") from error
            self._connect()
            if self._rows("SELECT 1 FROM sqlite_master LIMIT 1") == []:
                self._make()
            found = dict(self._rows("SELECT name, value FROM meta"))
            if found != self._meta:
                here, wanted = _named(found), _named(self._meta)
                raise IndexDamaged(f"{self.file}: it belongs to {here}, not to {wanted}")
            self._slots = dict(self._rows("SELECT partition, slot FROM slots"))

    def _make(self) -> None:
        with self._write() as database:
            for statement in (_SCHEMA + rows_of.SCHEMA).split(";\n"):
                database.execute(statement)
            database.executemany("INSERT INTO meta VALUES (?, ?)", list(self._meta.items()))
            database.execute("INSERT INTO seen VALUES (?)", (self._clock_ms(),))

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

    def positions(self) -> dict[int, int]:
        """Of each source the offset from which on records are wanted."""
        return dict(self._rows("SELECT source, position FROM sources"))

    def is_of(self, generation: str) -> bool:
        return self._meta["generation"] == generation

    def seen_ms(self) -> int:
        """When the source was last followed to its end, or the file was begun."""
        ((seen_ms,),) = self._rows("SELECT ms FROM seen")
        return int(seen_ms)

    def apply(self, found: Mapping[int, tuple[Sequence[Change], int]], seen_ms: int = 0) -> None:
        """By source: its records in order, and the offset below which everything is here now.

        ``seen_ms``: the time, if these are the ends of all sources."""
        slots, now_ms = dict(self._slots), self._clock_ms()
        with self._write() as database:
            for source, (changes, position) in found.items():
                for kind, some in groupby(changes, key=lambda change: change.kind):
                    _apply(database, slots, kind, list(some), now_ms)
                database.execute("INSERT OR REPLACE INTO sources VALUES (?, ?)", (source, position))
            if seen_ms:
                database.execute("UPDATE seen SET ms = ?", (seen_ms,))
        self._slots = slots

    def draw_near(self) -> bool:
        """Upkeep: bring some rows that are due in the next days into due order; whether there may be more."""
        now_ms = self._clock_ms()
        for slot in rows_of.to_draw(self._rows, self._slots.values(), now_ms)[:1]:
            with self._write() as database:
                rows_of.draw_near(database, slot, now_ms)
            return True
        return False


def _apply(
    database: sqlite3.Connection, slots: dict[int, int], kind: str, changes: list[Change], now_ms: int
) -> None:
    """Changes of one kind, in order."""
    at = {
        (_slot_for(database, slots, change.partition), change.offset): change for change in reversed(changes)
    }
    if kind == MOVE:  # the last word on each place counts; of puts, the first
        at |= {(slots[change.partition], change.offset): change for change in changes}
    placed = sorted(at.items(), key=lambda item: item[0])
    if kind == PUT:
        rows = rows_of.not_standing(database, _gather(placed))
    else:
        rows_of.carve(database, gathered(Place(slot, offset) for (slot, offset), _ in placed), now_ms)
        if kind == END:
            gone = [(slot << SHIFT | offset,) for (slot, offset), _ in placed]
            database.executemany("DELETE FROM messages WHERE place = ?", gone)
            return
        # A row as it says of itself: where it stood before may be compacted away.
        rows = _gather(placed)
    rows_of.insert(database, rows, now_ms)
    database.executemany(
        f"INSERT OR {'IGNORE' if kind == PUT else 'REPLACE'} INTO messages VALUES (?, ?, ?, ?, ?)",
        [
            (slot << SHIFT | offset, new.id, _id_hash(new.id), _crc(new), new.message)
            for (slot, offset), new in placed
        ],
    )


def _gather(placed: Sequence[tuple[tuple[int, int], Change]]) -> list[Row]:
    """Neighbours (in order) of one head and one time as rows of the table ``delayed``."""
    rows: list[Row] = []
    end = head = -1
    for (slot, offset), change in placed:
        place = slot << SHIFT | offset
        if rows and place == end and (change.head, change.due_ms, change.way) == (head, *rows[-1][3:]):
            rows[-1] = (rows[-1][0], rows[-1][1] + 1, *rows[-1][2:])
        else:
            rows.append((place, 1, slot, change.due_ms, change.way))
        end, head = place + 1, change.head
    return rows


def _slot_for(database: sqlite3.Connection, slots: dict[int, int], partition: int) -> int:
    slot = slots.get(partition)
    if slot is None:
        slot = slots[partition] = len(slots)
        database.execute("INSERT INTO slots VALUES (?, ?)", (slot, partition))
    return slot


def _named(meta: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(meta.items()))


def _id_hash(task_id: TaskId) -> int:
    return task_id if isinstance(task_id, int) else int.from_bytes(task_id[:8], "big", signed=True)


def _crc(change: Change) -> int:
    return _checksum(change.id, change.way, change.message)


def _checksum(task_id: TaskId, way: int, message: bytes) -> int:
    head = b"%d %b" % (way, task_id if isinstance(task_id, bytes) else b"%d" % task_id)
    return int(google_crc32c.extend(google_crc32c.value(head), message))


class IndexReads(IndexFile):
    """DelayReads over the file. There may be any number of them, one thread each."""

    def __init__(self, file: Path, cache_bytes: int = READ_CACHE_BYTES) -> None:
        super().__init__(file, cache_bytes)
        self._partitions: dict[int, int] = {}

    def open(self) -> None:
        with self._guarded():
            self._connect()
            self._open_database().execute("PRAGMA query_only = 1")

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """All that is read within sees the file as of one moment."""
        database = self._open_database()
        with self._guarded():
            database.execute("BEGIN")
            try:
                yield
            finally:
                if database.in_transaction:
                    database.execute("ROLLBACK")

    def _slot(self, partition: int) -> int | None:
        if partition not in self._slots:
            self._learn()
        return self._slots.get(partition)

    def _partition(self, slot: int) -> int:
        if slot not in self._partitions:
            self._learn()
        return self._partitions[slot]

    def _learn(self) -> None:
        self._slots = dict(self._rows("SELECT partition, slot FROM slots"))
        self._partitions = {slot: partition for partition, slot in self._slots.items()}

    def due(
        self, partitions: Iterable[int], until_ms: int, after: Delayed | None, limit: int
    ) -> list[Delayed]:
        found = []
        with self._snapshot():
            for partition in sorted(set(partitions)):
                if (slot := self._slot(partition)) is None:
                    continue
                due_ms, offset = after_in(partition, after)
                cursor = due_ms, (slot << SHIFT) + min(offset, OFFSETS)
                rows = rows_of.due(self._rows, slot, cursor, until_ms, limit)
                found.append(
                    [Delayed(at, partition, place & OFFSETS, n, WAYS[way]) for at, place, n, way in rows]
                )
        return list(islice(heapq.merge(*found), limit))

    def standing(self, place: Place) -> list[Delayed]:
        """The parts of rows at these places, whatever time they wait for."""
        if (slot := self._slot(place.partition)) is None:
            return []
        start = slot << SHIFT | place.offset
        end = start + place.count
        found = []
        for at, count, _, due_ms, way in rows_of.overlapping(self._rows, start, end):
            low, high = max(at, start), min(at + count, end)
            found.append(Delayed(due_ms, place.partition, low & OFFSETS, high - low, WAYS[way]))
        return found

    def ids(self, place: Place | Delayed) -> list[tuple[int, TaskId]]:
        """Offset and id of each task that waits at these places."""
        if (slot := self._slot(place.partition)) is None:
            return []
        start = slot << SHIFT | place.offset
        rows = self._rows(
            "SELECT place, id FROM messages WHERE place >= ? AND place < ?", (start, start + place.count)
        )
        return [(at & OFFSETS, task_id) for at, task_id in rows]

    def fetch(self, rows: Sequence[Delayed]) -> list[tuple[Delayed, Fetched | Undecodable]]:
        found: list[tuple[Delayed, Fetched | Undecodable]] = []
        for row in rows:
            for part in self.standing(Place(row.partition, row.offset, row.count)):
                if part.due_ms == row.due_ms:
                    found += self._messages(part)
        return found

    def _messages(self, row: Delayed) -> Iterator[tuple[Delayed, Fetched | Undecodable]]:
        start = (self._slot(row.partition) or 0) << SHIFT | row.offset
        rows = self._rows(
            "SELECT place, id, crc, message FROM messages WHERE place >= ? AND place < ?",
            (start, start + row.count),
        )
        if len(rows) != row.count:
            raise IndexDamaged(f"{self.file}: {len(rows)} messages stand where {row.count} tasks wait")
        for _, task_id, crc, message in rows:
            # A bit of a record's header makes a text of a blob, or a fraction of a number.
            sound = isinstance(message, bytes) and isinstance(task_id, int | bytes)
            if not sound or _checksum(task_id, WAYS.index(row.then), message) != crc:
                raise IndexDamaged(f"{self.file}: task {task_id!r}: its checksum is not {crc!r}")
        records = [_Record(place & OFFSETS, message) for place, _, _, message in rows]
        for item in items(row.partition, "", 0, records):
            assert not isinstance(item, Gap)  # the places follow one another
            if isinstance(item, Fetched) and item.batch.due_ms != row.due_ms:
                raise IndexDamaged(
                    f"{self.file}: partition {row.partition}, offset {item.base}: it waits for "
                    f"{row.due_ms}, its message says {item.batch.due_ms}"
                )
            yield msgspec.structs.replace(row, offset=item.base, count=item.end - item.base), item

    def find(self, task_id: TaskId) -> list[Delayed]:
        places = self._rows(
            "SELECT place FROM messages WHERE id_hash = ? AND id = ?", (_id_hash(task_id), task_id)
        )
        return sorted(
            row
            for (place,) in places
            for row in self.standing(Place(self._partition(place >> SHIFT), place & OFFSETS))
        )

    def counts(self) -> dict[int, int]:
        found = rows_of.counts(self._rows)
        return counted({self._partition(slot): tasks for slot, tasks in found.items()})
