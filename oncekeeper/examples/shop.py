"""An example application: a shop that charges orders and sends receipts, each exactly once.

``charge`` moves money, in one database transaction. Its check is ready-made: ``checks.sql`` records the
task's id in that same transaction, so that afterwards the database itself can tell whether the charge took
effect.

``send_receipt`` appends a line to a file and cannot do that in a transaction. Its check is our own: look
into the file.

SQLite stands for the shop's database. In WAL mode with synchronous=NORMAL a commit survives the death of
any process, at any moment, which is what the demo inflicts. It does not survive a power cut: the last
commits before it may then be missing. Where money is at stake set SHOP_SYNCHRONOUS=FULL, which waits for
the disk at each commit (on a disk that takes 2.5 ms for that: 400 charges a second instead of thousands).
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Integer, MetaData, Table, create_engine, event, insert
from sqlalchemy.schema import CreateTable

from oncekeeper import App, checks
from oncekeeper.examples.traps import pause_if_told

HOME = Path(os.environ.get("SHOP_DIR", "shop-data")).absolute()
SYNCHRONOUS = os.environ.get("SHOP_SYNCHRONOUS", "NORMAL")

app = App("shop")

money = MetaData()
# No unique constraint: should an order be charged twice, both rows are to be seen.
effects = Table(
    "effects",
    money,
    Column("row", Integer, primary_key=True),
    Column("order_id", Integer, nullable=False),
    Column("amount_cents", Integer, nullable=False),
    Column("at_ms", Integer, nullable=False),
)

engine = create_engine(f"sqlite:///{HOME / 'money.db'}", connect_args={"timeout": 30})
# SQLite has one writer. The threads of a process take turns here, and not by SQLite's sleeping and trying
# again.
one_writer = threading.Lock()


@event.listens_for(engine, "do_connect")
def _make_directory(*_: object) -> None:
    HOME.mkdir(parents=True, exist_ok=True)


@event.listens_for(engine, "connect")
def _prepare(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
    connection.execute(str(CreateTable(effects, if_not_exists=True).compile(engine)))


@app.task(kind="io", length="short", ttr=60, retries=5, on_doubt=checks.sql(engine))
def charge(order_id: int, amount_cents: int) -> str:
    row = {"order_id": order_id, "amount_cents": amount_cents, "at_ms": time.time_ns() // 1_000_000}
    with one_writer, engine.begin() as transaction:
        transaction.execute(insert(effects).values(**row))
        pause_if_told(HOME, f"before-commit-{order_id}")
    pause_if_told(HOME, f"after-commit-{order_id}")
    return f"charged {amount_cents} cents"


@app.task(kind="io", length="short", ttr=60, retries=5, on_doubt="check")
def send_receipt(order_id: int, to: str) -> None:
    line = f"{order_id} {to}\n".encode()
    # One write to a file opened for appending: lines of several processes do not mix.
    file = os.open(HOME / "receipts.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)
    pause_if_told(HOME, f"after-receipt-{order_id}")


@send_receipt.check
def receipt_was_sent(order_id: int, to: str) -> bool | None:
    try:
        return f"{order_id} {to}" in (HOME / "receipts.txt").read_text().splitlines()
    except FileNotFoundError:
        return False  # nobody has sent any yet
