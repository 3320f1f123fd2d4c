"""Delayed tasks and schedules under faults, on a real broker: tests/support/delay_faults_suite.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from node.kafkaup.broker import Kafka

pytest.register_assert_rewrite("tests.support.delay_faults_suite")

from tests.support.delay_faults_suite import *  # noqa: E402, F403
from tests.support.delay_stage import APP, DUE_TASKS, FAR_MS, LONG, Stage, staged, wall_ms  # noqa: E402
from tests.support.kafka_broker import delete_topics  # noqa: E402
from tests.support.real_cluster import eventually  # noqa: E402
from tests.support.real_kafka import KafkaCluster  # noqa: E402

if not LONG:
    del test_strobing_clocks_start_nothing_early_and_nothing_twice  # noqa: F821  # no log has a share in it


@pytest.fixture(scope="module")
def stage(kafka: Kafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("faults")
    cluster = KafkaCluster(folder, kafka.bootstrap(), app=APP)
    with staged(cluster, folder) as running:
        yield running
    delete_topics(kafka.bootstrap(), cluster.prefix)


def test_each_node_and_then_all_are_killed_as_tasks_fall_due_and_each_runs_once(stage: Stage) -> None:
    nodes = stage.cluster.nodes
    due_ms = wall_ms() + FAR_MS
    ids = [
        each
        for number in range(10)
        for each in stage.submit(DUE_TASKS // 10, due_ms + 500 * number, "enqueue" if number % 5 == 4 else "")
    ]
    stage.wait_kept(len(ids))
    stage.fall_due(due_ms)
    eventually("the first have begun", lambda: stage.count(ids) > 0)
    for node in nodes:
        stage.restart(node)
        eventually(f"{node} is up", stage.cluster.all_take_work, 60)
    stage.restart(*nodes)
    stage.cluster.wait_up()
    stage.wait_started(ids, 120)
    stage.check()
