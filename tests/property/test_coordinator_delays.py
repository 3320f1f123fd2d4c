"""Delayed tasks under seeded schedules of deaths, retries and a wall clock that jumps: never early, once, all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from dedup.ids import TaskId, ids_of
from node import messages as m
from node.deferring import answer_of_store
from node.rescheduling import NoSuchTask, NotDelayed, Overdue, Rescheduled, Rescheduling, Result, Untold
from node.workers.port import HandlerInfo
from oncekeeper.log.delayed import Place, enqueued
from raft.commands import Advance, Answer, Answered, Cancel, Command, Hold, Outcome
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
    """The steps of a reschedule (node/rescheduling.py), as its old time passes."""
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
    assert world.log.delays.move([Place(row.partition, row.offset)], later) == 1
    for node in world.nodes.values():
        node.feed(m.DelaysChanged(frozenset({row.partition})))
    assert held(world, ids, 0) is Outcome.SETTLED
    settle_all(world)
    check(world, {task_id: later})
    assert held(world, ids, 20_000) is Outcome.EXECUTED


class Store:
    """The world's log as node/rescheduling.py is given it, and its nodes as they are told."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.silent: set[str] = set()

    async def propose(self, commands: tuple[Command, ...], timeout_ms: int) -> tuple[Answer, ...]:
        return self.world.propose(commands)

    async def barrier(self, timeout_ms: int) -> None:
        pass

    async def with_log(self, work: Callable[[Any], Any]) -> Any:
        return work(self.world.log)

    async def tell(self, name: str, partitions: frozenset[int]) -> bool:
        node = self.world.nodes[name]
        if name in self.silent or not node.alive:
            return False
        node.feed(m.DelaysChanged(partitions))
        while node.asked:
            node.answer_one()
        return True

    def reschedule(self, task_id: TaskId, due_ms: int) -> Result:
        steps = Rescheduling(
            self.world.ledger,
            propose=self.propose,
            barrier=self.barrier,
            with_log=self.with_log,
            tell=self.tell,
            wall_ms=lambda: self.world.wall_ms,
        )
        return asyncio.run(steps.reschedule(task_id, due_ms))


def submit_soon(world: World, due_in_ms: int, then: str = "") -> tuple[TaskId, int]:
    """A task whose delay is so short that its owner keeps it in memory."""
    due_ms = world.wall_ms + due_in_ms
    (task_id,) = world.submit("app.checked", 1, due_ms=due_ms, then=then, submitted_ms=world.wall_ms)
    read(world)
    assert world.log.delays.counts() == {}
    return task_id, due_ms


@pytest.mark.parametrize("then", ["", "enqueue"])
@pytest.mark.parametrize("ahead_ms", [50, 900, 30_000])
def test_a_task_that_is_due_soon_waits_in_memory_and_is_rescheduled_all_the_same(
    then: str, ahead_ms: int
) -> None:
    world = started()
    task_id, _ = submit_soon(world, 1_000, then)
    due_ms = world.wall_ms + ahead_ms
    assert Store(world).reschedule(task_id, due_ms) == Rescheduled()
    settle_all(world)
    check(world, {task_id: due_ms})
    assert world.started[0][1] < due_ms + 1_000, "and not by the old time, nor when the hold would have ended"


def test_whoever_reads_the_message_later_finds_that_it_was_rescheduled() -> None:
    world = started()
    task_id, _ = submit_soon(world, 1_000)
    due_ms = world.wall_ms + 9_000
    assert Store(world).reschedule(task_id, due_ms) == Rescheduled()
    for name in ("n1", "n2"):  # before any position has passed it
        world.nodes[name].kill()
    settle_all(world)
    check(world, {task_id: due_ms})


def test_one_that_fell_due_while_it_was_held_is_looked_up_before_it_starts() -> None:
    world = started()
    task_id, _ = submit_soon(world, 1_000)
    world.pass_time(1_100)  # it waits for its claim to be answered
    due_ms = world.wall_ms + 5_000
    assert Store(world).reschedule(task_id, due_ms) == Rescheduled()
    settle_all(world)
    check(world, {task_id: due_ms})


