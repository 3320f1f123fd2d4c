"""Three brokers that hold three copies of everything: one killed under load costs nothing but a moment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from node.kafkaup.broker import Kafka
from tests.support.kafka_broker import ANSWER_S, admin, started
from tests.support.real_kafka import GROUP_SESSION, Load, working


@pytest.fixture
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    made = started(tmp_path_factory.mktemp("brokers") / "kafka", brokers=3, settings=GROUP_SESSION)
    try:
        yield made
    finally:
        made.kill()


@pytest.mark.slow
def test_the_broker_of_three_that_leads_the_group_is_killed_under_load_and_costs_no_task(
    brokers: Kafka, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cluster")
    with working(folder, brokers.bootstrap(), log_settings={"kafka_replication": 3}) as cluster:
        with Load(cluster) as load:
            cluster.progress()
            broker = brokers.brokers[coordinator(brokers, cluster.prefix)]
            broker.kill()
            cluster.progress(200)
            broker.start(wait=False)
            broker.wait_ready(brokers.brokers)
            cluster.progress(200)
        cluster.judge(load)
        print(f"{load.tasks()} tasks, {len(load.told)} submits that were repeated: {load.told[:3]}")


def coordinator(brokers: Kafka, group: str) -> int:
    client = admin(brokers.bootstrap())
    return int(client.describe_consumer_groups([group])[group].result(ANSWER_S).coordinator.id)
