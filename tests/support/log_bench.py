"""How fast tasks are submitted and read, beside bare SQLite: ``python -m tests.support.log_bench [TASKS]``.

Prints medians of three runs. Not a test: nothing here is asserted.
"""

from __future__ import annotations

import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from oncekeeper import App, Client
from oncekeeper.app import SyncTask
from oncekeeper.idsource import IdSource
from oncekeeper.log.embedded import open_log
from tests.support.log_cluster import closed_port, data_directory


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare_rows(path: Path, count: int) -> float:
    """Rows a second of one transaction with the same body a row."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY, handler TEXT, body BLOB)")
    rows = [(n, "shop.charge", b'{"order_id":%d,"amount_cents":500}' % n) for n in range(count)]

    def insert() -> None:
        database.execute("BEGIN IMMEDIATE")
        database.executemany("INSERT INTO tasks VALUES (?, ?, ?)", rows)
        database.execute("COMMIT")

    rate = count / timed(insert)
    database.close()
    return rate


def read_all(directory: Path) -> tuple[int, float]:
    log, tasks = open_log(directory), 0
    start = time.perf_counter()
    for partition in range(log.partitions):
        offset = 0
        while found := log.read(partition, offset, 4096, 1 << 24):
            offset = found[-1].base + len(found[-1].batch)  # type: ignore[union-attr]
        tasks += offset
    elapsed = time.perf_counter() - start
    log.close()
    return tasks, elapsed


def once(count: int) -> dict[str, float]:
    app = App("shop")

    @app.task
    def charge(order_id: int, amount_cents: int) -> None: ...

    task: SyncTask[[int, int], None] = charge
    with tempfile.TemporaryDirectory(prefix="oncekeeper-bench-") as name:
        directory = data_directory(Path(name) / "d", [f"127.0.0.1:{closed_port()}"], [closed_port()])
        client = Client(directory)
        given = iter(range(1, 1 << 62, 1 << 20))
        client._ids = IdSource(lambda wanted: (next(given), wanted))  # no node: ids come from here
        app.use(client)
        items = [{"order_id": n, "amount_cents": 500} for n in range(count)]
        figures = {
            "bare SQLite rows/s": bare_rows(Path(name) / "bare.db", count),
            "submit_many tasks/s": count / timed(lambda: task.submit_many(items)),
        }
        tasks, elapsed = read_all(directory)
        figures["read us/task"] = elapsed / tasks * 1e6
        singles = sorted(timed(lambda: task.submit(1, 5)) for _ in range(200))
        figures["submit p50 ms"] = singles[100] * 1e3
        figures["submit p99 ms"] = singles[197] * 1e3
        client.close()
    return figures


def main() -> None:
    runs = [once(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000) for _ in range(3)]
    for name in runs[0]:
        print(f"{name:24}{statistics.median(run[name] for run in runs):14,.2f}")


if __name__ == "__main__":
    main()
