"""What is put aside, on Kafka: two compacted topics, and a small index of them on this machine.

- A record's key is ``kind/id/digest of the content``; its value is the message, its headers say the rest. So the
  same id may be put aside again with other content, and dropping means a tombstone for exactly what was read.
- Of the records of one id that are alive (no tombstone followed), the youngest counts. Storing again lays
  tombstones on the older ones, dropping does so before it lays its own: an older one never comes to light again.
  Which records are alive does not depend on how far compaction got, so an index that is made anew gives the same
  answers.
- The index (SQLite) is a copy and nothing else. It takes in records and the position behind them in one
  transaction, and catches up with the topics' ends before each question. One that is damaged, or of other topics,
  is made anew.
- The place of what lies aside is its offset and one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from confluent_kafka import Message

from dedup.ids import Ids, id_text, parse_id
from oncekeeper.errors import LogUnusable
from oncekeeper.log.kafka_admin import Admin
from oncekeeper.log.kafka_read import Passed, Reader
from oncekeeper.log.kafka_rules import Topic
from oncekeeper.log.kafka_send import Sender
from oncekeeper.log.port import Aside, Unsent

T = TypeVar("T")

FORMAT = 1
_RECORDS = 2000
_BYTES = 8 << 20
_RECORD_BYTES = 1024  # headers, key, and what Kafka adds
_REASON_BYTES_MAX = 16_384
_BUSY_MS = 10_000

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE topics (kind TEXT PRIMARY KEY, next INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE alive (
    kind TEXT NOT NULL, offset INTEGER NOT NULL, id NOT NULL, key BLOB NOT NULL,
    message BLOB NOT NULL, reason TEXT NOT NULL, at_ms INTEGER NOT NULL,
    PRIMARY KEY (kind, offset)
) WITHOUT ROWID;
CREATE UNIQUE INDEX alive_key ON alive (kind, key);
CREATE INDEX alive_id ON alive (id, kind, offset);
"""
_YOUNGEST = (
    " AND NOT EXISTS (SELECT 1 FROM alive o WHERE o.id = a.id AND o.kind = a.kind AND o.offset > a.offset)"
)


