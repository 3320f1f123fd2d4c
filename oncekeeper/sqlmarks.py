"""Marks in the handler's own transaction (``checks.sql``). The only module that imports SQLAlchemy.

The mark is inserted in SQLAlchemy's ``commit`` event, which comes before the driver's commit: the last statement
of the transaction, so that what is locked by it is locked for a moment only. Its primary key does the rest:

- mark inserted and committed: the effect stands, and the check finds the mark;
- mark refused: another run of the task has committed, and this transaction is rolled back (AlreadyExecuted);
- process killed before the commit: the database rolls back both.

The check does not merely look: if there is no mark it tries to insert one and rolls back. That waits for a
transaction of a dead client that the server has not finished, and so False is final.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from oncekeeper.cluster import CLUSTER_VARIABLE, find_cluster
from oncekeeper.context import CurrentTask
from oncekeeper.errors import AlreadyExecuted, InvalidHandler, SecondTransaction

try:
    import sqlalchemy as sa
    from sqlalchemy import event
    from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
except ImportError as error:
    raise ImportError("checks.sql needs SQLAlchemy: install oncekeeper[sql]") from error

BUSY_TIMEOUT_MS = 30_000
"""How long a handler waits for SQLite's single writer: the driver's 5 s are short for many workers on one file."""

_WROTE = "oncekeeper_wrote"
_BUSY_SET = "oncekeeper_busy_set"
_FIRST_WORD = re.compile(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*([A-Za-z]*)", re.DOTALL)
_READS = frozenset({"SELECT", "PRAGMA", "SHOW", "EXPLAIN", "SET", "VALUES", "BEGIN", "SAVEPOINT", "RELEASE"})
_OUTSIDE = frozenset({"PRAGMA", "VACUUM", "ATTACH", "DETACH", "BEGIN", "COMMIT", "END", "ROLLBACK"})


class SqlMarks:
    """CheckStrategy over a SQLAlchemy engine. Safe for threads."""

    def __init__(self, engine: sa.Engine | str, table: str) -> None:
        if hasattr(engine, "sync_engine"):
            raise InvalidHandler(
                "checks.sql takes a synchronous engine: use it in a handler that is not async"
            )
        self._engine = sa.create_engine(engine) if isinstance(engine, str) else engine
        self._table = sa.Table(
            table,
            sa.MetaData(),
            # Range ids of another cluster are the same numbers: a database outlives a cluster.
            sa.Column("cluster", sa.String(64), primary_key=True),
            sa.Column("task_id", sa.String(64), primary_key=True),
            sa.Column("fence", sa.BigInteger, nullable=False),
            sa.Column("at", sa.DateTime(timezone=True), nullable=False),
            # Set when the handler went on to a second transaction: the effect stands in part.
            sa.Column("partial", sa.Boolean, nullable=False),
        )
        self._sqlite = self._engine.dialect.name == "sqlite"
        self._lock = threading.Lock()
        self._cluster: str | None = None
        self._ready_in = 0  # the process that has seen to the table
        event.listen(self._engine, "begin", self._on_begin)
        event.listen(self._engine, "before_cursor_execute", self._before_execute)
        event.listen(self._engine, "commit", self._on_commit)

    @property
    def engine(self) -> sa.Engine:
        return self._engine

    # --- CheckStrategy ----------------------------------------------------------------------------------------

    def recording(self, task: CurrentTask) -> AbstractContextManager[object]:
        self._prepare()
        return _Recording(self, task)

    def took_effect(self, task: CurrentTask, arguments: Mapping[str, Any]) -> bool | None:
        """Whether the mark stands; None if the database does not answer."""
        try:
            self._prepare()
            with self._engine.connect() as connection:
                if (partial := self._standing(connection, task)) is not None:
                    return None if partial else True
                connection.rollback()
                # Before our own BEGIN: the application may begin by itself, in a "begin" listener, as SQLAlchemy
                # recommends for SQLite; two BEGINs collide. If its is a deferred one, the insert waits instead.
                connection.begin()
                if self._sqlite:
                    self._begin_immediate(connection)
                try:
                    connection.execute(self._mark(task))
                except IntegrityError:
                    return True  # a transaction that was in flight has committed after all
                finally:
                    connection.rollback()
                return False
        except SQLAlchemyError:
            return None  # the node asks again later, and tells a human in the end

    # --- marks ------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make the table, once a process. Raises if the database is out of reach: the handler is not started."""
        with self._lock:
            if self._ready_in == os.getpid():
                return
            if self._cluster is None:
                # The node sets the variable for its workers. Where there is none (a test), there is one scope.
                self._cluster = find_cluster().cluster_id if os.environ.get(CLUSTER_VARIABLE) else ""
            try:
                self._table.create(self._engine, checkfirst=True)
            except DBAPIError:
                # Another worker may have made it between the look and the CREATE.
                if not sa.inspect(self._engine).has_table(self._table.name):
                    raise
            self._ready_in = os.getpid()

    def _key(self, task: CurrentTask) -> dict[str, Any]:
        return {"cluster": self._cluster or "", "task_id": task.id_text}

    def _mark(self, task: CurrentTask) -> sa.Insert:
        return self._table.insert().values(
            fence=task.fence, at=datetime.now(UTC), partial=False, **self._key(task)
        )

    def _is(self, task: CurrentTask) -> sa.ColumnElement[bool]:
        key, columns = self._key(task), self._table.c
        return sa.and_(columns.cluster == key["cluster"], columns.task_id == key["task_id"])

    def _standing(self, connection: sa.Connection, task: CurrentTask) -> bool | None:
        """Whether the mark that stands is of a partial effect; None if there is no mark."""
        partial = connection.execute(
            sa.select(self._table.c.partial).where(self._is(task))
        ).scalar_one_or_none()
        return None if partial is None else bool(partial)

    # --- events of the engine ---------------------------------------------------------------------------------

    def _task(self) -> _Recording | None:
        recording = _recording.get()
        return recording if recording is not None and recording.marks is self else None

    def _on_begin(self, connection: sa.Connection) -> None:
        connection.info.pop(_WROTE, None)  # info belongs to the driver's connection, which the pool reuses

    def _before_execute(
        self,
        connection: sa.Connection,
        cursor: Any,
        statement: str,
        parameters: Any,
        context: Any,
        executemany: bool,
    ) -> None:
        if (recording := self._task()) is None or recording.marking:
            return
        match = _FIRST_WORD.match(statement)
        word = match[1].upper() if match else ""
        if self._sqlite and word not in _OUTSIDE:
            # The driver begins a transaction before the first write only, and a deferred one at that: what was
            # read before it could have changed, and two writers would fail each other without waiting.
            self._take_write_lock(connection, recording, word)
        if word in _READS:
            return
        if _is_autocommit(connection):
            raise SecondTransaction(
                f"task {recording.task.id_text}: checks.sql cannot mark a connection with "
                'isolation_level="AUTOCOMMIT": every statement would be a transaction of its own'
            )
        connection.info[_WROTE] = True

    def _on_commit(self, connection: sa.Connection) -> None:
        recording = self._task()
        if recording is None or not connection.info.pop(_WROTE, False):
            return
        recording.marking = True
        try:
            connection.execute(self._mark(recording.task))
        except IntegrityError as error:
            self._roll_back(connection)
            raise self._refusal(connection, recording) from error
        except BaseException:
            self._roll_back(connection)
            raise
        finally:
            recording.marking = False
        # Whether the driver's commit succeeds is not known here. If it fails, the mark is gone too, and the
        # handler may try its transaction again: the insert decides, not this flag.
        recording.committed = True

    def _refusal(self, connection: sa.Connection, recording: _Recording) -> Exception:
        """Why the mark was refused. Leaves no transaction open."""
        text = recording.task.id_text
        if recording.committed:
            # Without a note of it, the next attempt would find the mark, and half an effect would count as whole.
            connection.execute(self._table.update().where(self._is(recording.task)).values(partial=True))
            connection.dialect.do_commit(connection.connection)
        partial = self._standing(connection, recording.task)
        self._roll_back(connection)
        if partial:
            return SecondTransaction(
                f"task {text}: the handler commits a second transaction, which was rolled back; one mark "
                "cannot tell of two: put the effect into one transaction, or submit the rest as a task"
            )
        return AlreadyExecuted(f"task {text} has taken effect before; this transaction was rolled back")

    def _roll_back(self, connection: sa.Connection) -> None:
        """At once, and not when the handler lets go of the connection: it may hold locks until then."""
        connection.dialect.do_rollback(connection.connection)

    def _take_write_lock(self, connection: sa.Connection, recording: _Recording, word: str) -> None:
        driver = connection.connection.dbapi_connection
        if (holder := recording.lock_holder) is not None and holder is not driver and holder.in_transaction:
            if word in _READS:
                return  # reads beside the writer; waiting for the lock would be waiting for itself
            raise SecondTransaction(
                f"task {recording.task.id_text}: the handler writes on two connections at a time; the second would "
                "wait for the first for ever: put all of the effect into one transaction"
            )
        self._begin_immediate(connection)
        recording.lock_holder = driver

    def _begin_immediate(self, connection: sa.Connection) -> None:
        driver: Any = connection.connection.dbapi_connection
        if _BUSY_SET not in connection.info:
            driver.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            connection.info[_BUSY_SET] = True
        if getattr(driver, "in_transaction", True):
            return  # begun already, perhaps by a listener of the application
        try:
            driver.execute("BEGIN IMMEDIATE")
        except connection.dialect.loaded_dbapi.Error as error:  # as SQLAlchemy would raise it
            raise sa.exc.OperationalError("BEGIN IMMEDIATE", None, error) from error


class _Recording:
    """One run of a handler."""

    __slots__ = ("_token", "committed", "lock_holder", "marking", "marks", "task")

    def __init__(self, marks: SqlMarks, task: CurrentTask) -> None:
        self.marks = marks
        self.task = task
        self.committed = False
        self.marking = False
        self.lock_holder: Any = None  # SQLite: the driver's connection in which the transaction was begun
        self._token: Token[_Recording | None] | None = None

    def __enter__(self) -> _Recording:
        self._token = _recording.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _recording.reset(self._token)


_recording: ContextVar[_Recording | None] = ContextVar("oncekeeper_sql_recording", default=None)


def _is_autocommit(connection: sa.Connection) -> bool:
    level = connection.get_execution_options().get("isolation_level")
    if level is None:
        # No public question exists for the level given to create_engine.
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return level == "AUTOCOMMIT"
