"""The machine's bare limits: what each step would cost if the product added nothing to it."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from node.bench.measure import Plan, median

RECORD_BYTES = 128
PING_BYTES = 64
PAGE_BYTES = 4096


def bare_limits(plan: Plan) -> dict[str, float]:
    """Medians of three, each per second."""
    home = plan.home / "bare"
    home.mkdir()
    found: dict[str, list[float]] = {}
    takes: dict[str, Callable[[], float]] = {
        "sqlite_rows_s": lambda: sqlite_rows_s(home / "rows.db", plan.bulk_tasks),
        "pipe_round_trips_s": lambda: pipe_round_trips_s(plan.bare_s),
        "journal_syncs_s": lambda: syncs_s(home / "journal", plan.bare_s, RECORD_BYTES, os.fdatasync),
        "fsyncs_s": lambda: syncs_s(home / "page", plan.bare_s, PAGE_BYTES, os.fsync),
        "effects_s": lambda: effects_s(home / "effects", plan.bare_s),
    }
    for _ in range(3):
        for name, take in takes.items():
            found.setdefault(name, []).append(take())
    return {name: round(median(samples), 1) for name, samples in found.items()}


def sqlite_rows_s(path: Path, count: int) -> float:
    """Rows of one durable transaction, a row a task, with the body that the bench's tasks have."""
    database = sqlite3.connect(path, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY, handler TEXT, body BLOB)")
        rows = [(number, "bench.rerun", b'{"number":%d}' % number) for number in range(count)]
        began = time.perf_counter()
        database.execute("BEGIN IMMEDIATE")
        database.executemany("INSERT INTO tasks VALUES (?, ?, ?)", rows)
        database.execute("COMMIT")
        return count / (time.perf_counter() - began)
    finally:
        database.close()
        path.unlink()


def pipe_round_trips_s(seconds: float) -> float:
    """A message to another process and back, over a socket pair: the least that a worker costs."""
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            here.close()
            while data := there.recv(PING_BYTES):
                there.sendall(data)
        finally:
            os._exit(0)
    there.close()
    message = bytes(PING_BYTES)

    def turn() -> None:
        here.sendall(message)
        here.recv(PING_BYTES)

    try:
        return _rate(turn, seconds)
    finally:
        here.close()
        os.waitpid(child, 0)


def syncs_s(path: Path, seconds: float, size: int, sync: Callable[[int], None]) -> float:
    """Appends of ``size`` bytes, each synced: what one disk can acknowledge one after the other."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    record = os.urandom(size)

    def append() -> None:
        os.write(file, record)
        sync(file)

    try:
        return _rate(append, seconds)
    finally:
        os.close(file)


def effects_s(path: Path, seconds: float) -> float:
    """The effect alone: eight bytes appended, by one process, unsynced."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    record = bytes(8)
    try:
        return _rate(lambda: os.write(file, record), seconds)
    finally:
        os.close(file)


def _rate(turn: Callable[[], object], seconds: float) -> float:
    clock = time.perf_counter
    turn()
    count, began = 0, clock()
    while (now := clock()) - began < seconds:
        for _ in range(8):
            turn()
        count += 8
    return count / (now - began)
