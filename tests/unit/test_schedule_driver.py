"""Who leads fires each schedule once for each of its times, whoever dies at whatever step."""

from __future__ import annotations

import asyncio
import random

import pytest

from node.schedules import BACKLOG_MAX, declared, firing_id
from node.workers.port import HandlerInfo
from oncekeeper.envelope import decode_batch, decode_task, encode_batch, encode_task
from oncekeeper.schedules import parse
from raft.commands import Fire, PauseSchedule, Stale
from tests.support.http_node import handler
from tests.support.scheduled import START_MS, Killed, Leader, World

SECOND = 1_000


def turn(leader: Leader) -> int:
    return asyncio.run(leader.driver.turn())


def times(first: int, last: int, every_ms: int = SECOND) -> list[int]:
    return [START_MS + number * every_ms for number in range(first, last + 1)]


def test_nothing_fires_early_and_the_next_look_is_when_something_may() -> None:
    world = World()
    world.put("tick", "every 1s")
    leader = Leader(world)
    world.now_ms += 400
    assert turn(leader) == 600
    world.now_ms += 599
    assert turn(leader) == 1
    assert world.fired("tick", SECOND) == []
    world.now_ms += 1
    assert turn(leader) == 1000
    assert world.fired("tick", SECOND) == times(1, 1)


def test_the_message_says_which_firing_it_is_and_reads_back() -> None:
    world = World()
    world.put("tick", "every 1s")
    world.now_ms += 1500
    turn(Leader(world))
    ((task_id, batch),) = world.messages.items()
    assert task_id == firing_id("tick", START_MS + 1000)
    assert batch.submitted_by == "schedule tick for 2027-01-15T08:00:01.000Z"
    assert decode_batch(encode_batch(batch)) == batch
    assert decode_task(encode_task(batch)) == batch


def steps_of_a_turn() -> int:
    world = World()
    world.put("tick", "every 1s")
    world.now_ms += 3 * SECOND
    leader = Leader(world)
    turn(leader)
    return leader.steps


def test_a_leader_killed_between_any_two_steps_leaves_each_firing_to_happen_once() -> None:
    steps = steps_of_a_turn()
    assert steps > 8
    for dies_at in range(1, steps + 1):
        world = World()
        world.put("tick", "every 1s", "none")
        world.now_ms += 3 * SECOND
        doomed = Leader(world)
        doomed.dies_at = dies_at
        with pytest.raises(Killed):
            turn(doomed)
        world.now_ms += 2 * SECOND
        turn(Leader(world))
        assert world.fired("tick", SECOND) == times(1, 5), f"killed at step {dies_at}"
        assert world.ledger.schedules["tick"].fired == 5
        assert world.ledger.firings == {}


@pytest.mark.parametrize("seed", range(60))
def test_leaders_that_die_and_overlap_at_random_fire_everything_once(seed: int) -> None:
    draw = random.Random(seed)
    world = World()
    world.put("fast", "every 100ms", "all")
    world.put("slow", "every 1s", "all")

    async def one_leader() -> None:
        leader = Leader(world)
        leader.yields = True
        leader.dies_at = draw.choice([None, draw.randrange(1, 20)])
        # Its clock may be behind, or ahead: never by so much that what is due was not due by any clock.
        skew_ms = draw.choice([0, 0, -300, -3000])
        leader.clock_ms = lambda: world.now_ms + skew_ms
        try:
            for _ in range(draw.randrange(1, 6)):
                await leader.driver.turn()
                world.now_ms += draw.randrange(700)
        except Killed:
            pass

    async def history() -> None:
        for _ in range(12):
            # Two at a time: one of them was deposed and does not know it.
            await asyncio.gather(*(one_leader() for _ in range(draw.randrange(1, 3))))
        await Leader(world).driver.turn()

    asyncio.run(history())
    end = world.now_ms
    assert world.fired("fast", 100) == list(range(START_MS + 100, end + 1, 100))
    assert world.fired("slow", SECOND) == list(range(START_MS + SECOND, end + 1, SECOND))
    assert world.ledger.schedules["fast"].fired == len(world.fired("fast", 100))
    assert len(world.messages) == len(world.fired("fast", 100)) + len(world.fired("slow", SECOND))


