"""The file of the embedded log: its tables, and how it is made and opened."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

from oncekeeper.errors import LogUnusable
from oncekeeper.log import delay_rows

FORMAT = 3
"""2: with delayed tasks; 3: with spans of them. A file of an earlier format is brought up to it when it is opened;
what reads that format only must not open it from then on: it would take what positions have passed for done, or
miss what is delayed for long."""
_UPGRADES = {1: delay_rows.SCHEMA, 2: delay_rows.UPGRADE}
CONNECT_TIMEOUT_S = 10.0  # for the pragmas and for making the tables; afterwards the log has its own

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE partitions (partition INTEGER PRIMARY KEY, end INTEGER NOT NULL, committed INTEGER NOT NULL);
CREATE TABLE batches (
    place INTEGER PRIMARY KEY,     -- partition << 44 | base offset
    count INTEGER NOT NULL,
    first_id INTEGER,              -- of a run of range ids; NULL for keyed ids
    stored_ms INTEGER NOT NULL,    -- epoch
    crc INTEGER NOT NULL,          -- CRC32C of the message: SQLite has no checksums of its own outside the WAL
    message BLOB NOT NULL
);
CREATE INDEX batches_by_id ON batches (first_id, count) WHERE first_id IS NOT NULL;
CREATE TABLE keys (key BLOB, place INTEGER, PRIMARY KEY (key, place)) WITHOUT ROWID;
CREATE TABLE aside (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    id NOT NULL,                   -- INTEGER for a range id, BLOB for a keyed id
    kind TEXT NOT NULL,
    message BLOB NOT NULL,
    reason TEXT NOT NULL,
    at_ms INTEGER NOT NULL,
    UNIQUE (id, kind)
);
"""


def log_path(path: str | os.PathLike[str]) -> Path:
    """The database that ``path`` names: itself if it ends in ``.db``, else the one in a data directory."""
    given = Path(path)
    return given if given.suffix == ".db" else given / "log" / "tasks.db"


def connect(file: Path, create: bool) -> sqlite3.Connection:
    database = sqlite3.connect(
        f"{file.resolve().as_uri()}?mode={'rwc' if create else 'rw'}",
        uri=True,
        isolation_level=None,  # transactions begin and end where this module says so
        check_same_thread=False,  # one at a time all the same: the client hands its log from thread to thread
        timeout=CONNECT_TIMEOUT_S,
    )
    try:
        if not create and not _has_meta(database):
            raise LogUnusable(f"{file}: not a task log")  # before a pragma writes to somebody's file
        # Page size counts for a new file only. Rows are tens of kilobytes: fewer, larger pages.
        database.execute("PRAGMA page_size = 8192")
        _to_wal(database)
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA cache_size = -4096")
        database.execute("PRAGMA mmap_size = 0")  # an I/O error must be an error, not a SIGBUS
        # Once a bulk submit has blown the WAL up, the next checkpoint cuts it back to this.
        database.execute("PRAGMA journal_size_limit = 67108864")
    except (sqlite3.Error, LogUnusable):
        database.close()
        raise
    return database


def _to_wal(database: sqlite3.Connection) -> None:
    """A new file changes to WAL alone, and SQLite does not wait for that turn: it says "locked" at once."""
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
        else:
            return


def prepare(
    database: sqlite3.Connection, file: Path, create: bool, partitions: int, cluster_id: str
) -> dict[str, object]:
    """Make the tables of a new log, all or nothing; what ``meta`` says."""
    if create and not _has_meta(database):
        database.execute("BEGIN IMMEDIATE")
        try:
            if not _has_meta(database):  # another process may have made them meanwhile
                for statement in (_SCHEMA + delay_rows.SCHEMA).split(";\n"):
                    database.execute(statement)
                database.executemany(
                    "INSERT INTO meta VALUES (?, ?)",
                    [("format", FORMAT), ("cluster_id", cluster_id), ("partitions", partitions)],
                )
                database.executemany(
                    "INSERT INTO partitions VALUES (?, 0, 0)", [(number,) for number in range(partitions)]
                )
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        _sync_directory(file.parent)
    meta: dict[str, object] = dict(database.execute("SELECT name, value FROM meta"))
    if meta.get("format") in _UPGRADES:
        meta = _upgrade(database)
    if meta.get("format") != FORMAT:
        raise LogUnusable(
            f"{file}: format {meta.get('format')} is not the format {FORMAT} that this version reads: "
            "use the version of Oncekeeper that wrote it"
        )
    return meta


def _upgrade(database: sqlite3.Connection) -> dict[str, object]:
    """To this format, all or nothing; what ``meta`` says then."""
    database.execute("BEGIN IMMEDIATE")
    try:
        meta: dict[str, object] = dict(database.execute("SELECT name, value FROM meta"))
        upgrade = _UPGRADES.get(int(str(meta.get("format"))))
        if upgrade:  # another process may have done it meanwhile
            for statement in upgrade.split(";\n"):
                database.execute(statement)
            database.execute("UPDATE meta SET value = ? WHERE name = 'format'", (FORMAT,))
            meta["format"] = FORMAT
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    return meta


def _has_meta(database: sqlite3.Connection) -> bool:
    return database.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is not None


def _sync_directory(path: Path) -> None:
    """SQLite syncs files, not the name of a new database in its directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
