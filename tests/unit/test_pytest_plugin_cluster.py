"""The cluster in memory: real ledger, coordinators and handlers, under a clock that the test holds."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from chaos.testing import InMemoryCluster
from chaos.testing.looking import duration_ms
from oncekeeper import (
    App,
    InvalidTask,
    NoCluster,
    OncekeeperError,
    Refused,
    ResultLost,
    ResultTimeout,
    TaskCancelled,
    TaskFailed,
    UnknownTask,
    current_task,
)
from oncekeeper.client import Client

app = App("shop")
effects: Counter[int] = Counter()
moody = {"fails": 0}


@app.task(on_doubt="check", retries=3, retry_delay=10, queue="money")
def charge(order_id: int) -> str:
    effects[order_id] += 1
    word = "charged"
    return f"{word} {order_id}"


@charge.check
def was_charged(order_id: int) -> bool:
    return effects[order_id] > 0


@app.task(retries=2, retry_delay=10, retry_delay_max=100)
def fragile(order_id: int) -> int:
    if moody["fails"]:
        moody["fails"] -= 1
        raise ConnectionError("the bank is closed")
    effects[order_id] += 1
    return current_task().attempt


@app.task(on_doubt="rerun")
async def ping() -> str:
    await asyncio.sleep(0)
    return "pong"


@app.task(on_doubt="hold")
def hand_over(order_id: int) -> None:
    effects[order_id] += 1


@app.task(on_doubt="rerun", retries=0)
def chain(order_id: int, wait: bool = False) -> str:
    handle = charge.submit(order_id)
    return handle.result() if wait else handle.id


@pytest.fixture
def cluster() -> Iterator[InMemoryCluster]:
    effects.clear()
    moody["fails"] = 0
    with InMemoryCluster() as cluster:
        yield cluster


# --- running --------------------------------------------------------------------------------------------------


def test_a_task_runs_once_when_the_cluster_does(cluster: InMemoryCluster) -> None:
    handle = cluster.submit(charge, order_id=7)
    assert (cluster.status(handle), effects[7]) == ("waiting", 0)
    cluster.run_until_idle()
    assert (cluster.status(handle), cluster.result(handle), effects[7]) == ("executed", "charged 7", 1)
    assert cluster.runs(handle) == 1
    with pytest.raises(OncekeeperError, match="only while a worker runs a handler"):
        current_task()


def test_applications_submit_as_they_always_do(cluster: InMemoryCluster) -> None:
    cluster.use(app)
    handles = charge.submit_many([(1,), (2,), (3,)])
    one = charge.options(key="order-4").submit(4)
    assert charge.options(key="order-4").submit(4) == one
    named = app.client.submit("shop.charge", {"order_id": 5})
    assert [handle.result() for handle in handles] == ["charged 1", "charged 2", "charged 3"]
    assert (one.result(), named.result(), one.status()) == ("charged 4", "charged 5", "executed")
    assert "submitted to shop.charge in queue money" in one.why()["story"][0]
    assert effects == dict.fromkeys(range(1, 6), 1)
    with pytest.raises(InvalidTask, match=r"order_id: expected int, got str"):
        charge.submit("x")  # type: ignore[arg-type]
    with pytest.raises(InvalidTask, match=r"'shop\.none' is not registered"):
        app.client.submit("shop.none", {})


def test_coroutines_run_also_where_the_test_has_a_loop(cluster: InMemoryCluster) -> None:
    assert cluster.submit(ping).result() == "pong"

    async def test() -> str:
        return cluster.submit(ping).result()

    assert asyncio.run(test()) == "pong"


@pytest.mark.parametrize("running_loop", [False, True])
def test_checks_may_be_coroutines(cluster: InMemoryCluster, running_loop: bool) -> None:
    other = App("other")

    @other.task(on_doubt="check")
    async def charge(order_id: int) -> None:
        effects[order_id] += 1

    @charge.check
    async def was_charged(order_id: int) -> bool:
        await asyncio.sleep(0)
        return effects[order_id] > 0

    def lose_one() -> None:
        cluster.crash(charge, "end")
        handle = cluster.submit(charge, 7)
        cluster.run_until_idle()
        assert (handle.status(), effects[7], cluster.runs(handle)) == ("executed", 1, 1)

    async def lose_one_in_a_loop() -> None:
        lose_one()

    if running_loop:
        asyncio.run(lose_one_in_a_loop())
    else:
        lose_one()


def test_a_handler_may_submit_and_must_not_wait(cluster: InMemoryCluster) -> None:
    first = cluster.submit(chain, 1)
    assert (first.id, first.result()) == ("1", "2")
    cluster.run_until_idle()
    assert effects[1] == 1
    with pytest.raises(TaskFailed, match="in memory one runs after the other"):
        cluster.submit(chain, 2, wait=True).result()


def test_the_application_has_its_own_client_again_afterwards(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = App("other", cluster=tmp_path)

    @other.task
    def nothing() -> None: ...

    with InMemoryCluster(nodes=1) as cluster:
        cluster.submit(nothing)
        assert isinstance(other.client, Client)
    with pytest.raises(NoCluster):
        nothing.submit()
    with InMemoryCluster(nodes=1) as first:
        other.use(first.client)
        with InMemoryCluster(nodes=1) as second:
            second.use(other)
        assert other.client is first.client


# --- time -----------------------------------------------------------------------------------------------------


def test_a_retry_comes_when_its_time_has_come(cluster: InMemoryCluster) -> None:
    moody["fails"] = 1
    handle = cluster.submit(fragile, 1)
    cluster.run()
    assert (cluster.status(handle), cluster.runs(handle)) == ("delayed", 1)
    cluster.advance("4s")
    assert cluster.runs(handle) == 1, "half of retry_delay is the least"
    cluster.advance(timedelta(seconds=7))
    assert (cluster.status(handle), cluster.runs(handle), handle.result()) == ("executed", 2, 2)


def test_time_flies_until_all_is_done(cluster: InMemoryCluster) -> None:
    moody["fails"] = 2
    handle = cluster.submit(fragile, 1)
    before_ms = cluster.now_ms
    cluster.run_until_idle()
    assert (handle.status(), cluster.runs(handle)) == ("executed", 3)
    assert 15_000 <= cluster.now_ms - before_ms <= 31_000


def test_a_dead_letter_has_its_reason_and_may_be_retried(cluster: InMemoryCluster) -> None:
    moody["fails"] = 3
    handle = cluster.submit(fragile, 1)
    cluster.run_until_idle()
    assert cluster.dead_letters() == {handle.id: "ConnectionError: the bank is closed"}
    with pytest.raises(TaskFailed, match="the bank is closed"):
        handle.result()
    handle.retry()
    assert (handle.result(), cluster.dead_letters(), effects[1]) == (1, {}, 1)


def test_a_paused_queue_waits_and_what_waits_may_be_cancelled(cluster: InMemoryCluster) -> None:
    cluster.pause("money")
    gone, kept = cluster.submit(charge, 1), cluster.submit(charge, 2)
    cluster.run_until_idle()
    assert (cluster.status(gone), cluster.status(kept)) == ("waiting", "waiting")
    with pytest.raises(ResultTimeout, match="Queue money is paused"):
        kept.result(timeout=5)
    gone.cancel()
    cluster.resume("money")
    assert kept.result() == "charged 2"
    with pytest.raises(TaskCancelled):
        gone.result()
    with pytest.raises(Refused, match="too late to cancel: it is executed"):
        cluster.cancel(kept)
    gone.retry()
    assert (gone.result(), effects) == ("charged 1", {1: 1, 2: 1})


@pytest.mark.parametrize(
    ("given", "ms"),
    [("500ms", 500), ("1.5s", 1500), ("2h", 7_200_000), (3, 3000), (timedelta(minutes=1), 60_000)],
)
def test_durations(given: Any, ms: int) -> None:
    assert duration_ms(given) == ms


# --- faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [False, True], ids=["worker", "node"])
@pytest.mark.parametrize(
    ("at", "runs"), [("start", 2), ("effects[order_id]", 2), ("return f", 1), ("end", 1)]
)
def test_a_crash_costs_no_effect_and_doubles_none(
    cluster: InMemoryCluster, at: str, runs: int, node: bool
) -> None:
    cluster.crash(charge, at, node=node)
    handle = cluster.submit(charge, 7)
    cluster.run_until_idle()
    assert (cluster.status(handle), effects[7], cluster.runs(handle)) == ("executed", 1, runs)
    assert sum(cluster.nodes.values()) == (2 if node else 3)
    story = " ".join(cluster.why(handle))
    found = "no effect" if runs == 2 else "its effect"
    assert f"the handler's check found {found}" in story


def test_a_result_is_lost_with_its_worker_and_nothing_else(cluster: InMemoryCluster) -> None:
    cluster.crash(charge, "end")
    handle = cluster.submit(charge, 7)
    with pytest.raises(ResultLost, match=f"task {handle.id} took effect; its result is lost"):
        handle.result()
    assert handle.result(default="unknown") == "unknown"


def test_what_asks_a_human_waits_for_one(cluster: InMemoryCluster) -> None:
    cluster.crash(hand_over, "end", times=2)
    done, again = cluster.submit(hand_over, 1), cluster.submit(hand_over, 2)
    cluster.run_until_idle()
    assert set(cluster.suspects()) == {done.id, again.id}
    with pytest.raises(ResultTimeout, match="held for a human"):
        done.result()
    cluster.rule(done, executed=True, reason="it is in the books")
    effects[2] = 0
    cluster.rule(again, executed=False)
    cluster.run_until_idle()
    assert (cluster.status(done), cluster.status(again), effects) == ("executed", "executed", {1: 1, 2: 1})
    assert (cluster.suspects(), done.result(), again.result()) == ({}, None, None)
    with pytest.raises(Refused, match="no suspect: it is executed"):
        cluster.rule(done, executed=True)


def test_a_restarted_node_testifies_and_nothing_waits_for_its_session(cluster: InMemoryCluster) -> None:
    cluster.crash(charge, "end", node=True)
    handle = cluster.submit(charge, 7)
    cluster.run()
    (dead,) = (name for name, alive in cluster.nodes.items() if not alive)
    assert cluster.status(handle) == "running", "its session stands"
    before_ms = cluster.now_ms
    cluster.start(dead)
    cluster.run_until_idle()
    assert (cluster.status(handle), effects[7]) == ("executed", 1)
    assert cluster.now_ms - before_ms < cluster.session_timeout_ms
    assert f"Node {dead} testified" in " ".join(cluster.why(handle))


def test_all_nodes_may_die_and_come_back(cluster: InMemoryCluster) -> None:
    handle = cluster.submit(charge, 7)
    for name in cluster.nodes:
        cluster.kill(name)
    cluster.run_until_idle()
    assert (cluster.status(handle), effects[7]) == ("waiting", 0)
    cluster.start("n2")
    cluster.run_until_idle()
    assert (cluster.status(handle), effects[7]) == ("executed", 1)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_dies_each_task_takes_effect_once(cluster: InMemoryCluster, seed: int) -> None:
    rnd = random.Random(seed)
    handles = []
    for number in range(40):
        match rnd.randrange(6):
            case 0:
                at = rnd.choice(["start", "effects[order_id]", "return f", "end"])
                cluster.crash(charge, at, node=rnd.random() < 0.5)
            case 1 if any(cluster.nodes.values()):
                cluster.kill(rnd.choice([name for name, alive in cluster.nodes.items() if alive]))
            case 2 if not all(cluster.nodes.values()):
                cluster.start(rnd.choice([name for name, alive in cluster.nodes.items() if not alive]))
            case 3:
                cluster.advance(rnd.uniform(0, 6))
            case 4:
                cluster.run()
        handles.append(cluster.submit(charge, number))
    for _ in range(10):  # planned crashes may kill nodes until none is planned
        for name, alive in cluster.nodes.items():
            if not alive:
                cluster.start(name)
        cluster.run_until_idle()
    assert {cluster.status(handle) for handle in handles} == {"executed"}
    assert effects == dict.fromkeys(range(40), 1)


def test_the_same_test_tells_the_same_story_twice() -> None:
    stories = []
    for _ in range(2):
        effects.clear()
        with InMemoryCluster() as cluster:
            cluster.crash(charge, "return f", node=True)
            handles = [cluster.submit(charge, number) for number in range(10)]
            cluster.run_until_idle()
            stories.append([cluster.why(handle) for handle in handles])
    assert stories[0] == stories[1]


# --- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_says_what_is_wrong(cluster: InMemoryCluster) -> None:
    handle = cluster.submit(charge, 1)
    for act, text in (
        (lambda: cluster.kill("n9"), "there is no node 'n9': n1, n2, n3"),
        (lambda: cluster.start("n1"), "n1 is alive"),
        (lambda: cluster.advance("soon"), "must be a duration"),
        (lambda: cluster.advance(-1), "must not be negative"),
        (
            lambda: cluster.crash(charge, "no such text"),
            "must be in exactly one line of the handler, not in 0",
        ),
        (lambda: cluster.crash(charge, 1), "must be a line of the handler, from"),
        (lambda: cluster.crash(charge, times=0), "times=0 must be at least 1"),
        (lambda: InMemoryCluster(nodes=0), "nodes=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=text):
            act()
    with pytest.raises(UnknownTask, match="no task 99 is known here"):
        cluster.status(99)
    with pytest.raises(Refused, match="nothing to retry: it is waiting"):
        cluster.retry(handle)
    assert issubclass(UnknownTask, OncekeeperError)
