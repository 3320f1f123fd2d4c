"""Delayed tasks on real nodes: never early, none lost, none twice, whoever dies; and people are told the truth."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedup.ids import TaskId, id_text, parse_id
from oncekeeper.errors import InvalidTask, Refused
from tests.support.real_cluster import RealCluster, eventually

NODES = ("n1", "n2", "n3")
DUE_TASKS = int(os.environ.get("ONCE_TEST_DUE_TASKS", "20000"))  # 100,000 take half a minute


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    with RealCluster(tmp_path_factory.mktemp("delays")) as running:
        running.start(*NODES)
        running.wait_up()
        yield running


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def submit(
    cluster: RealCluster, count: int, due_ms: int, then: str = "", handler: str = "once"
) -> list[TaskId]:
    bodies = [json.dumps({"name": cluster.name()}).encode() for _ in range(count)]
    ids = cluster.client.send(f"real.{handler}", bodies, due_ms=due_ms, then=then)
    cluster.acknowledged(ids, handler)
    return list(ids)


def started_ms(cluster: RealCluster, task_id: TaskId) -> list[int]:
    """When each attempt started, by its node's wall clock."""
    from datetime import datetime

    attempts = cluster.api().get(f"/v1/tasks/{id_text(task_id)}")["attempts"]
    return [int(datetime.fromisoformat(each["started"]).timestamp() * 1000) for each in attempts]


def state(cluster: RealCluster, task_id: TaskId) -> str:
    return str(cluster.api().get(f"/v1/tasks/{id_text(task_id)}")["state"])


def test_no_task_starts_before_its_time_and_idle_waits_for_all(cluster: RealCluster) -> None:
    begin = now_ms()
    dues = {
        each: begin + 300 + 700 * number
        for number in range(6)
        for each in submit(cluster, 2, begin + 300 + 700 * number)
    }
    dues |= dict.fromkeys(submit(cluster, 3, begin + 2600, "enqueue"), begin + 2600)
    cluster.wait_idle()
    late = {}
    for task_id, due_ms in dues.items():
        (start,) = started_ms(cluster, task_id)
        assert start >= due_ms, f"{task_id} started {due_ms - start} ms early"
        late[task_id] = start - due_ms
    print("late by ms:", sorted(late.values()))


def test_what_is_delayed_is_listed_in_due_order_a_page_at_a_time_and_a_cancel_holds(
    cluster: RealCluster,
) -> None:
    begin = now_ms()
    hour = 3_600_000
    far = [submit(cluster, 7, begin + hour + 1000 * ((number * 7) % 5))[0] for number in range(5)]
    api = cluster.api()
    # Not by the status, which also counts what is still on its way to the store.
    eventually("all are kept", lambda: len(api.get("/v1/tasks", state="delayed", limit=100)["tasks"]) == 35)
    seen: list[dict[str, object]] = []
    after = ""
    while True:
        page = api.get("/v1/tasks", state="delayed", limit=4, **({"after": after} if after else {}))
        seen += page["tasks"]
        assert len(page["tasks"]) <= 4
        if not page["next"]:
            break
        after = page["next"]
    dues = [str(each["due"]) for each in seen]
    assert len({each["id"] for each in seen}) == len(seen) == 35
    assert dues == sorted(dues)
    assert all(state(cluster, each) == "delayed" for each in far)
    for each in seen:
        assert cluster.client.cancel(parse_id(str(each["id"]))) == "cancelled"
    assert api.get("/v1/tasks", state="delayed", limit=10)["tasks"] == []
    cluster.wait_idle()


def test_a_task_is_rescheduled_to_sooner_and_to_later_and_runs_by_its_new_time_alone(
    cluster: RealCluster,
) -> None:
    begin = now_ms()
    sooner, later = submit(cluster, 1, begin + 3_600_000)[0], submit(cluster, 1, begin + 3_000)[0]
    soon = cluster.client.handle(sooner).reschedule(delay="1s")
    afterwards = cluster.client.handle(later).reschedule(delay=6)
    eventually("the one that was to run in an hour has run", lambda: state(cluster, sooner) == "executed")
    assert started_ms(cluster, sooner)[0] >= soon.timestamp() * 1000
    cluster.wait_idle()
    (start,) = started_ms(cluster, later)
    assert start >= int(afterwards.timestamp() * 1000)
    with pytest.raises(Refused, match="executed"):
        cluster.client.handle(later).reschedule(delay="1h")


