"""Handlers that raise, hang, crash, leave or eat memory: each costs one worker at most, and nobody else's task.

RELIABILITY 33 and 34. The node process is the same before and after, and the whole history is judged.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.real_cluster import RealCluster

MEMORY_BYTES = 200 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    settings = {"memory_bytes_max": MEMORY_BYTES}
    with RealCluster(tmp_path_factory.mktemp("handlers"), settings=settings) as running:
        running.start()
        running.wait_up()
        yield running


@pytest.fixture
def same_nodes(cluster: RealCluster) -> Iterator[None]:
    before = {node: (cluster.pid(node), incarnation(cluster, node)) for node in cluster.nodes}
    yield
    after = {node: (cluster.pid(node), incarnation(cluster, node)) for node in cluster.nodes}
    assert after == before


def incarnation(cluster: RealCluster, node: str) -> int:
    return int(cluster.api(node).get("/v1/node")["incarnation"])


@pytest.mark.usefixtures("same_nodes")
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("handler", ["once", "reckon", "drift"])
@pytest.mark.parametrize("deed", ["segfault", "exit"])
def test_a_handler_that_ends_its_process_costs_one_worker(
    cluster: RealCluster, deed: str, handler: str, place: str
) -> None:
    others = [*cluster.submit("once", count=20), *cluster.submit("reckon", count=20)]
    ids = cluster.submit(handler, do=f"{place}:{deed}")
    cluster.check()
    assert cluster.effects_of([*others, *ids]) == [1] * 41


@pytest.mark.usefixtures("same_nodes")
@pytest.mark.parametrize("handler", ["once", "reckon", "drift"])
@pytest.mark.parametrize("deed", ["raise", "system_exit"])
def test_a_handler_that_raises_is_tried_again(cluster: RealCluster, deed: str, handler: str) -> None:
    ids = cluster.submit(handler, count=5, do=f"before:{deed}")
    cluster.check()
    assert cluster.effects_of(ids) == [1] * 5
    story = cluster.cli("task", "show", str(next(iter(ids))))
    assert [each["ending"] for each in story["attempts"]] == ["retry", "done"]


@pytest.mark.usefixtures("same_nodes")
def test_a_handler_that_always_raises_becomes_a_dead_letter_after_its_retries(cluster: RealCluster) -> None:
    ids = cluster.submit("stubborn", count=3)
    cluster.check()
    assert [cluster.state(task_id) for task_id in ids] == ["dead"] * 3
    tries = (cluster.home / "tries").read_text().split()
    assert sorted(tries) == sorted([cluster.keys[task_id] for task_id in ids] * 3)
    story = cluster.cli("task", "show", str(next(iter(ids))))
    assert [each["ending"] for each in story["attempts"]] == ["retry", "retry", "dead"]
    assert "not mended yet" in story["aside"]["reason"]


@pytest.mark.usefixtures("same_nodes")
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_handler_that_hangs_is_stopped_at_its_deadline_and_its_slot_is_free_again(
    cluster: RealCluster, place: str
) -> None:
    ids = cluster.submit("hasty", count=3, do=f"{place}:hang")
    others = cluster.submit("once", count=30)
    cluster.check()
    assert cluster.effects_of([*ids, *others]) == [1] * 33


@pytest.mark.usefixtures("same_nodes")
@pytest.mark.parametrize("handler", ["once", "reckon"])
def test_a_handler_that_eats_memory_costs_one_worker(cluster: RealCluster, handler: str) -> None:
    others = cluster.submit("once", count=20)
    ids = cluster.submit(handler, do="before:eat")
    cluster.check()
    assert cluster.effects_of([*others, *ids]) == [1] * 21
