"""Delayed tasks in a cluster on a real broker: nodes killed at fire time; the whole history judged."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dedup.ids import Ids
from node.kafkaup.broker import Kafka
from oncekeeper.envelope import TaskBatch
from oncekeeper.errors import Refused
from oncekeeper.log.delayed import ENQUEUE
from tests.support.kafka_broker import Private
from tests.support.real_cluster import eventually
from tests.support.real_kafka import KafkaCluster, working_on


@pytest.fixture(scope="module")
def cluster(kafka: Kafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    with working_on(kafka, tmp_path_factory.mktemp("delays")) as running:
        yield running


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def submit(cluster: KafkaCluster, count: int, dues_ms: Sequence[int], others: str = ENQUEUE) -> int:
    """``count`` tasks of each due time, as submits store them; what happens then is ``others`` for one of six."""
    start = int(cluster.api().post("/v1/ids", {"count": count * len(dues_ms)})["start"])
    batches = []
    for number, due_ms in enumerate(dues_ms):
        ids = Ids(((start + number * count, count),))
        batches.append(
            TaskBatch(
                queue="default",
                handler="real.once",
                ids=ids,
                bodies=tuple(json.dumps({"name": cluster.name()}).encode() for _ in range(count)),
                due_ms=due_ms,
                then=others if number % 6 == 0 else "",
                submitted_ms=now_ms(),
            )
        )
        cluster.history.submit(ids, "check", due_ns=due_ms * 1_000_000)
    log = cluster.open_log()
    try:
        log.append(batches)
    finally:
        log.close()
    return count * len(dues_ms)


def kept(cluster: KafkaCluster) -> int:
    status: dict[str, Any] = cluster.status() or {"tasks": {"delayed": 0}}
    return int(status["tasks"]["delayed"])


def passed(cluster: KafkaCluster) -> bool:
    """Whether the positions have passed all that there is."""
    status = cluster.status()
    return status is not None and all(row["committed"] == row["end"] for row in status["partitions"])


def test_a_node_that_is_killed_when_its_tasks_are_due_leaves_them_to_others_and_each_runs_once(
    cluster: KafkaCluster,
) -> None:
    began = len(cluster.sink.read())
    due_ms = now_ms() + 20_000
    tasks = submit(cluster, 50, [due_ms + 20 * number for number in range(60)])
    eventually("all are handed on", lambda: kept(cluster) == tasks and passed(cluster))
    eventually("some have run", lambda: len(cluster.sink.read()) > began + 100)
    victim = next(iter(cluster.nodes))
    cluster.kill(victim)
    eventually("the others run them all", lambda: len(cluster.sink.read()) >= began + tasks, 60)
    cluster.start(victim)
    cluster.wait_up()
    cluster.check()
    assert len(cluster.sink.read()) == began + tasks


@pytest.mark.parametrize("crash_at", ["before_defer", "after_defer", "after_fetch", "before_drop"])
def test_a_node_that_is_killed_at_any_step_loses_none_and_none_runs_twice(
    cluster: KafkaCluster, crash_at: str
) -> None:
    began = len(cluster.sink.read())
    victim = next(iter(cluster.nodes))
    cluster.kill(victim)
    cluster.start(victim, crash_at=crash_at)
    cluster.wait_up()
    due_ms = now_ms() + 4_000
    tasks = submit(cluster, 20, [due_ms + 50 * number for number in range(24)])
    assert cluster.died(60) == victim
    cluster.start(victim)
    cluster.wait_up()
    eventually("all have run", lambda: len(cluster.sink.read()) >= began + tasks, 60)
    cluster.check()
    assert len(cluster.sink.read()) == began + tasks


def test_any_node_cancels_and_reschedules_any_task_and_the_answer_is_the_truth(cluster: KafkaCluster) -> None:
    began = len(cluster.sink.read())
    due_ms = now_ms() + 600_000
    tasks = submit(cluster, 10, [due_ms + number for number in range(6)])
    eventually("all are handed on", lambda: kept(cluster) == tasks and passed(cluster))
    ids = [str(task_id) for task_id in cluster.history.submitted][-tasks:]
    for number, task in enumerate(ids[:12]):
        node = cluster.api(cluster.nodes[number % 3])
        assert node.post(f"/v1/tasks/{task}/cancel")["state"] == "cancelled"
    soon = datetime.now(UTC).isoformat()
    for number, task in enumerate(ids[12:]):
        node = cluster.api(cluster.nodes[number % 3])
        assert node.post(f"/v1/tasks/{task}/reschedule", {"due": soon})["outcome"] == "rescheduled"
    for task_id in list(cluster.history.submitted)[-tasks:]:
        # It is due by what was said last.
        told = cluster.history.submitted[task_id]
        cluster.history.submitted[task_id] = msgspec.structs.replace(told, due_ns=0)
    eventually("what was rescheduled has run", lambda: len(cluster.sink.read()) == began + tasks - 12)
    cluster.check()
    assert len(cluster.sink.read()) == began + tasks - 12
    assert {name for name, _, _ in cluster.sink.read()}.isdisjoint(ids[:12])


def test_a_task_that_is_due_in_a_moment_is_rescheduled_by_any_node(cluster: KafkaCluster) -> None:
    """Its delay is so short that it waits in its owner's memory; the topic of delays has nothing of it."""
    began = len(cluster.sink.read())
    nodes = [cluster.api(name) for name in cluster.nodes]
    refused: list[str] = []
    tasks = 0
    for number in range(9):
        tasks += submit(cluster, 1, [now_ms() + 1_900], others=ENQUEUE if number % 3 == 0 else "")
        task_id = list(cluster.history.submitted)[-1]
        wanted_ms = now_ms() + (300 if number % 2 else 6_000)
        wanted = datetime.fromtimestamp(wanted_ms / 1000, UTC).isoformat()
        try:
            nodes[number % 3].post(f"/v1/tasks/{task_id}/reschedule", {"due": wanted})
        except Refused as error:
            refused.append(str(error))
            continue
        told = cluster.history.submitted[task_id]
        cluster.history.submitted[task_id] = msgspec.structs.replace(told, due_ns=wanted_ms * 1_000_000)
    eventually("all have run", lambda: len(cluster.sink.read()) >= began + tasks, 60)
    cluster.check()
    assert len(cluster.sink.read()) == began + tasks
    assert all("too late" in said for said in refused), refused  # so busy a machine that it had started
    print(f"{tasks - len(refused)} of {tasks} were rescheduled in time")


