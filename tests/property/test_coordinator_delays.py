"""Delayed tasks under seeded schedules of deaths, retries and a wall clock that jumps: never early, once, all."""

from __future__ import annotations

import pytest

from dedup.ids import TaskId, ids_of
from node import messages as m
from node.workers.port import HandlerInfo
from raft.commands import Answered, Cancel, Hold, Outcome
from tests.support.coordinated import World, handler, run_schedule, settle_all

HOUR_MS = 3_600_000
SLOW_RETRY = HandlerInfo("app.flaky", "cpu", "short", False, 10_000, 4, 61_000, 64_000, "check", "default")
HANDLERS = {"app.checked": handler("app.checked"), "app.flaky": SLOW_RETRY}


def started(seed: int = 1) -> World:
    world = World(seed, HANDLERS)
    for name in ("n1", "n2", "n3"):
        world.start(name)
    return world


def read(world: World) -> None:
    for node in world.nodes.values():
        node.feed(m.MoreToRead(None))


def held(world: World, ids: object, hold_ms: int) -> Outcome:
    (answer,) = world.propose((Hold(ids, hold_ms),))  # type: ignore[arg-type]
    assert isinstance(answer, Answered)
    return answer.spans[0].outcome


def check(world: World, dues: dict[TaskId, int]) -> None:
    for task_id, wall_ms in world.started:
        assert wall_ms >= dues[task_id], f"seed {world.seed}: {task_id} is {dues[task_id] - wall_ms} ms early"
    for task_id in dues:
        state = world.ledger.describe(task_id).state
        effects = world.effects[task_id]
        assert (state, effects) in (("executed", 1), ("dead", 0), ("cancelled", 0)), (
            world.seed,
            task_id,
            state,
        )
    assert world.log.delays.counts() == {}
    world.ledger.check_invariants()


@pytest.mark.parametrize("block", range(4))
def test_every_delayed_task_runs_once_and_never_early_whatever_dies(block: int) -> None:
    for seed in range(block * 10, block * 10 + 10):
        world = started(seed)
        draw, dues = world.random, {}
        for turn in range(6):
            name = sorted(HANDLERS)[turn % 2]
            due_ms = world.wall_ms + draw.choice((50, 1_500, 2_500, 4_000))
            for task_id in world.submit(name, 1 + 3 * turn, due_ms=due_ms, then=draw.choice(("", "enqueue"))):
                dues[task_id] = due_ms
            read(world)
            run_schedule(world, 120, 0.03)
            if draw.random() < 0.2:
                some = ids_of([draw.choice(sorted(dues))])  # type: ignore[type-var]
                world.propose((Cancel(some, "me"),))
        settle_all(world)
        check(world, dues)


def test_a_clock_set_back_by_an_hour_makes_late_and_one_set_forward_is_seen() -> None:
    world = started()
    dues = dict.fromkeys(
        world.submit("app.checked", 5, due_ms=world.wall_ms + 10_000), world.wall_ms + 10_000
    )
    read(world)
    world.pass_time(100)
    assert sum(world.log.delays.counts().values()) == 5
    world.wall_ahead_ms -= HOUR_MS
    for _ in range(200):
        world.pass_time(100)
    assert not world.started, "by the clock that is shown now it is an hour too soon"
    world.wall_ahead_ms += 2 * HOUR_MS
    settle_all(world)
    check(world, dues)


def test_what_was_moved_away_while_it_was_held_runs_by_its_new_time_alone() -> None:
    """The steps of a reschedule (node/http/delays.py), as its old time passes."""
    world = started()
    ids = world.submit("app.checked", 1, due_ms=world.wall_ms + 3_000)
    (task_id,) = ids
    read(world)
    world.pass_time(2_950)
    assert held(world, ids, 20_000) is Outcome.SETTLED
    for _ in range(10):  # it falls due, is fetched, and refused
        world.pass_time(20)
        for node in world.nodes.values():
            while node.asked:
                node.answer_one()
    later = world.wall_ms + 7_000
    (row,) = world.log.delays.find(task_id)
    from oncekeeper.log.delayed import Place

    assert world.log.delays.move([Place(row.partition, row.offset)], later) == 1
    for node in world.nodes.values():
        node.feed(m.DelaysChanged(frozenset({row.partition})))
    assert held(world, ids, 0) is Outcome.SETTLED
    settle_all(world)
    check(world, {task_id: later})
    assert held(world, ids, 20_000) is Outcome.EXECUTED
