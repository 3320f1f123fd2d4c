"""A node dies by SIGKILL at each step of a task's way; each time the whole history is judged.

RELIABILITY 16 to 20: before the claim, after it, in the effect, after the effect, after the settle, around the
commit. The suspects are closed by the restarted node's testimony, the handler's check, its policy, or a human.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dedup.ids import id_text
from node.config import CRASH_STEPS
from raft.commands import Verdict
from tests.support.real_cluster import RealCluster, eventually

LOAD = 300


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    with RealCluster(tmp_path_factory.mktemp("steps")) as running:
        running.start()
        running.wait_up()
        yield running


@pytest.mark.parametrize("step", CRASH_STEPS)
def test_a_node_killed_at_a_step_loses_nothing_and_repeats_nothing(cluster: RealCluster, step: str) -> None:
    cluster.stop("n2")
    cluster.start("n2", crash_at=step)
    cluster.wait_up()
    ids = [cluster.submit("once", count=LOAD // 5) for _ in range(5)]
    assert cluster.died() == "n2"
    ids.append(cluster.submit("reckon", count=10))
    cluster.start("n2")
    cluster.wait_up()
    cluster.check()
    assert {count for some in ids for count in cluster.effects_of(some)} == {1}


@pytest.mark.parametrize("handler", ["once", "reckon", "drift"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_node_killed_in_or_after_the_effect_has_it_once(
    cluster: RealCluster, place: str, handler: str
) -> None:
    around = cluster.submit(handler, count=20)
    ids = cluster.submit(handler, do=f"{place}:kill_node")
    node = cluster.died()
    cluster.start(node)
    cluster.wait_up()
    history = cluster.check()
    assert cluster.effects_of([*around, *ids]) == [1] * 21
    fences = [each.fence for each in history.effects if each.id in set(ids)]
    claims = [each.fence for each in history.decisions if type(each).__name__ == "Claimed" and each.id in ids]
    assert fences == ([max(claims)] if place == "before" else [min(claims)])


@pytest.mark.parametrize(("handler", "effects"), [("again", 1), ("atmost", 0)])
def test_a_policy_closes_what_a_node_killed_in_the_effect_left(
    cluster: RealCluster, handler: str, effects: int
) -> None:
    ids = cluster.submit(handler, do="before:kill_node")
    cluster.start(cluster.died())
    cluster.wait_up()
    cluster.check()
    assert cluster.effects_of(ids) == [effects]
    assert cluster.state(next(iter(ids))) == "executed"


@pytest.mark.parametrize("executed", [True, False])
def test_a_held_suspect_waits_for_the_human_who_rules_it(cluster: RealCluster, executed: bool) -> None:
    ids = cluster.submit("careful", do="before:kill_node")
    text = id_text(next(iter(ids)))
    cluster.start(cluster.died())
    cluster.wait_up()
    cluster.check(open_suspects=True)
    listed = cluster.cli("suspect", "list")
    (row,) = listed["suspects"]
    assert (row["id"], row["handler"], row["held"], listed["held"]) == (text, "real.careful", True, 1)
    assert cluster.effects_of(ids) == [0]

    word = "--executed" if executed else "--not-executed"
    assert cluster.cli("suspect", "rule", text, word, "--reason", "looked at it", "--by", "ann")["ruled"] == 1
    if not executed:
        eventually("it runs again", lambda: cluster.effects_of(ids) == [1])
    history = cluster.check()
    assert cluster.effects_of(ids) == [0 if executed else 1]
    rulings = [each for each in history.decisions if type(each).__name__ == "Ruled" and each.id in ids]
    verdict = Verdict.EXECUTED if executed else Verdict.NOT_EXECUTED
    assert [(each.verdict, each.by) for each in rulings[1:]] == [(verdict, "human:ann")]
    assert cluster.cli("suspect", "list")["total"] == 0