@pytest.mark.parametrize(
    ("catch_up", "expected", "missed"),
    [
        ("none", [], 3600),
        ("latest", times(3600, 3600), 3599),
        ("all", times(3600 - BACKLOG_MAX + 1, 3600), 1),
    ],
)
def test_what_was_missed_while_nobody_led_goes_by_catch_up(
    catch_up: str, expected: list[int], missed: int
) -> None:
    world = World()
    world.put("tick", "every 1s", catch_up)
    world.now_ms += 3600 * SECOND
    turn(Leader(world))
    assert world.fired("tick", SECOND) == expected
    missed = missed if catch_up == "all" else min(missed, BACKLOG_MAX + (catch_up == "none"))
    assert world.ledger.schedules["tick"].missed == missed
    world.now_ms += 2 * SECOND
    turn(Leader(world))
    assert world.fired("tick", SECOND) == expected + times(3601, 3602)


def test_a_gap_shorter_than_the_allowance_loses_nothing_even_with_catch_up_none() -> None:
    world = World()
    world.put("tick", "every 1s", "none")
    world.now_ms += 20 * SECOND
    turn(Leader(world, late_ms=19_000))
    assert world.fired("tick", SECOND) == times(1, 20)


def test_a_clock_set_back_fires_nothing_again_and_goes_on_where_it_was() -> None:
    world = World()
    world.put("tick", "every 1s", "all")
    world.now_ms += 5 * SECOND
    leader = Leader(world)
    turn(leader)
    leader.clock_ms = lambda: world.now_ms - 3600 * SECOND
    for _ in range(50):
        world.now_ms += SECOND
        assert turn(leader) == 1000
    assert world.fired("tick", SECOND) == times(1, 5)
    assert world.appended == 5
    leader.clock_ms = lambda: world.now_ms
    turn(leader)
    assert world.fired("tick", SECOND) == times(1, 55)


def test_a_clock_set_forward_by_an_hour_misses_the_hour_and_strobing_fires_nothing_twice() -> None:
    world = World()
    world.put("tick", "every 1s", "latest")
    leader = Leader(world)
    for number in range(20):
        jump = 3600 * SECOND if number % 2 else 0
        leader.clock_ms = lambda jump=jump: world.now_ms + jump  # type: ignore[misc]
        world.now_ms += SECOND
        turn(leader)
    assert world.appended == len(world.messages)
    # One before the first jump and one for all that it jumped over; later, the two seconds between jump and jump.
    assert world.ledger.schedules["tick"].fired == world.appended == 1 + 1 + 9 * 2


def test_what_a_leader_decided_before_a_pause_and_never_said_fires_nothing_after_it() -> None:
    world = World()
    world.put("tick", "every 1s", "all")
    revision = world.ledger.schedules["tick"].revision
    world.now_ms += 5 * SECOND
    world.apply(PauseSchedule("tick", True, "me", world.now_ms))
    turn(Leader(world))
    assert world.apply(Fire("tick", revision, START_MS + 1000)) == (Stale(),)
    world.now_ms += 60 * SECOND
    world.apply(PauseSchedule("tick", False, "me", world.now_ms))
    leader = Leader(world)
    turn(leader)
    assert world.messages == {}
    world.now_ms += SECOND
    turn(leader)
    assert world.fired("tick", SECOND) == times(66, 66)


def test_a_schedule_that_this_machine_cannot_read_stands_still_and_says_so_and_others_go_on() -> None:
    world = World()
    world.put("lost", "* * * * *", zone="Mars/Base")
    world.put("tick", "every 1s")
    world.now_ms += SECOND
    leader = Leader(world)
    turn(leader)
    assert world.fired("tick", SECOND) == times(1, 1)
    assert "'Mars/Base' is no known time zone" in leader.notes["schedule lost"]


