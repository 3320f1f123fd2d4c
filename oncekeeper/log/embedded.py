"""The embedded log: one SQLite file that every process of the machine reads and writes.

- A row of ``batches`` is one batch. Its rowid is ``partition << 44 | base offset``, so that appending to a
  partition touches its last page only, and reading on from an offset is one range scan.
- Ends and committed positions stand in ``partitions``; the end moves in the transaction that appends, so that
  offsets are never reused, whatever retention deletes.
- A range id is found by the run that holds it (no row holds more than BATCH_TASKS_MAX tasks, so the search is
  bounded); a keyed id by its entry in ``keys``.
- WAL with synchronous=FULL: a transaction is on the disk (fsync) before its COMMIT returns. Readers never
  wait for writers. Writers wait for each other, so write transactions are short.

Offsets and positions are durable the moment the call returns; nothing is cached between calls, because other
processes write too.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import msgspec

from dedup.ids import Ids, TaskId
from oncekeeper.envelope import BATCH_TASKS_MAX, TaskBatch, decode_batch, encode_batch
from oncekeeper.errors import InvalidTask, LogUnusable
from oncekeeper.log.cut import cut
from oncekeeper.log.embedded_delayed import EmbeddedDelays
from oncekeeper.log.embedded_file import connect, log_path, prepare
from oncekeeper.log.embedded_retention import Retention
from oncekeeper.log.port import (
    READ_ITEMS_MAX,
    Appended,
    Aside,
    Fetched,
    Item,
    Located,
    Undecodable,
    UnknownAppend,
    Unsent,
)

PARTITIONS_DEFAULT = 12
PARTITIONS_MAX = 4096
LOCK_TIMEOUT_MS = 10_000

_SHIFT = 44  # 2**44 offsets a partition; 2**18 partitions fit above them
_OFFSETS = (1 << _SHIFT) - 1
_BUSY_MS = 8  # see _begin


def open_log(
    path: str | os.PathLike[str],
    *,
    create: bool = False,
    partitions: int | None = None,
    cluster_id: str | None = None,
    lock_timeout_ms: int = LOCK_TIMEOUT_MS,
    clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
) -> EmbeddedLog:
    """Open the log at ``path`` (a ``.db`` file or a data directory); LogUnusable says why it cannot be.

    ``partitions`` (default 12) counts when the log is made; given for a log that exists, it must agree. With
    ``cluster_id``, a log of another cluster is refused.
    """
    file = log_path(path)
    if partitions is not None and not 1 <= partitions <= PARTITIONS_MAX:
        raise LogUnusable(f"partitions={partitions} must be from 1 to {PARTITIONS_MAX}")
    if not file.exists():
        if not create:
            raise LogUnusable(f"{file}: there is no task log here; `oncekeeper cluster up` makes one")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Bodies may be confidential. SQLite gives its WAL the permissions of its database.
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise LogUnusable(f"{file.parent}: {error.strerror}") from error
    database: sqlite3.Connection | None = None
    try:
        database = connect(file, create)
        meta = prepare(database, file, create, partitions or PARTITIONS_DEFAULT, cluster_id or "")
    except (sqlite3.Error, LogUnusable) as error:
        if database is not None:
            database.close()
        if isinstance(error, LogUnusable):
            raise
        raise LogUnusable(f"{file}: {error}") from error
    standing, count = str(meta["cluster_id"]), int(str(meta["partitions"]))
    wrong = None
    if cluster_id and standing and standing != cluster_id:
        wrong = f"belongs to cluster {standing}, not to {cluster_id}: give another directory"
    elif partitions is not None and partitions != count:
        wrong = f"has partitions={count}, not {partitions}: the number is fixed when a log is made"
    if wrong:
        database.close()
        raise LogUnusable(f"{file}: {wrong}")
    return EmbeddedLog(database, file, count, standing, lock_timeout_ms, clock_ms)


class EmbeddedLog:
    """TaskLog over one SQLite file. One thread at a time."""

    def __init__(
        self,
        database: sqlite3.Connection,
        file: Path,
        partitions: int,
        cluster_id: str,
        lock_timeout_ms: int,
        clock_ms: Callable[[], int],
    ) -> None:
        self.file = file
        self.cluster_id = cluster_id
        self._database = database
        self._partitions = partitions
        self._lock_timeout_ms = lock_timeout_ms
        self._clock_ms = clock_ms
        # Many clients that each submit one task must not all start with the same partition.
        self._turn = random.randrange(partitions)
        database.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        self._retention = Retention(self._write, self._rows)
        self.delays = EmbeddedDelays(self, clock_ms)

    @property
    def partitions(self) -> int:
        return self._partitions

    def close(self) -> None:
        self._database.close()

    # --- writing --------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """BEGIN IMMEDIATE within the lock timeout.

        SQLite's own busy handler backs off up to 100 ms, so that a waiting submit would lose to a steady
        writer again and again. Its timeout is kept so short that it never sleeps over 5 ms; the loop is here.
        """
        deadline = time.monotonic() + self._lock_timeout_ms / 1000
        while True:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() >= deadline:
                    raise

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One short write transaction. Raises Unsent if surely nothing was stored, else UnknownAppend."""
        committing = False
        try:
            self._begin()
            yield self._database
            committing = True
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            text = f"{self.file}: {error}"
            # Before COMMIT nothing stands. A full disk or a lock during COMMIT leaves no valid commit mark
            # either, but after an I/O error the mark may have reached the disk.
            if committing and not _is_full(error) and not _is_busy(error):
                raise UnknownAppend(text) from error
            raise Unsent(text) from error
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        if self._database.in_transaction:  # SQLite rolls back by itself on some errors
            self._database.execute("ROLLBACK")

    def append(self, batches: Sequence[TaskBatch]) -> list[Appended]:
        """Store batches, all or none, fsynced. Runs are spread over the partitions, keys go by their hash."""
        # All encoding happens before the lock is taken.
        pieces = [_piece(partition, row) for partition, row in cut(batches, self._partitions, self._turn)]
        if not pieces:
            return []
        self._turn = (pieces[-1][0] + 1) % self._partitions
        with self._write() as database:
            return self._put(database, pieces)

    def _put(
        self, database: sqlite3.Connection, pieces: Sequence[tuple[int, TaskBatch, int, bytes]]
    ) -> list[Appended]:
        """Rows for (partition, batch, checksum, message), within a transaction."""
        stored_ms = self._clock_ms()
        appended: list[Appended] = []
        rows: list[tuple[int, int, int | None, int, int, bytes]] = []
        keys: list[tuple[bytes, int]] = []
        ends = dict(database.execute("SELECT partition, end FROM partitions"))
        for partition, row, crc, message in pieces:
            base = ends[partition]
            place = partition << _SHIFT | base
            ends[partition] = base + len(row)
            first_id = row.ids.runs[0][0] if row.ids.runs else None
            rows.append((place, len(row), first_id, stored_ms, crc, message))
            keys.extend((key, place + at) for at, key in enumerate(row.ids.keys))
            appended.append(Appended(partition, base, len(row)))
        database.executemany("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)", rows)
        if keys:
            keys.sort()  # neighbours in the index are written together
            database.executemany("INSERT INTO keys VALUES (?, ?)", keys)
        touched = {piece[0] for piece in pieces}
        database.executemany(
            "UPDATE partitions SET end = ? WHERE partition = ?",
            [(ends[partition], partition) for partition in touched],
        )
        return appended

    def _append_to(
        self, database: sqlite3.Connection, batches: Sequence[tuple[int, TaskBatch]]
    ) -> list[Appended]:
        """Within a transaction, each batch to the partition that it is given with."""
        return self._put(database, [_piece(partition, batch) for partition, batch in batches])

    def commit(self, positions: Mapping[int, int]) -> None:
        """Move committed positions forward. ValueError for one above its partition's end."""
        if not positions:
            return
        with self._write() as database:
            standing = {row[0]: row[1:] for row in database.execute("SELECT * FROM partitions")}
            for partition, position in positions.items():
                if partition not in standing:
                    raise ValueError(f"partition={partition} must be below {self._partitions}")
                end, committed = standing[partition]
                if position > end:
                    raise ValueError(f"partition {partition}: position={position} is above its end={end}")
                if position > committed:
                    database.execute(
                        "UPDATE partitions SET committed = ? WHERE partition = ?", (position, partition)
                    )

    def retain(self, keep_ms: int, now_ms: int) -> int:
        """Delete rows that lie wholly below the committed position, were stored keep_ms ago or earlier, and hold
        no task that is delayed; and bring what is due in the next days into due order."""
        self.delays.draw_near(range(self._partitions), now_ms)
        before_ms = now_ms - keep_ms
        return sum(self._retention.sweep(*position, before_ms) for position in self.committed().items())

    # --- reading --------------------------------------------------------------------------------------------

    def _query(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """The cursor of a query. A reader waits only while the log is being recovered after a crash."""
        deadline = time.monotonic() + self._lock_timeout_ms / 1000
        while True:
            try:
                return self._database.execute(statement, values)
            except sqlite3.Error as error:
                if not _is_busy(error) or time.monotonic() >= deadline:
                    raise

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:  # a damaged file shows at any row
            raise LogUnusable(f"{self.file}: {error}") from error

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """All that is read within sees the log as of one moment."""
        with self._reading():
            self._query("BEGIN")
            try:
                yield
            finally:
                self._roll_back()

    def _rows(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._reading():
            return self._query(statement, values).fetchall()

    def read(self, partition: int, offset: int, tasks_max: int, bytes_max: int) -> list[Item]:
        low = partition << _SHIFT
        found: list[Item] = []
        tasks = size = 0
        with self._reading():
            # The row that holds ``offset`` begins at or below it.
            rows = self._query(
                "SELECT place, count, crc, message FROM batches WHERE place >= coalesce("
                "  (SELECT max(place) FROM batches WHERE place >= ? AND place <= ?), ?)"
                " AND place < ? ORDER BY place",
                (low, low | offset, low, low + _OFFSETS + 1),
            )
            for place, count, crc, message in rows:
                base = place & _OFFSETS
                if base + count <= offset:
                    continue
                start = max(base, offset)
                tasks += base + count - start
                size += len(message)
                if found and (tasks > tasks_max or size > bytes_max):
                    break
                found.append(_fetched(partition, base, start, count, crc, message))
                if tasks >= tasks_max or size >= bytes_max or len(found) == READ_ITEMS_MAX:
                    break
            rows.close()  # an open cursor would hold its snapshot, and the WAL could not be cut back
        return found

    def batch_at(self, partition: int, offset: int, count: int) -> Fetched | Undecodable:
        """These tasks of one batch, wherever the position is."""
        place = partition << _SHIFT | offset
        rows = self._rows(
            "SELECT place, count, crc, message FROM batches"
            " WHERE place = (SELECT max(place) FROM batches WHERE place <= ?)",
            (place,),
        )
        for base, length, crc, message in rows:
            if place + count <= base + length:
                item = _fetched(partition, base & _OFFSETS, offset, length, crc, message)
                if isinstance(item, Undecodable):
                    return msgspec.structs.replace(item, count=count)
                return Fetched(partition, offset, item.batch.part(0, count))
        return Undecodable(
            partition, offset, count, b"", "the log holds no message here: the file is damaged"
        )

    def ends(self) -> dict[int, int]:
        return dict(self._rows("SELECT partition, end FROM partitions"))

    def committed(self) -> dict[int, int]:
        return dict(self._rows("SELECT partition, committed FROM partitions"))

    def find(self, task_id: TaskId) -> list[Located]:
        if isinstance(task_id, int):
            rows = self._rows(
                "SELECT place, ? - first_id, crc, message FROM batches"
                " WHERE first_id > ? AND first_id <= ? AND first_id + count > ? ORDER BY place",
                (task_id, task_id - BATCH_TASKS_MAX, task_id, task_id),
            )
        else:
            # The row of a place is the last that begins at or below it.
            rows = self._rows(
                "SELECT b.place, k.place - b.place, b.crc, b.message FROM keys k JOIN batches b ON b.place ="
                " (SELECT max(place) FROM batches WHERE place <= k.place) WHERE k.key = ? ORDER BY k.place",
                (task_id,),
            )
        located: list[Located] = []
        for place, at, crc, message in rows:
            if google_crc32c.value(message) != crc:
                continue  # damaged: reading the partition reports it
            try:
                batch = decode_batch(message).part(at, 1)
            except InvalidTask:
                continue  # likewise
            if len(batch) == 1 and next(iter(batch.ids)) == task_id:
                located.append(Located(place >> _SHIFT, (place & _OFFSETS) + at, batch))
        return located

    # --- put aside ------------------------------------------------------------------------------------------

    def put_aside(self, tasks: Sequence[Aside]) -> None:
        if not tasks:
            return
        with self._write() as database:
            database.executemany(
                "INSERT INTO aside (id, kind, message, reason, at_ms) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (id, kind) DO UPDATE"
                " SET message = excluded.message, reason = excluded.reason, at_ms = excluded.at_ms",
                [(task.id, task.kind, task.message, task.reason, task.at_ms) for task in tasks],
            )

    def aside(self, kind: str, after: int, limit: int) -> list[tuple[int, Aside]]:
        rows = self._rows(
            "SELECT place, kind, id, message, reason, at_ms FROM aside"
            " WHERE place > ? AND kind = ? ORDER BY place LIMIT ?",
            (after, kind, limit),
        )
        return [(row[0], Aside(*row[1:])) for row in rows]

    def find_aside(self, ids: Ids) -> list[Aside]:
        columns = "SELECT kind, id, message, reason, at_ms FROM aside WHERE id"
        rows: list[tuple[Any, ...]] = []
        for start, count in ids.runs:
            rows += self._rows(f"{columns} BETWEEN ? AND ? ORDER BY id, kind", (start, start + count - 1))
        for key in ids.keys:
            rows += self._rows(f"{columns} = ? ORDER BY kind", (key,))
        return [Aside(*row) for row in rows]

    def drop_aside(self, tasks: Sequence[Aside]) -> None:
        if not tasks:
            return
        with self._write() as database:
            database.executemany(
                "DELETE FROM aside WHERE id = ? AND kind = ? AND at_ms = ? AND reason = ? AND message = ?",
                [(task.id, task.kind, task.at_ms, task.reason, task.message) for task in tasks],
            )


def _piece(partition: int, batch: TaskBatch) -> tuple[int, TaskBatch, int, bytes]:
    message = encode_batch(batch)
    return partition, batch, google_crc32c.value(message), message


def _fetched(
    partition: int, base: int, start: int, count: int, crc: int, message: bytes
) -> Fetched | Undecodable:
    try:
        if google_crc32c.value(message) != crc:
            raise InvalidTask("message", f"its checksum is not {crc:08x}: the file is damaged")
        batch = decode_batch(message)
        if len(batch) != count:
            raise InvalidTask("count", f"{len(batch)} tasks stand where {count} were announced")
    except InvalidTask as error:
        return Undecodable(partition, start, base + count - start, message, str(error))
    return Fetched(partition, start, batch.part(start - base, base + count - start))


def _is_busy(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