class AsideTopics:
    def __init__(
        self,
        topics: dict[str, Topic],
        admin: Admin,
        reader: Callable[[], Reader],
        sender: Sender,
        index_path: str | os.PathLike[str] | None,
    ) -> None:
        self._topics = topics
        self._admin = admin
        self._reader = reader
        self._sender = sender
        self._path = Path(index_path) if index_path is not None else None
        self._database: sqlite3.Connection | None = None

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    # --- writing ------------------------------------------------------------------------------------------------

    def put(self, tasks: Sequence[Aside]) -> None:
        if not tasks:
            return
        tasks = [self._fitting(task) for task in tasks]
        try:
            replaced = self._with_index(lambda database: _others(database, tasks))
        except LogUnusable as error:
            raise Unsent(str(error)) from error
        # The new ones first: a crash between the two leaves the older ones behind the younger.
        self._send(
            [_record(self._topics[task.kind].name, task) for task in tasks] + self._tombstones(replaced)
        )

    def drop(self, tasks: Sequence[Aside]) -> None:
        if not tasks:
            return
        try:
            dropped = self._with_index(lambda database: _dropped(database, tasks))
        except LogUnusable as error:
            raise Unsent(str(error)) from error
        self._send(self._tombstones(dropped))

    def _tombstones(self, keys: Iterable[tuple[str, bytes]]) -> list[dict[str, Any]]:
        return [
            {"topic": self._topics[kind].name, "partition": 0, "key": key, "value": None}
            for kind, key in keys
        ]

    def _send(self, records: Sequence[dict[str, Any]]) -> None:
        self._sender.send_each(records, self._message_bytes_max)

    @property
    def _message_bytes_max(self) -> int:
        return min(topic.message_bytes_max for topic in self._topics.values())

    def _fitting(self, task: Aside) -> Aside:
        """What Kafka would not take is cut: a partition must not stand still for what cannot be decoded."""
        if task.kind not in self._topics:
            raise ValueError(f"kind={task.kind!r} must be one of {', '.join(self._topics)}")
        reason = task.reason.encode(errors="replace")
        if len(reason) > _REASON_BYTES_MAX:
            task = msgspec.structs.replace(task, reason=reason[:_REASON_BYTES_MAX].decode(errors="ignore"))
        room = self._message_bytes_max - _RECORD_BYTES - len(task.reason.encode(errors="replace")) - 100
        if len(task.message) > room:
            said = f"{task.reason} (the first {room} of its {len(task.message)} bytes are kept)"
            task = msgspec.structs.replace(task, message=task.message[:room], reason=said)
        return task

    # --- questions ----------------------------------------------------------------------------------------------

    def page(self, kind: str, after: int, limit: int) -> list[tuple[int, Aside]]:
        def ask(database: sqlite3.Connection) -> list[tuple[int, Aside]]:
            rows = database.execute(
                "SELECT offset + 1, kind, id, message, reason, at_ms FROM alive a"
                f" WHERE kind = ? AND offset >= ?{_YOUNGEST} ORDER BY offset LIMIT ?",
                (kind, after, limit),
            )
            return [(row[0], Aside(*row[1:])) for row in rows]

        return self._with_index(ask)

    def find(self, ids: Ids) -> list[Aside]:
        columns = "SELECT kind, id, message, reason, at_ms FROM alive a WHERE id"

        def ask(database: sqlite3.Connection) -> list[Aside]:
            rows: list[tuple[Any, ...]] = []
            for start, count in ids.runs:
                rows += database.execute(
                    f"{columns} BETWEEN ? AND ?{_YOUNGEST} ORDER BY id, kind", (start, start + count - 1)
                )
            for key in ids.keys:
                rows += database.execute(f"{columns} = ?{_YOUNGEST} ORDER BY kind", (key,))
            return [Aside(*row) for row in rows]

        return self._with_index(ask)

    # --- the index ----------------------------------------------------------------------------------------------

    def _with_index(self, ask: Callable[[sqlite3.Connection], T]) -> T:
        """The answer of an index that has all that stood in the topics when the question came."""
        for attempt in range(3):
            try:
                database = self._ready()
                ends = self._admin.ends((topic.name, 0) for topic in self._topics.values())
                for kind, topic in self._topics.items():
                    self._catch_up(database, kind, topic.name, ends[topic.name, 0])
                return ask(database)
            except sqlite3.DatabaseError as error:
                self.close()
                if attempt == 2 or not _is_damage(error):
                    raise LogUnusable(f"{self._path or 'the index of what lies aside'}: {error}") from error
                self._remove()  # a copy that is damaged is worth nothing
        raise AssertionError("not reached")

    def _ready(self) -> sqlite3.Connection:
        if self._database is not None:
            return self._database
        identity = f"{FORMAT} " + " ".join(
            f"{kind}={topic.id}" for kind, topic in sorted(self._topics.items())
        )
        for _ in range(2):
            database = self._connect()
            if _prepare(database, identity, self._topics):
                self._database = database
                return database
            database.close()
            self._remove()
        raise LogUnusable(f"{self._path}: another process keeps making an index of other topics")

    def _connect(self) -> sqlite3.Connection:
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Messages may be confidential.
                os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
            except OSError as error:
                raise LogUnusable(f"{self._path}: {error.strerror}") from error
        database = sqlite3.connect(self._path or ":memory:", isolation_level=None, check_same_thread=False)
        database.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        database.execute("PRAGMA journal_mode = WAL")
        # A copy: what a power cut takes is read again.
        database.execute("PRAGMA synchronous = NORMAL")
        return database

    def _remove(self) -> None:
        if self._path is not None:
            for end in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    Path(f"{self._path}{end}").unlink()

    def _catch_up(self, database: sqlite3.Connection, kind: str, topic: str, end: int) -> None:
        low = None
        while True:
            ((position,),) = database.execute("SELECT next FROM topics WHERE kind = ?", (kind,))
            if position > end and position > self._admin.ends([(topic, 0)])[topic, 0]:
                # Asked again, because another process may have been here. A topic that lost its end is another one.
                raise sqlite3.DatabaseError("the index is ahead of its topic")
            if position >= end:
                return
            if low is None:
                low = self._admin.lows([(topic, 0)])[topic, 0]
            try:
                records, after = self._reader().read(topic, 0, max(position, low), _RECORDS, _BYTES)
            except Passed:
                low = None
                continue
            if after == position:
                return
            _take_in(database, kind, position, after, low, records)


