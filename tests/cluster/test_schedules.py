"""Schedules on real nodes: every time of a schedule takes effect once, whoever leads, and whoever dies.

What they did is counted by tests/support/watched_schedule.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from node.cli.output import CliError
from node.config import SCHEDULE_STEPS
from tests.support.real_cluster import RealCluster, eventually
from tests.support.watched_schedule import EVERY_MS, Watched, wall_ms

LATE_MS = 1_500


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    settings = {"schedule_late_ms": LATE_MS, "session_timeout_ms": 1500, "heartbeat_ms": 300}
    with RealCluster(tmp_path_factory.mktemp("schedules"), settings=settings) as running:
        running.start()
        running.wait_up()
        yield running


def ended(cluster: RealCluster, node: str) -> bool:
    return node not in cluster.running()


def dead_or_up(cluster: RealCluster, node: str) -> bool:
    return ended(cluster, node) or cluster.all_take_work()


def next_victim(cluster: RealCluster, doomed: str) -> str | None:
    """The doomed one, if it has ended; else whoever leads in its stead."""
    if ended(cluster, doomed):
        return doomed
    for name in cluster.running():
        try:
            role = cluster.api(name).get("/v1/node")["role"]
        except CliError:
            continue
        if role == "leader" and name != doomed:
            return name
    return None


def test_each_time_takes_effect_once_through_leaders_killed_at_any_step(cluster: RealCluster) -> None:
    watched = Watched(cluster, "ticks", "all")
    watched.wait_for(3)
    for step in SCHEDULE_STEPS:
        doomed = next(node for node in cluster.nodes if node != cluster.leader())
        cluster.kill(doomed)
        cluster.start(doomed, crash_at=f"{step}:2")
        # Whoever leads is killed until the doomed one leads, and dies by itself at its step.
        while True:
            eventually(f"{doomed} is up, or dead", partial(dead_or_up, cluster, doomed), 60)
            victim = eventually(f"{doomed} dies at {step}", partial(next_victim, cluster, doomed), 60)
            if victim == doomed:
                break
            cluster.kill(victim)
            cluster.start(victim)
        cluster.start(doomed)
        watched.wait_for(5)
    shown = watched.end()
    effects = watched.effects()
    assert set(effects.values()) == {1}
    assert sorted(effects) == list(range(watched.first_ms, max(effects) + 1, EVERY_MS)), "a time was left out"
    assert (shown["fired"], shown["missed"]) == (len(effects), 0)
    cluster.check()


def test_what_all_nodes_slept_through_goes_by_catch_up(cluster: RealCluster) -> None:
    cluster.wait_up()
    schedules = {
        catch_up: Watched(cluster, f"sleep-{catch_up}", catch_up) for catch_up in ("all", "latest", "none")
    }
    for watched in schedules.values():
        watched.wait_for(2)
    cluster.kill(*cluster.nodes)
    down_ms = wall_ms()
    eventually("more than the allowance has passed", lambda: wall_ms() > down_ms + LATE_MS + 1000)
    cluster.start()
    cluster.wait_up()
    for watched in schedules.values():
        watched.wait_for(3)
    for catch_up, watched in schedules.items():
        shown, effects = watched.end(), watched.effects()
        assert set(effects.values()) == {1}, catch_up
        owed = range(min(effects), max(effects) + 1, EVERY_MS)
        assert len(effects) + shown["missed"] == len(owed), catch_up
        assert (shown["missed"] == 0) == (catch_up == "all"), catch_up
        slept = [at_ms for at_ms in owed if down_ms < at_ms <= down_ms + LATE_MS and at_ms in effects]
        assert bool(slept) == (catch_up == "all"), catch_up
    cluster.check()


def test_people_pause_resume_fire_and_delete(cluster: RealCluster) -> None:
    cluster.wait_up()
    control = Watched(cluster, "control", "latest")
    watched = Watched(cluster, "steered", "all")
    cluster.cli(
        "schedule", "put", "steered", "--every", f"{EVERY_MS}ms", "--handler", "real.once",
        "--body", '{"name": "steered"}', "--catch-up", "all",
    )  # fmt: skip
    watched.wait_for(2)
    cluster.cli("schedule", "pause", "steered")
    shown = watched.end()
    before = watched.effects()
    assert shown["fired"] == len(before)
    control.wait_for(8)
    assert watched.effects() == before, "it was paused"
    extra = cluster.cli("schedule", "fire", "steered")["id"]
    eventually("the extra firing took effect", lambda: extra in {name for name, _, _ in cluster.sink.read()})
    resumed_ms = wall_ms()
    assert cluster.cli("schedule", "resume", "steered")["paused"] is False
    watched.wait_for(2)
    assert all(at_ms >= resumed_ms for at_ms in watched.effects() - before)
    watched.end()
    for name in ("steered", "control"):
        assert cluster.cli("schedule", "delete", name) == {"name": name, "deleted": True}
    names = {row["name"] for row in cluster.cli("schedule", "list")["schedules"]}
    assert not names & {"steered", "control"}
    cluster.wait_idle()
    told = control.effects()
    ended = Watched(cluster, "ended", "none")
    ended.wait_for(5)
    ended.end()
    assert control.effects() == told, "it was deleted"
    cluster.check()


def test_the_schedules_of_the_code_are_those_of_the_code_that_started_last(tmp_path: Path) -> None:
    with RealCluster(tmp_path, nodes=1, app="tests.support.scheduled_app:app") as cluster:

        def deploy(schedule: str) -> None:
            cluster.stop(*cluster.running())
            cluster.start(env={"ONCE_TEST_SCHEDULE": schedule})
            cluster.wait_up()

        def shown() -> list[tuple[str, str, bool]]:
            rows = cluster.api().get("/v1/schedules")["schedules"]
            return [(row["schedule"], row["owner"], row["paused"]) for row in rows]

        def declared(schedule: str) -> None:
            eventually(f"it is {schedule}", lambda: [row[:2] for row in shown()] == [(schedule, "code")])

        deploy("every 200ms")
        eventually("it fires", lambda: len(cluster.sink.read()) >= 3)
        deploy("every 300ms")
        declared("every 300ms")
        fired = len(cluster.sink.read())
        eventually("it fires", lambda: len(cluster.sink.read()) >= fired + 3)
        refused = cluster.cli("schedule", "delete", "timed.tick", expect=1)
        assert "is declared by the application" in refused["error"]
        cluster.cli("schedule", "pause", "timed.tick")
        deploy("0 0 29 2 *")
        declared("0 0 29 2 *")
        assert shown() == [("0 0 29 2 *", "code", True)], "what people paused stays paused"
        deploy("")
        eventually("it is gone", lambda: shown() == [])
        cluster.wait_idle()
        effects = Counter(name for name, _, _ in cluster.sink.read())
        assert set(effects.values()) == {1}
