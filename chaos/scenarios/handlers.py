"""RELIABILITY 31 to 35: what clients and handlers do to themselves."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable

from google_crc32c import value as crc32c

from chaos import history as h
from chaos.history import History
from chaos.scenarios.load import Kind
from chaos.scenarios.run import Scenario
from chaos.scenarios.stage import Stage
from dedup.ids import TaskId, id_text

SENDERS = 8
POISON = (b"\xff\xfe not json", b'{"hello": "world"}', b"")


def same_key(stage: Stage) -> None:
    keys = [f"order-{number}" for number in range(20)]
    kind = stage.kind("write")

    def submit() -> None:
        for key in keys:
            stage.load.submit(kind, keys=(key,))

    for _ in range(2):
        threads = [threading.Thread(target=submit) for _ in range(SENDERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        stage.flow()
    stage.notes.append(f"{len(keys)} keys, each submitted {2 * SENDERS} times by {SENDERS} clients at once")


def poison(stage: Stage) -> None:
    """What no client of ours would send is put into the log's file; and tasks that no handler fits."""
    for partition, message in enumerate(POISON):
        _put_row(stage, partition, message)
    stage.load.submit(Kind("nobody.home", "check", (b"{}",)), 5)
    stage.load.submit(Kind(stage.kind("write").handler, "check", (b'{"no_such_argument": 1}',)), 5)
    stage.flow()

    def dead(history: History) -> list[str]:
        found = history.counted.dead if history.counted else 0
        wanted = len(POISON) + 10
        return [] if found == wanted else [f"{found} dead letters, {wanted} are right"]

    stage.afterwards.append(dead)


def _put_row(stage: Stage, partition: int, message: bytes) -> None:
    database = sqlite3.connect(stage.nodes.cluster.dir / "log" / "tasks.db", timeout=10, isolation_level=None)
    try:
        database.execute("BEGIN IMMEDIATE")
        (end,) = database.execute("SELECT end FROM partitions WHERE partition = ?", (partition,)).fetchone()
        row = (partition << 44 | end, 1, time.time_ns() // 1_000_000, crc32c(message), message)
        database.execute(
            "INSERT INTO batches (place, count, first_id, stored_ms, crc, message) VALUES (?, ?, NULL, ?, ?, ?)",
            row,
        )
        database.execute("UPDATE partitions SET end = end + 1 WHERE partition = ?", (partition,))
        database.execute("COMMIT")
    finally:
        database.close()
    stage.nodes.client.wake()


def _befalls(handlers: tuple[str, ...], deed: str, *, suspect: bool) -> Callable[[Stage], None]:
    def play(stage: Stage) -> None:
        nodes = stage.nodes
        pids = {node: nodes.pid(node) for node in nodes.names}
        terms = max(term for _, term in nodes.roles().values())
        traps = [stage.trap(handler, place, deed) for handler in handlers for place in ("before", "after")]
        for task_id in traps:
            stage.taken(task_id)
        stage.flow()
        stage.expect(
            all(nodes.is_running(node) and nodes.pid(node) == pid for node, pid in pids.items()),
            "a node died with its worker",
        )
        now = max(term for _, term in nodes.roles().values())
        stage.notes.append(f"{len(traps)} tasks: {deed.replace('_', ' ')}; terms {terms} to {now}")
        if suspect:
            stage.afterwards += [_was_in_doubt(task_id) for task_id in traps]

    return play


def _was_in_doubt(task_id: TaskId) -> Callable[[History], list[str]]:
    def look(history: History) -> list[str]:
        seen = any(isinstance(each, h.Suspected) and each.id == task_id for each in history.decisions)
        return (
            [] if seen else [f"{id_text(task_id)}: its worker died in mid-flight, and it was never a suspect"]
        )

    return look


HANDLERS = (
    Scenario(
        31,
        "same-key",
        "the same keys, submitted by many at once and again",
        "one execution",
        same_key,
        smoke=True,
    ),
    Scenario(
        32,
        "poison",
        "rows that cannot be decoded, unknown handlers, wrong arguments",
        "dead letters; the partitions move on",
        poison,
    ),
    Scenario(
        33,
        "handler-hangs",
        "handlers hang beyond their time to run",
        "deadline, the slot is freed",
        _befalls(("hasty", "hasty_reckon"), "hang", suspect=True),
    ),
    Scenario(
        34,
        "handler-crashes",
        "handlers crash their process, and exhaust its memory",
        "the node lives, the task is suspect",
        _befalls(("write", "reckon", "drift"), "crash", suspect=True),
    ),
    Scenario(
        34,
        "handler-eats-memory",
        "a handler takes all the memory it can get",
        "the node lives, the task is suspect",
        _befalls(("reckon",), "eat_memory", suspect=False),
        settings={"memory_bytes_max": 256 << 20},
    ),
    Scenario(
        35,
        "interpreter-held",
        "a handler never lets go of the interpreter's lock",
        "Raft still ticks; deadline, the slot is freed",
        _befalls(("hasty", "hasty_reckon"), "hold_interpreter", suspect=True),
    ),
)