def test_a_thousand_schedules_fire_in_one_turn() -> None:
    world = World()
    for number in range(1000):
        world.put(f"s{number}", "every 1s")
    world.now_ms += SECOND
    turn(Leader(world))
    assert len(world.messages) == 1000


# --- the application's own ------------------------------------------------------------------------------------


def declaring(**whens: str) -> dict[str, HandlerInfo]:
    return {f"shop.{name}": handler(f"shop.{name}", schedule=when) for name, when in whens.items()}


def declare(world: World, handlers: dict[str, HandlerInfo]) -> Leader:
    leader = Leader(world)

    async def started() -> None:
        leader.driver.declare(handlers)
        await asyncio.gather(*leader.spawned)

    asyncio.run(started())
    return leader


def test_the_code_that_started_last_says_which_schedules_there_are() -> None:
    world = World()
    world.put("by.hand", "every 1h")
    declare(world, declaring(a="every 1s", b="0 9 * * *", plain=""))
    assert {name: s.owner for name, s in world.ledger.schedules.items()} == {
        "by.hand": "hand",
        "shop.a": "code",
        "shop.b": "code",
    }
    before = world.ledger.schedules["shop.a"]
    declare(world, declaring(a="every 1s", b="0 10 * * *"))
    assert world.ledger.schedules["shop.a"] == before
    assert world.ledger.schedules["shop.b"].timetable.when == "0 10 * * *"
    declare(world, declaring(b="0 10 * * *"))
    assert world.ledger.schedules.keys() == {"by.hand", "shop.b"}
    index = world.ledger.applied_index
    declare(world, declaring(b="0 10 * * *"))
    assert world.ledger.applied_index == index, "nothing has changed, and nobody is asked"


def test_a_name_that_was_taken_by_hand_is_not_taken_over_and_the_node_says_so() -> None:
    world = World()
    world.put("shop.a", "every 1h")
    leader = declare(world, declaring(a="every 1s"))
    assert world.ledger.schedules["shop.a"].timetable.when == "every 1h"
    assert "owned by people, by hand" in leader.notes["schedule shop.a"]


def test_a_declared_schedule_runs_its_handler_in_its_queue_without_arguments() -> None:
    info = handler("shop.a", schedule="0 9 * * *", tz="Europe/Berlin", catch_up="all", queue="mail")
    (timetable,) = declared({"shop.a": info}).values()
    assert (timetable.handler, timetable.queue, timetable.body) == ("shop.a", "mail", b"{}")
    assert (parse(timetable.when, timetable.zone), timetable.catch_up) == (
        parse("0 9 * * *", "Europe/Berlin"),
        "all",
    )


# --- its life on a node ---------------------------------------------------------------------------------------


def test_a_node_works_while_it_leads_and_there_are_schedules() -> None:
    world = World()

    async def life() -> None:
        leader = Leader(world)
        leader.driver.wake()
        assert leader.spawned == [], "there is nothing to do"
        world.put("tick", "every 1s")
        world.now_ms += SECOND
        leader.leads = False
        leader.driver.wake()
        assert leader.spawned == [], "another leads"
        leader.leads = True
        leader.driver.wake()
        leader.driver.wake()
        (work,) = leader.spawned
        while len(world.messages) < 1:
            await asyncio.sleep(0)
        world.now_ms += SECOND
        leader.driver.wake()
        while len(world.messages) < 2:
            await asyncio.sleep(0)
        leader.leads = False
        leader.driver.wake()
        await asyncio.wait_for(work, 30)
        leader.leads = True
        leader.driver.wake()
        assert len(leader.spawned) == 2
        leader.spawned[1].cancel()

    asyncio.run(life())
    assert world.fired("tick", SECOND) == times(1, 2)