def test_without_a_broker_what_is_due_starts_and_all_is_in_order_when_it_is_back(
    private_kafka: Private, tmp_path: Path
) -> None:
    broker = private_kafka()
    with KafkaCluster(tmp_path, broker.bootstrap()) as cluster:
        cluster.start()
        cluster.wait_up()
        tasks = submit(cluster, 10, [now_ms() + 15_000 + 20 * number for number in range(30)], others="")
        eventually("all are handed on", lambda: kept(cluster) == tasks and passed(cluster))
        broker.kill()
        eventually("they run", lambda: len(cluster.sink.read()) == tasks, 60)
        broker.start()
        eventually("the log answers", lambda: kept(cluster) == 0 and passed(cluster), 60)
        cluster.check()
        assert len(cluster.sink.read()) == tasks


def test_an_index_that_is_lost_or_damaged_under_its_node_costs_no_task(cluster: KafkaCluster) -> None:
    began = len(cluster.sink.read())
    lost, damaged, _ = cluster.nodes
    tasks = submit(cluster, 20, [now_ms() + 15_000 + 50 * number for number in range(12)])
    eventually("all are handed on", lambda: kept(cluster) == tasks and passed(cluster))
    for node in (lost, damaged):
        cluster.kill(node)
        for file in cluster.cluster.node_dir(node).glob("delays.db*"):
            if node == lost:
                file.unlink()
            else:
                file.write_bytes(os.urandom(file.stat().st_size))
        cluster.start(node)
        cluster.wait_up()
    eventually("all have run", lambda: len(cluster.sink.read()) >= began + tasks, 60)
    cluster.check()
    assert len(cluster.sink.read()) == began + tasks
    assert "deleted, and rebuilt from its source" in cluster.log_text(damaged)
