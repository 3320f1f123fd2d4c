"""One node's index of delayed tasks on a disk that takes no more: what is Kafka's stays Kafka's, and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from node.kafkaup.broker import Kafka
from tests.support.delay_stage import APP, FAR_MS, Stage, staged, wall_ms
from tests.support.kafka_broker import delete_topics
from tests.support.real_cluster import eventually
from tests.support.real_kafka import KafkaCluster
from tests.support.small_disk import fill, mounted

DISK_BYTES = 32 << 20  # the index of what is submitted here takes a few
FULL = "n2"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", DISK_BYTES) as place:
        yield place


@pytest.fixture
def stage(kafka: Kafka, tmp_path: Path, disk: Path) -> Iterator[Stage]:
    """Of one node the index alone is on the small disk."""
    cluster = KafkaCluster(tmp_path, kafka.bootstrap(), app=APP)
    (cluster.cluster.node_dir(FULL) / "delays.db").symlink_to(disk / "delays.db")
    with staged(cluster, tmp_path) as running:
        yield running
    delete_topics(kafka.bootstrap(), cluster.prefix)


def test_a_node_whose_index_cannot_grow_says_so_and_all_runs_when_there_is_room(
    stage: Stage, disk: Path
) -> None:
    due_ms = wall_ms() + FAR_MS
    known = stage.submit(120, due_ms)
    stage.wait_kept(120)
    assert (disk / "delays.db").stat().st_size > 0
    ballast = fill(disk)
    # Kafka takes them, and they are acknowledged; this node's index cannot take them all.
    more = [each for _ in range(20) for each in stage.submit(300, due_ms)]
    notes = eventually("the node says what is wrong", lambda: _notes(stage, FULL), 60)
    assert "full" in str(notes), notes
    stage.fall_due(due_ms)
    ballast.unlink()
    stage.wait_started([*known, *more], 90)
    stage.check()


def _notes(stage: Stage, node: str) -> list[str]:
    return list(stage.cluster.api(node).get("/v1/status", local=1)["notes"])
