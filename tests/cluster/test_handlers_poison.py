"""Messages that cannot be run: each becomes a dead letter that says why, and its partition moves on.

RELIABILITY 32. The rows are put into the log's file behind the back of every check that a client makes.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator

import pytest
from google_crc32c import value as crc32c

from dedup.ids import keyed_id
from tests.support.real_cluster import RealCluster

PARTITIONS = 12


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    with RealCluster(tmp_path_factory.mktemp("poison")) as running:
        running.start()
        running.wait_up()
        yield running


def put_row(
    cluster: RealCluster, partition: int, message: bytes, count: int = 1, *, crc: int | None = None
) -> int:
    """As an append writes it; the base offset."""
    database = sqlite3.connect(cluster.cluster.dir / "log" / "tasks.db", timeout=10, isolation_level=None)
    try:
        database.execute("BEGIN IMMEDIATE")
        (end,) = database.execute("SELECT end FROM partitions WHERE partition = ?", (partition,)).fetchone()
        database.execute(
            "INSERT INTO batches (place, count, first_id, stored_ms, crc, message) VALUES (?, ?, NULL, ?, ?, ?)",
            (
                partition << 44 | end,
                count,
                time.time_ns() // 1_000_000,
                crc32c(message) if crc is None else crc,
                message,
            ),
        )
        database.execute("UPDATE partitions SET end = end + ? WHERE partition = ?", (count, partition))
        database.execute("COMMIT")
    finally:
        database.close()
    cluster.client.wake()
    return int(end)


POISON = {
    "no JSON": b"\xff\xfe not json",
    "another thing": b'{"hello": "world"}',
    "a newer version": json.dumps(
        {"v": 99, "id": "7", "handler": "real.once", "queue": "default", "body": {}}
    ).encode(),
    "nothing at all": b"",
}


@pytest.mark.parametrize("what", POISON)
def test_what_cannot_be_decoded_becomes_a_dead_letter_and_its_partition_moves_on(
    cluster: RealCluster, what: str
) -> None:
    dead_before = cluster.wait_idle()["tasks"]["dead"]
    partition = list(POISON).index(what)
    base = put_row(cluster, partition, POISON[what])
    after = [cluster.submit("once", count=3) for _ in range(PARTITIONS)]
    cluster.check()
    assert [count for some in after for count in cluster.effects_of(some)] == [1] * 3 * PARTITIONS
    status = cluster.status()
    assert status is not None
    assert status["tasks"]["dead"] == dead_before + 1
    task_id = "k" + keyed_id("undecodable", f"{partition}/{base}").hex()
    story = cluster.cli("task", "show", task_id)
    assert (story["state"], story["aside"]["kind"]) == ("dead", "dead")
    assert story["aside"]["reason"]


@pytest.mark.parametrize("late", [False, True], ids=["back at once", "back late"])
def test_poison_whose_claim_was_lost_with_its_node_becomes_a_dead_letter_too(
    cluster: RealCluster, late: bool
) -> None:
    dead_before = cluster.wait_idle()["tasks"]["dead"]
    cluster.stop("n2")
    cluster.start("n2", crash_at="after_claim")
    cluster.wait_up()
    for partition in range(PARTITIONS):
        put_row(cluster, partition, b"poison")
    ids = cluster.client.send("real.unheard_of", [b"{}"] * 5)
    cluster.acknowledged(ids, "once")
    assert cluster.died() == "n2"
    if late:  # its session lapses first, and the others decide without its testimony
        cluster.wait_idle()
    cluster.start("n2")
    cluster.wait_up()
    cluster.check()
    status = cluster.status()
    assert status is not None
    assert status["tasks"]["dead"] == dead_before + PARTITIONS + 5


def test_a_row_that_was_damaged_on_disk_becomes_dead_letters_for_each_of_its_tasks(
    cluster: RealCluster,
) -> None:
    dead_before = cluster.wait_idle()["tasks"]["dead"]
    message = json.dumps({"handler": "real.once", "body": {"name": "x"}}).encode()
    put_row(cluster, 5, message, 3, crc=crc32c(message) ^ 1)
    cluster.check()
    status = cluster.status()
    assert status is not None
    assert status["tasks"]["dead"] == dead_before + 3


@pytest.mark.parametrize(
    ("handler", "body", "reason"),
    [
        ("real.unheard_of", b'{"name": "x"}', "not registered"),
        ("real.once", b'{"name": 7}', "name"),
        ("real.once", b'{"nam": "x"}', "nam"),
        ("real.once", b"{}", "name"),
        ("real.reckon", b'{"name": "x", "do": []}', "do"),
    ],
)
def test_what_no_handler_can_take_becomes_a_dead_letter_that_says_why(
    cluster: RealCluster, handler: str, body: bytes, reason: str
) -> None:
    ids = cluster.client.send(handler, [body] * 3)
    cluster.acknowledged(ids, "once")
    good = cluster.submit("once", count=20)
    cluster.check()
    assert [cluster.state(task_id) for task_id in ids] == ["dead"] * 3
    assert cluster.effects_of(ids) == [0] * 3
    assert cluster.effects_of(good) == [1] * 20
    story = cluster.cli("task", "show", str(next(iter(ids))))
    assert reason in story["aside"]["reason"]


def test_a_dead_letter_takes_effect_once_when_its_handler_was_mended_and_it_is_retried(
    cluster: RealCluster,
) -> None:
    ids = cluster.submit("stubborn", count=2)
    cluster.wait_idle()
    assert [cluster.state(task_id) for task_id in ids] == ["dead"] * 2
    assert set(cluster.stop().values()) == {0}
    (cluster.home / "mended").touch()
    cluster.start()
    cluster.wait_up()
    first, second = ids
    cluster.cli("task", "retry", str(first))
    cluster.check()
    assert [cluster.state(task_id) for task_id in ids] == ["executed", "dead"]
    assert cluster.effects_of(ids) == [1, 0]
    cluster.cli("task", "retry", str(second))
    cluster.check()
    assert cluster.effects_of(ids) == [1, 1]
    cluster.cli("task", "retry", str(first), expect=1)
