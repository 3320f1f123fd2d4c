"""Schedules and delayed tasks in the in-memory cluster: by its clock, and by the code that nodes have."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from chaos.testing import InMemoryCluster
from oncekeeper import App, Refused, current_task, every

app = App("clocks")
seen: list[tuple[str, str]] = []


def note(cluster: InMemoryCluster, name: str) -> None:
    seen.append((name, datetime.fromtimestamp(cluster.wall_ms / 1000, UTC).strftime("%a %H:%M:%S")))


@pytest.fixture
def cluster(oncekeeper_cluster: InMemoryCluster) -> InMemoryCluster:
    seen.clear()
    global now
    now = oncekeeper_cluster
    return oncekeeper_cluster


now: InMemoryCluster


@app.task(schedule="0 9 * * mon-fri", on_doubt="rerun")
def digest() -> None:
    note(now, "digest")


@app.task(schedule=every("10s"), catch_up="none", on_doubt="rerun", retries=2, retry_delay=1)
def beat() -> None:
    if current_task().attempt == 1 and len(seen) == 1:
        raise ConnectionError("once")
    note(now, "beat")


def test_each_fires_at_its_times_as_the_clock_is_moved(cluster: InMemoryCluster) -> None:
    cluster.use(app)
    cluster.pause()  # of the handlers' queue, so that what was fired waits
    cluster.advance("35s")
    assert [len(cluster.fired(each)) for each in (digest, beat)] == [0, 3]
    assert seen == []
    cluster.resume()
    cluster.run_until_idle()
    assert [name for name, _ in seen] == ["beat"] * 3


def test_a_cron_line_fires_on_weekdays_and_its_task_is_one_like_all_others(cluster: InMemoryCluster) -> None:
    weekdays = App("weekdays")

    @weekdays.task(schedule="0 9 * * mon-fri", tz="Europe/Berlin", on_doubt="rerun")
    def report() -> str:
        note(cluster, "report")
        return "told"

    cluster.use(weekdays)  # it is Thursday, the first of January 2026
    cluster.advance("5d")
    assert [when for _, when in seen] == ["Thu 08:00:00", "Fri 08:00:00", "Mon 08:00:00"]
    assert [cluster.status(each) for each in cluster.fired(report)] == ["executed"] * 3
    assert "schedule" in " ".join(cluster.why(cluster.fired(report)[0]))


def test_idle_does_not_wait_for_what_will_fire_and_fires_what_does_on_the_way(
    cluster: InMemoryCluster,
) -> None:
    cluster.use(app)
    before_ms = cluster.wall_ms
    cluster.run_until_idle()
    assert cluster.wall_ms == before_ms
    cluster.advance("20s")  # the first of two beats, and the second fails once
    cluster.run_until_idle()
    assert [name for name, _ in seen] == ["beat", "beat"]
    assert cluster.wall_ms - before_ms < 60_000


def test_what_fell_due_while_no_node_was_alive_is_missed_or_caught_up_as_the_handler_says(
    cluster: InMemoryCluster,
) -> None:
    cluster.use(app)
    for node in cluster.nodes:
        cluster.kill(node)
    cluster.advance("2d")
    assert cluster.fired(beat) == []
    for node in cluster.nodes:
        cluster.start(node)
    cluster.run()
    assert len(cluster.fired(digest)) == 1, "the latest of two"
    assert cluster.fired(beat) == []
    cluster.advance("10s")
    assert len(cluster.fired(beat)) == 1


def test_a_crash_in_a_scheduled_task_is_recovered_from(cluster: InMemoryCluster) -> None:
    cluster.use(app)
    cluster.crash(beat, at="start", node=True)
    cluster.advance("10s")
    cluster.run_until_idle()
    (first, *_) = cluster.fired(beat)
    assert cluster.status(first) == "executed"
    assert sum(cluster.nodes.values()) == 2


def test_it_works_in_a_test_that_has_an_event_loop(cluster: InMemoryCluster) -> None:
    async def test() -> None:
        cluster.use(app)
        cluster.advance("10s")

    asyncio.run(test())
    assert len(cluster.fired(beat)) == 1


def test_an_applications_schedules_are_not_those_of_another(cluster: InMemoryCluster) -> None:
    other = App("other")

    @other.task(schedule=every("5s"), on_doubt="rerun")
    def tick() -> None: ...

    cluster.use(app)
    cluster.use(other)
    cluster.advance("10s")
    assert [len(cluster.fired(each)) for each in (beat, tick)] == [1, 2]


@pytest.mark.parametrize("delay", ["1s", "1h"])
def test_a_delay_is_of_the_clusters_clock_and_its_task_can_be_rescheduled(
    cluster: InMemoryCluster, delay: str
) -> None:
    later = App("later")

    @later.task(on_doubt="rerun")
    def remind() -> None:
        note(cluster, "remind")

    tasks = [cluster.submit(remind.options(delay=delay)) for _ in range(3)]
    cluster.run()
    assert [cluster.status(task) for task in tasks] == ["delayed"] * 3
    tasks[0].reschedule(delay="2h")
    assert tasks[1].reschedule(due=datetime(2026, 1, 1, 0, 0, 2, tzinfo=UTC)).second == 2
    cluster.advance("90m")
    assert [cluster.status(task) for task in tasks] == ["delayed", "executed", "executed"]
    assert seen == [
        ("remind", "Thu 00:00:02"),
        ("remind", "Thu 00:00:02" if delay == "1s" else "Thu 01:00:01"),
    ]
    cluster.run_until_idle()
    assert seen[-1] == ("remind", "Thu 02:00:01")
    with pytest.raises(Refused, match="executed"):
        tasks[0].reschedule(delay="1s")