def key_of(task: Aside) -> bytes:
    digest = hashlib.blake2b(digest_size=16, person=b"oncekeeper-aside")
    reason = task.reason.encode(errors="replace")
    digest.update(b"%d %d " % (task.at_ms, len(reason)))
    digest.update(reason)
    digest.update(task.message)
    return f"{task.kind}/{id_text(task.id)}/{digest.hexdigest()}".encode()


def _record(topic: str, task: Aside) -> dict[str, Any]:
    headers = [
        ("reason", task.reason.encode(errors="replace")),
        ("at_ms", str(task.at_ms).encode()),
        ("id", id_text(task.id).encode()),
    ]
    return {"topic": topic, "partition": 0, "key": key_of(task), "value": task.message, "headers": headers}


def _aside_of(kind: str, record: Message) -> Aside | None:
    """None for what is not of this package: somebody wrote into the topic."""
    found = {name: value for name, value in _headers(record) if isinstance(value, bytes)}
    try:
        return Aside(
            kind,
            parse_id(found["id"].decode()),
            bytes(record.value() or b""),
            found["reason"].decode(),
            int(found["at_ms"]),
        )
    except (KeyError, ValueError):
        return None


def _headers(record: Message) -> list[tuple[str, str | bytes | None]]:
    given: Any = record.headers()
    return given or []


def _take_in(
    database: sqlite3.Connection, kind: str, position: int, after: int, low: int, records: Sequence[Message]
) -> None:
    """Records and position together; nothing if another process was quicker."""
    database.execute("BEGIN IMMEDIATE")
    try:
        ((standing,),) = database.execute("SELECT next FROM topics WHERE kind = ?", (kind,))
        if standing == position:
            database.execute("DELETE FROM alive WHERE kind = ? AND offset < ?", (kind, low))
            for record in records:
                key = record.key()
                if key is None:
                    continue
                database.execute("DELETE FROM alive WHERE kind = ? AND key = ?", (kind, key))
                task = _aside_of(kind, record) if record.value() is not None else None
                if task is not None:
                    row = (kind, record.offset(), task.id, key, task.message, task.reason, task.at_ms)
                    database.execute("INSERT INTO alive VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            database.execute("UPDATE topics SET next = ? WHERE kind = ?", (after, kind))
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _prepare(database: sqlite3.Connection, identity: str, kinds: Iterable[str]) -> bool:
    """Whether the index is one of these topics; an empty one becomes it."""
    database.execute("BEGIN IMMEDIATE")
    try:
        if not database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            for statement in filter(str.strip, _SCHEMA.split(";")):
                database.execute(statement)
            database.execute("INSERT INTO meta VALUES ('identity', ?)", (identity,))
            database.executemany("INSERT INTO topics VALUES (?, 0)", [(kind,) for kind in kinds])
        found = database.execute("SELECT value FROM meta WHERE name = 'identity'").fetchone()
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    return found is not None and found[0] == identity


def _others(database: sqlite3.Connection, tasks: Sequence[Aside]) -> list[tuple[str, bytes]]:
    """Keys that are alive beside the content that is to be stored."""
    found: dict[tuple[str, bytes], None] = {}
    new = {(task.kind, key_of(task)) for task in tasks}
    for task in tasks:
        for (key,) in database.execute(
            "SELECT key FROM alive WHERE id = ? AND kind = ?", (task.id, task.kind)
        ):
            if (task.kind, key) not in new:
                found[task.kind, key] = None
    return list(found)


def _dropped(database: sqlite3.Connection, tasks: Sequence[Aside]) -> list[tuple[str, bytes]]:
    """Keys that are alive: of the content that is to be dropped, and before it of what is older than that."""
    found: list[tuple[str, bytes]] = []
    for task in tasks:
        rows = database.execute(
            "SELECT key FROM alive WHERE id = ? AND kind = ? AND offset <="
            " (SELECT offset FROM alive WHERE kind = ? AND key = ?) ORDER BY offset",
            (task.id, task.kind, task.kind, key_of(task)),
        )
        found += [(task.kind, key) for (key,) in rows]
    return found


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Not a lock, nor a full disk: those are no reason to throw the index away."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,  # a table or column that is missing
        sqlite3.SQLITE_CONSTRAINT,
    )