@pytest.mark.parametrize("then", ["", "enqueue"])
def test_one_that_is_due_in_a_moment_is_rescheduled_too(cluster: RealCluster, then: str) -> None:
    """Its delay is so short that it waits in its owner's memory, and not in the store."""
    moved: dict[TaskId, float] = {}
    late: list[str] = []
    for number in range(8):
        (task_id,) = submit(cluster, 1, now_ms() + 1_800, then)
        try:
            wanted = cluster.client.handle(task_id).reschedule(delay=0.2 if number % 2 else 4.0)
        except Refused as error:
            late.append(str(error))
            continue
        moved[task_id] = wanted.timestamp() * 1000
    assert all("too late" in said for said in late), late  # so busy a machine that it had started
    cluster.wait_idle()
    for task_id, wanted_ms in moved.items():
        (start,) = started_ms(cluster, task_id)
        assert start >= int(wanted_ms), f"{task_id} started {wanted_ms - start} ms early"


def test_a_cancel_that_races_with_the_due_time_has_one_winner_and_says_which(cluster: RealCluster) -> None:
    due = now_ms() + 2_500
    ids = submit(cluster, 40, due)
    cancelled: set[TaskId] = set()
    time.sleep(max(0.0, (due - 400 - now_ms()) / 1000))
    for task_id in ids:
        try:
            cluster.client.cancel(task_id)
        except Refused:
            continue
        cancelled.add(task_id)
    cluster.wait_idle()
    for task_id, effects in zip(ids, cluster.effects_of(ids), strict=True):
        assert effects == (0 if task_id in cancelled else 1)
    print(f"{len(cancelled)} of {len(ids)} were cancelled in time")


def test_bad_times_are_refused_with_the_field_and_a_past_one_runs_now(cluster: RealCluster) -> None:
    client = cluster.client
    with pytest.raises(InvalidTask, match="delay: must be a duration"):
        client.submit("real.once", {"name": "x"}, queue="default", delay="soon")
    with pytest.raises(InvalidTask, match="366 days"):
        client.submit("real.once", {"name": "x"}, queue="default", delay="400d")
    with pytest.raises(InvalidTask, match="due: must name its time zone"):
        client.submit("real.once", {"name": "x"}, queue="default", due="2026-12-24T18:00:00")
    answer = cluster.cli("submit", "real.once", "--body", '{"name":"past"}', "--at", "2020-01-01T00:00:00Z")
    assert answer["past"] == 1
    eventually(
        "what is due in the past runs now", lambda: state(cluster, parse_id(answer["ids"][0])) == "executed"
    )
    cluster.acknowledged([parse_id(answer["ids"][0])], "once")


def test_the_whole_history_of_all_of_this_is_right(cluster: RealCluster) -> None:
    cluster.check()


def test_nothing_is_lost_or_runs_twice_when_nodes_die_as_many_tasks_fall_due(tmp_path: Path) -> None:
    with RealCluster(tmp_path) as cluster:
        cluster.start(*NODES)
        cluster.wait_up()
        due = now_ms() + 6_000 + DUE_TASKS // 10
        for number in range(20):
            submit(cluster, DUE_TASKS // 20, due + 10 * number)
        api = cluster.api()
        eventually(
            "all are kept in the store", lambda: api.get("/v1/status")["tasks"]["delayed"] == DUE_TASKS, 120
        )
        time.sleep(max(0.0, (due - now_ms()) / 1000))
        for node in NODES:
            cluster.kill(node)
            cluster.start(node)
            eventually(f"{node} is up", cluster.all_take_work, 120)
        cluster.kill(*NODES)
        cluster.start(*NODES)
        cluster.wait_up()
        cluster.check()
