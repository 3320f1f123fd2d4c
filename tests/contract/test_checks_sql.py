"""checks.sql against a real SQLite file, with real processes that die and contend."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from dedup.ids import TaskId
from oncekeeper import AlreadyExecuted, App, InvalidHandler, SecondTransaction, checks
from oncekeeper.context import CurrentTask
from oncekeeper.handlers import Handler

PAYMENTS = "CREATE TABLE payments (order_id INTEGER, cents INTEGER)"


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONCEKEEPER_CLUSTER", raising=False)


def begin_ourselves(engine: sa.Engine, begin: str) -> None:
    """SQLAlchemy's own recipe for SQLite: the application begins each transaction, and the driver none."""

    @sa.event.listens_for(engine, "connect")
    def leave_it_to_us(connection: Any, _: object) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin_now(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)


@pytest.fixture(params=["", "BEGIN", "BEGIN IMMEDIATE"], ids=["driver begins", "BEGIN", "BEGIN IMMEDIATE"])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[sa.Engine]:
    """Every claim of this file holds however the application begins its transactions."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    if request.param:
        begin_ourselves(engine, request.param)
    with engine.begin() as connection:
        connection.exec_driver_sql(PAYMENTS)
    yield engine
    engine.dispose()


def task(task_id: TaskId = 7, fence: int = 100) -> CurrentTask:
    return CurrentTask(task_id, "shop.charge", fence)


def handler(engine: sa.Engine, function: object = None) -> Handler:
    app = App("shop")

    @app.task(on_doubt=checks.sql(engine))
    def charge(order_id: int) -> None:
        if callable(function):
            function(order_id)
            return
        with engine.begin() as connection:
            pay(connection, order_id)

    return charge.handler


def pay(connection: sa.Connection, order_id: int) -> None:
    connection.execute(sa.text("INSERT INTO payments VALUES (:id, 500)"), {"id": order_id})


def perform(handler: Handler, current: CurrentTask) -> None:
    with handler.running(current):
        handler.run(handler.decode(b'{"order_id": 1}'))


def took_effect(handler: Handler, current: CurrentTask) -> bool | None:
    return handler.check(current, handler.decode(b'{"order_id": 1}'))


def count(engine: sa.Engine, table: str = "payments") -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one())


def test_the_mark_stands_with_the_effect(engine: sa.Engine) -> None:
    charge = handler(engine)
    assert took_effect(charge, task()) is False
    perform(charge, task())
    assert took_effect(charge, task()) is True
    assert took_effect(charge, task(8)) is False
    assert (count(engine), count(engine, "oncekeeper_effects")) == (1, 1)


def test_asking_leaves_no_mark(engine: sa.Engine) -> None:
    charge = handler(engine)
    assert took_effect(charge, task()) is False
    perform(charge, task())
    assert count(engine) == 1


def test_a_second_run_of_the_same_task_is_rolled_back_whole(engine: sa.Engine) -> None:
    charge = handler(engine)
    perform(charge, task(fence=100))
    with pytest.raises(AlreadyExecuted, match="task 7 has taken effect before"):
        perform(charge, task(fence=200))
    assert count(engine) == 1


def test_a_handler_that_raises_before_its_commit_leaves_no_mark(engine: sa.Engine) -> None:
    def fail(order_id: int) -> None:
        with engine.begin() as connection:
            pay(connection, order_id)
            raise RuntimeError("no stock")

    charge = handler(engine, fail)
    with pytest.raises(RuntimeError, match="no stock"):
        perform(charge, task())
    assert took_effect(charge, task()) is False
    assert count(engine) == 0


def test_a_second_transaction_of_one_task_is_refused(engine: sa.Engine) -> None:
    def twice(order_id: int) -> None:
        for _ in range(2):
            with engine.begin() as connection:
                pay(connection, order_id)

    charge = handler(engine, twice)
    for _ in range(2):  # the next attempt must not take half an effect for the whole
        with pytest.raises(SecondTransaction, match="one mark cannot tell of two"):
            perform(charge, task())
        assert took_effect(charge, task()) is None
    assert count(engine) == 1


# With a BEGIN IMMEDIATE of its own, the application itself waits for itself, and is told by SQLite.
@pytest.mark.parametrize("engine", ["", "BEGIN"], indirect=True)
def test_writing_on_two_connections_at_a_time_is_refused_and_does_not_hang(engine: sa.Engine) -> None:
    def both(order_id: int) -> None:
        with engine.begin() as one, engine.begin() as two:
            pay(one, order_id)
            pay(two, order_id)

    with pytest.raises(SecondTransaction, match="two connections at a time"):
        perform(handler(engine, both), task())
    assert count(engine) == 0


def test_reading_transactions_are_not_marked(engine: sa.Engine) -> None:
    def look_then_pay(order_id: int) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text("/* how many? */ SELECT count(*) FROM payments")).all()
        with engine.begin() as connection:
            pay(connection, order_id)

    charge = handler(engine, look_then_pay)
    perform(charge, task())
    assert took_effect(charge, task()) is True
    assert count(engine) == 1


def test_a_transaction_that_was_rolled_back_may_be_followed_by_one_that_commits(engine: sa.Engine) -> None:
    def try_twice(order_id: int) -> None:
        with engine.connect() as connection:
            pay(connection, order_id)
            connection.rollback()
            pay(connection, order_id)
            connection.commit()

    charge = handler(engine, try_twice)
    perform(charge, task())
    assert (count(engine), took_effect(charge, task())) == (1, True)


def test_an_orm_session_is_marked_too(engine: sa.Engine) -> None:
    def with_session(order_id: int) -> None:
        with Session(engine) as session:
            session.execute(sa.text("INSERT INTO payments VALUES (:id, 1)"), {"id": order_id})
            with session.begin_nested():
                session.execute(sa.text("INSERT INTO payments VALUES (:id, 2)"), {"id": order_id})
            session.commit()

    charge = handler(engine, with_session)
    perform(charge, task())
    with pytest.raises(AlreadyExecuted):
        perform(charge, task())
    assert (count(engine), took_effect(charge, task())) == (2, True)


def test_the_engine_outside_of_tasks_is_left_alone(engine: sa.Engine) -> None:
    handler(engine)
    with engine.begin() as connection:
        pay(connection, 1)
    with engine.begin() as connection:
        pay(connection, 2)
    assert count(engine) == 2


def test_two_handlers_on_one_engine_keep_their_marks_apart(engine: sa.Engine) -> None:
    one, two = handler(engine), handler(engine)
    perform(one, task(1))
    perform(two, task(2))
    assert count(engine, "oncekeeper_effects") == 2


def test_autocommit_is_refused(tmp_path: Path, engine: sa.Engine) -> None:
    automatic = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")

    def by_option(order_id: int) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            pay(connection, order_id)

    for charge in (handler(engine, by_option), handler(automatic)):
        with pytest.raises(SecondTransaction, match="AUTOCOMMIT"):
            perform(charge, task())
    assert count(engine) == 0


def test_a_database_out_of_reach_cannot_tell(tmp_path: Path) -> None:
    strategy = checks.sql(f"sqlite:///{tmp_path}/missing/shop.db")
    assert strategy.took_effect(task(), {}) is None
    with pytest.raises(sa.exc.OperationalError), strategy.recording(task()):
        pass


def test_an_application_that_begins_its_own_transactions_is_respected(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'own.db'}")

    @sa.event.listens_for(engine, "connect")
    def _connect(driver: object, record: object) -> None:
        driver.isolation_level = None  # type: ignore[attr-defined]

    charge = handler(engine)

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    with engine.begin() as connection:
        connection.exec_driver_sql(PAYMENTS)
    perform(charge, task())
    with pytest.raises(AlreadyExecuted):
        perform(charge, task())
    assert (count(engine), took_effect(charge, task())) == (1, True)


def test_an_async_engine_is_refused_with_advice() -> None:
    class Async:
        sync_engine = None

    with pytest.raises(InvalidHandler, match="handler that is not async"):
        checks.sql(Async())  # type: ignore[arg-type]


def test_marks_of_another_cluster_do_not_count(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        directory = tmp_path / f"cluster{number}"
        directory.mkdir()
        (directory / "cluster.json").write_text(f'{{"format": 1, "cluster_id": "c{number}", "nodes": {{}}}}')
        (directory / "secret").write_text("ab" * 32)
        monkeypatch.setenv("ONCEKEEPER_CLUSTER", str(directory))
        charge = handler(engine)
        assert took_effect(charge, task()) is False
        perform(charge, task())
    assert count(engine) == 2


WORKER = """
import os, sys
import sqlalchemy as sa
from oncekeeper import AlreadyExecuted, checks
from oncekeeper.context import CurrentTask
url, mode, ids = sys.argv[1], sys.argv[2], sys.argv[3:]
engine = sa.create_engine(url)
marks = checks.sql(engine)
for text in ids:
    try:
        with marks.recording(CurrentTask(int(text), "shop.charge", 1)):
            with engine.begin() as connection:
                n = connection.execute(sa.text("SELECT count(*) FROM payments")).scalar_one()
                connection.execute(sa.text("INSERT INTO payments VALUES (:id, :n)"), {"id": int(text), "n": n})
                if mode == "die": os.kill(os.getpid(), 9)
        if mode == "die after": os.kill(os.getpid(), 9)
    except AlreadyExecuted:
        pass
"""


def worker(engine: sa.Engine, mode: str, *ids: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORKER, str(engine.url), mode, *map(str, ids)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], env=dict(os.environ))


@pytest.mark.parametrize(("mode", "effect"), [("die", False), ("die after", True)])
def test_a_killed_process_is_judged_rightly(engine: sa.Engine, mode: str, effect: bool) -> None:
    assert worker(engine, mode, 7).wait() == -signal.SIGKILL
    assert took_effect(handler(engine), task()) is effect
    assert count(engine) == effect


def test_contending_processes_pay_each_order_once_and_see_each_others_writes(engine: sa.Engine) -> None:
    orders = range(1, 41)
    workers = [worker(engine, "live", *orders) for _ in range(3)]
    assert [process.wait() for process in workers] == [0, 0, 0]
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT order_id, cents FROM payments ORDER BY rowid").all()
    assert sorted(order for order, _ in rows) == list(orders)
    # Each read the number of payments before its own: none was lost between reading and writing.
    assert [seen for _, seen in rows] == list(range(len(orders)))
