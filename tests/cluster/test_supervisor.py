"""The supervisor's duty, with real processes that stand in for nodes."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import pytest

from node.cluster import Locked, create, is_held, signal_holder
from node.supervisor import Event, Supervisor
from tests.support.cli_nodes import HOPELESS, OBEDIENT, STUBBORN, stand_in


@pytest.fixture
def cluster(tmp_path):
    return create(tmp_path / "data", nodes=2, app="shop:app", app_dir=tmp_path)


async def until(condition, what, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)
    assert condition(), what


@asynccontextmanager
async def supervised(cluster, source=OBEDIENT, **options):
    events: list[Event] = []
    supervisor = Supervisor(cluster, command=stand_in(source), on_event=events.append, **options)
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor, running, events
        supervisor.stop()
        await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def of(events, what):
    return [event for event in events if event.what == what]


def test_nodes_are_started_and_drained_at_the_end(cluster):
    async def scene():
        async with supervised(cluster) as (_, _, events):
            await until(lambda: len(cluster.running()) == 2, "both run")
            started = {event.node: event.pid for event in of(events, "started")}
            assert cluster.running() == started
        assert [event.exit_code for event in of(events, "exited")] == [0, 0]
        assert not of(events, "killed")
        assert cluster.running() == {}

    asyncio.run(scene())


def test_a_node_that_dies_is_started_again(cluster):
    async def scene():
        async with supervised(cluster) as (_, _, events):
            await until(lambda: len(cluster.running()) == 2, "both run")
            first = cluster.running()["n1"]
            os.kill(first, signal.SIGKILL)
            await until(lambda: cluster.running().get("n1", first) != first, "n1 is another process")
            assert Event("exited", "n1", first, -signal.SIGKILL) in events

    asyncio.run(scene())


def test_without_restart_a_dead_node_stays_down_until_somebody_starts_it(cluster):
    async def scene():
        async with supervised(cluster, restart=False) as (_, _, events):
            await until(lambda: len(cluster.running()) == 2, "both run")
            os.kill(cluster.running()["n1"], signal.SIGKILL)
            await until(lambda: of(events, "exited"), "its end is noticed")
            by_hand = await asyncio.create_subprocess_exec(*stand_in(OBEDIENT)(cluster, "n1", 0))
            await until(lambda: Event("adopted", "n1", by_hand.pid) in events, "it is adopted")
            assert len(of(events, "started")) == 2
        assert await by_hand.wait() == 0

    asyncio.run(scene())


def test_nodes_of_a_killed_supervisor_are_adopted_and_drained(cluster):
    async def scene():
        orphan = await asyncio.create_subprocess_exec(*stand_in(OBEDIENT)(cluster, "n2", 0))
        await until(lambda: cluster.running() == {"n2": orphan.pid}, "n2 runs")
        async with supervised(cluster) as (_, _, events):
            await until(lambda: len(cluster.running()) == 2, "n1 joined it")
            assert [event.node for event in of(events, "started")] == ["n1"]
        assert await orphan.wait() == 0

    asyncio.run(scene())


def test_a_node_that_does_not_drain_in_time_is_killed(cluster):
    async def scene():
        async with supervised(cluster, STUBBORN, drain_s_max=0.1) as (_, _, events):
            await until(lambda: len(cluster.running()) == 2, "both run")
        assert {event.node for event in of(events, "killed")} == {"n1", "n2"}
        assert cluster.running() == {}

    asyncio.run(scene())


def test_a_second_stop_does_not_wait_for_the_drain(cluster):
    async def scene():
        async with supervised(cluster, STUBBORN, drain_s_max=3600) as (supervisor, _, events):
            await until(lambda: len(cluster.running()) == 2, "both run")
            supervisor.stop()
            await until(lambda: len(of(events, "draining")) == 2, "they are asked to drain")
        assert len(of(events, "killed")) == 2

    asyncio.run(scene())


def test_a_bad_configuration_is_not_tried_again(cluster):
    async def scene():
        async with supervised(cluster, HOPELESS) as (_, running, events):
            await until(lambda: len(of(events, "exited")) == 2, "both ended")
            await asyncio.wait((running,), timeout=0.5)
        assert [event.exit_code for event in of(events, "exited")] == [2, 2]

    asyncio.run(scene())


def test_a_directory_has_one_supervisor(cluster):
    async def scene():
        async with supervised(cluster):
            await until(lambda: is_held(cluster.supervisor_lock), "the first holds the lock")
            with pytest.raises(Locked, match=f"is running already as process {os.getpid()}"):
                await Supervisor(cluster).run()

    asyncio.run(scene())


def test_nothing_that_was_started_outlives_a_cancelled_supervisor(cluster):
    async def scene():
        async with supervised(cluster, STUBBORN) as (_, running, events):
            await until(lambda: len(cluster.running()) == 2, "both run")
            running.cancel()
            await until(lambda: not cluster.running(), "both are gone")
            events.clear()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(scene())


def test_a_signal_reaches_the_holder_of_a_lock(cluster):
    async def scene():
        node = await asyncio.create_subprocess_exec(*stand_in(OBEDIENT)(cluster, "n1", 0))
        await until(lambda: cluster.running() == {"n1": node.pid}, "n1 runs")
        assert signal_holder(cluster.node_lock("n1"), signal.SIGTERM)
        assert await node.wait() == 0

    asyncio.run(scene())