def test_what_has_started_or_waits_for_its_turn_is_refused_and_held_up_by_nothing() -> None:
    world = started()
    (plain,) = world.submit("app.checked", 1)
    assert Store(world).reschedule(plain, world.wall_ms + 9_000) == NotDelayed()
    (kept,) = world.submit("app.checked", 1, due_ms=world.wall_ms + 3_000, then="enqueue")
    read(world)
    while not world.log.find(kept)[1:]:
        world.pass_time(100)
    before_ms = world.wall_ms
    assert Store(world).reschedule(kept, world.wall_ms + 9_000) == NotDelayed()
    settle_all(world)
    check(world, {plain: 0, kept: 0})
    assert world.started[-1][1] < before_ms + 1_000
    assert Store(world).reschedule(kept, world.wall_ms + 9_000) == NotDelayed()
    assert Store(world).reschedule(99_999, world.wall_ms) == NoSuchTask()


def test_an_append_to_the_queue_that_a_crash_cut_short_is_no_reschedule() -> None:
    """On Kafka the row stands until its tombstone: the queue has it already."""
    world = started()
    (task_id,) = world.submit("app.checked", 1, due_ms=world.wall_ms + 3_000, then="enqueue")
    read(world)
    world.pass_time(50)
    (row,) = world.log.delays.find(task_id)
    ((_, item),) = world.log.delays.fetch([row])
    world.log.append([enqueued(item.batch)])  # type: ignore[union-attr]
    assert Store(world).reschedule(task_id, world.wall_ms + HOUR_MS) == NotDelayed()
    read(world)
    settle_all(world)
    check(world, {task_id: 0})


def test_a_node_that_does_not_answer_makes_it_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.rescheduling.TELL_S", 0.2)
    world = started()
    task_id, _ = submit_soon(world, 1_000)
    store = Store(world)
    store.silent.add("n2")
    assert store.reschedule(task_id, world.wall_ms + 9_000) == Untold(frozenset({"n2"}))
    store.silent.clear()
    due_ms = world.wall_ms + 4_000
    assert store.reschedule(task_id, due_ms) == Rescheduled()
    settle_all(world)
    check(world, {task_id: due_ms})


def test_a_hold_that_ran_out_on_the_way_is_not_believed() -> None:
    world = started()
    task_id, _ = submit_soon(world, 1_000)
    store = Store(world)

    async def slow(timeout_ms: int) -> None:
        world.pass_time(400)
        for _ in range(30):
            world.propose((Advance("t", 500),))

    store.barrier = slow  # type: ignore[method-assign]
    assert store.reschedule(task_id, world.wall_ms + 9_000) == Overdue()


def test_what_falls_due_at_once_is_fetched_in_small_steps_one_after_the_other() -> None:
    """Each is read on the loop of a node, which has heartbeats to send."""
    world = World(1, HANDLERS)
    world.start("n1")
    due_ms = world.wall_ms + 3_000
    for _ in range(900):
        world.submit("app.checked", 1, due_ms=due_ms)
    read(world)
    node, fetches = world.nodes["n1"], 0
    world.pass_time(2_900)
    world.now_ms += 200
    effects = node.coordinator.on(m.Tick(), world.now_ms, world.wall_ms)
    while fetch := [effect for effect in effects if isinstance(effect, m.FetchDue)]:
        assert len(fetch) == 1
        assert len(fetch[0].rows) <= 256
        assert not any(
            isinstance(effect, m.FetchDue)
            for effect in node.coordinator.on(m.Tick(), world.now_ms, world.wall_ms)
        )
        effects = node.coordinator.on(
            answer_of_store(world.log.delays, fetch[0]), world.now_ms, world.wall_ms
        )
        fetches += 1
    assert fetches == 4
