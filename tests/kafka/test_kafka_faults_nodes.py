"""Nodes of a cluster on Kafka killed, paused, stopped and started under load; each whole history is judged.

RELIABILITY 9 to 11, 14, 18, 20, 30; B5: what was in flight when its partition moved on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from dedup.ids import parse_id
from node.kafkaup.broker import Kafka
from node.supervisor import child_environment
from tests.support.kafka_broker import started
from tests.support.real_cluster import eventually
from tests.support.real_kafka import GROUP_SESSION, HANDLERS, PARTITIONS, KafkaCluster, Load, working
from tests.support.real_submit import heard_of

STORM_S = 2.0
STORM_TURNS = int(os.environ.get("ONCE_TEST_STORM_TURNS", "5"))  # 15 make a minute


@pytest.fixture(scope="module")
def impatient_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    made = started(tmp_path_factory.mktemp("broker") / "kafka", settings=GROUP_SESSION)
    try:
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def cluster(impatient_kafka: Kafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    folder = tmp_path_factory.mktemp("nodes")
    with working(folder, impatient_kafka.bootstrap(), witnessed=True) as running:
        yield running


def test_work_goes_on_after_a_leader_was_killed(cluster: KafkaCluster) -> None:
    with Load(cluster) as load:
        leader = cluster.leader()
        cluster.progress()
        cluster.kill(leader)
        cluster.progress()
        cluster.start(leader)
        cluster.wait_up()
        cluster.progress()
    cluster.judge(load)


def test_all_nodes_killed_at_once_under_load_go_on_where_they_were(cluster: KafkaCluster) -> None:
    with Load(cluster) as load:
        cluster.progress(300)
        cluster.kill(*cluster.nodes)
        wanted = load.tasks() + 100
        eventually("tasks are submitted while nobody is there", partial(load.reached, wanted))
        cluster.start()
        cluster.wait_up()
    cluster.judge(load)


def test_a_storm_of_nodes_that_leave_and_join_every_two_seconds_doubles_no_effect(
    cluster: KafkaCluster,
) -> None:
    with Load(cluster) as load:
        for turn in range(STORM_TURNS):
            node = cluster.nodes[turn % 3]
            if turn % 2:
                cluster.kill(node)
            else:
                assert cluster.stop(node) == {node: 0}
            time.sleep(STORM_S)  # the storm's own pace
            cluster.start(node)
            time.sleep(STORM_S)
        cluster.wait_up()
        cluster.progress()
    cluster.judge(load)


@pytest.mark.parametrize("role", ["follower", "leader"])
def test_a_node_paused_beyond_its_lease_and_its_groups_patience_comes_back_and_does_no_harm(
    cluster: KafkaCluster, role: str
) -> None:
    with Load(cluster) as load:
        cluster.progress()
        ids = [cluster.produce(partition, do="before:wait")[0] for partition in range(PARTITIONS)]
        held = {task_id: cluster.caught(task_id) for task_id in ids}
        leader = cluster.leader()
        paused = leader if role == "leader" else next(node for node in cluster.nodes if node != leader)
        cluster.pause(paused)
        try:
            others = {node for node in cluster.nodes if node != paused}
            eventually(
                "the others have all partitions",
                lambda: others.issuperset(cluster.owners(*others).values() or {None}),
                60,
            )
            for task_id in ids:
                cluster.release(task_id)
            cluster.progress()
        finally:
            cluster.signal(paused, signal.SIGCONT)
        cluster.wait_up()
        cluster.progress()
    cluster.judge(load)
    assert cluster.effects_of(ids) == [1] * len(ids), held


def test_submitters_killed_in_the_midst_of_sending_leave_nothing_half_done(
    cluster: KafkaCluster, tmp_path: Path
) -> None:
    pids = []
    for turn in range(4):
        heard = tmp_path / f"acknowledged-{turn}"
        with heard.open("wb") as out:
            client = subprocess.Popen(
                [sys.executable, "-m", "tests.support.real_submit", str(cluster.cluster.dir), *HANDLERS],
                stdout=out,
                env=child_environment(),
            )
        try:
            eventually("it submits", lambda: heard.read_bytes().count(b"true}") >= 3 + 2 * turn)  # noqa: B023
        finally:
            client.kill()
            client.wait(10)
        pids.append(client.pid)
        for handler, ids, acknowledged in heard_of(heard):
            if acknowledged:
                cluster.acknowledged(ids, handler)
    known = cluster.history.submitted.keys()
    untold = {id: body for id, body in cluster.content().items() if id not in known}
    # The log has what was acknowledged, and at most one flush more of each who was killed.
    assert len(untold) <= 20 * len(pids)
    for task_id, body in untold.items():
        assert int(json.loads(body)["name"][1:].partition("-")[0]) in pids
        cluster.history.submit([task_id], "check", acknowledged=False)
    cluster.check()
    print(f"{len(untold)} tasks were stored and not acknowledged")


def test_one_slow_task_does_not_stop_its_partition_and_what_was_settled_above_it_is_passed_on_sight(
    cluster: KafkaCluster,
) -> None:
    cluster.wait_idle()
    slow = cluster.produce(0, do="before:wait")[0]
    cluster.caught(slow)
    above = [*cluster.produce(0, 1000), *cluster.produce(0, 1000, handler="drift")]
    eventually("all others took effect", lambda: all(cluster.effects_of(above)), 60)
    at = eventually(
        "its partition is settled up to the end, but for it",
        lambda: next(
            (row for row in cluster.partitions() if row["partition"] == 0 and row["running"] == 1), None
        ),
    )
    assert at["frontier"] - at["position"] == len(above) + 1
    assert cluster.committed()[0] == at["position"]
    before = cluster.asked()
    cluster.kill(*cluster.nodes)
    cluster.start()
    cluster.wait_up()
    cluster.check()
    assert cluster.effects_of([slow, *above]) == [1] * (len(above) + 1)
    after = cluster.asked()
    again = [task_id for task_id in above if after[task_id] != before[task_id]]
    assert not again, f"{len(again)} that were settled were claimed again after the restart"


def test_what_is_in_flight_when_its_partition_moves_is_waited_for_and_taken_over_if_its_holder_dies(
    cluster: KafkaCluster,
) -> None:
    cluster.wait_idle()
    assert cluster.stop("n3") == {"n3": 0}
    eventually("two nodes share all", lambda: set(cluster.owners().values()) == {"n1", "n2"}, 60)
    ids = {partition: cluster.produce(partition, 2, do="before:wait") for partition in range(PARTITIONS)}
    held = {task_id: cluster.caught(task_id) for some in ids.values() for task_id in some}
    cluster.start("n3")
    cluster.wait_up()
    eventually("n3 has its share", lambda: "n3" in cluster.owners().values(), 60)
    owners = cluster.owners()
    moved = [partition for partition, owner in owners.items() if owner == "n3"]
    # Reading goes on there: nothing is kept waiting by what the former owners hold.
    later = [task_id for partition in moved for task_id in cluster.produce(partition, 50)]
    eventually("later tasks of those partitions", lambda: all(cluster.effects_of(later)), 60)
    for some in ids.values():
        cluster.release(some[0])
    firsts = [some[0] for some in ids.values()]
    eventually("what its holders finished", lambda: cluster.effects_of(firsts) == [1] * PARTITIONS, 60)
    pids = {task_id: pid for name, _, pid in cluster.sink.read() if (task_id := parse_id(name)) in held}
    assert pids == {task_id: held[task_id][0] for task_id in firsts}, (
        "finished by who had them, and nobody else"
    )
    seconds = {partition: some[1] for partition, some in ids.items()}
    holders = {cluster.node_of(held[seconds[partition]][1]) for partition in moved}
    for node in holders:
        cluster.kill(node)
    for task_id in seconds.values():
        cluster.release(task_id)
    cluster.start(*holders)
    cluster.wait_up()
    cluster.check()
    assert cluster.effects_of(held) == [1] * len(held)
