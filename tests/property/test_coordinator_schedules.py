"""Coordinators under seeded schedules of deaths, doubts and delays: nothing lost, nothing twice."""

from __future__ import annotations

import pytest

from raft.commands import Outcome
from tests.support.coordinated import World, handler, run_schedule, settle_all

HANDLERS = {
    name: handler(name, on_doubt=doubt)
    for name, doubt in [("app.checked", "check"), ("app.flaky", "check"), ("app.rerun", "rerun")]
}


def check_books(world: World, ids: list[object], names: dict[object, str]) -> None:
    aside = {task.id for _, task in world.log.aside("dead", 0, 10_000)}
    dead = {task_id for task_id in ids if world.ledger.describe(task_id).state == "dead"}  # type: ignore[arg-type]
    assert dead <= aside, "a dead letter without its message"
    for task_id in ids:
        effects = world.effects[task_id]  # type: ignore[index]
        if names[task_id] == "app.rerun":
            assert effects >= 1 or task_id in dead, (world.seed, task_id)
        elif task_id in dead:
            assert effects == 0, (world.seed, task_id)
        else:
            assert effects == 1, (world.seed, task_id, effects, world.ledger.describe(task_id))  # type: ignore[arg-type]


def run_seed(seed: int, kills: float) -> World:
    world = World(seed, HANDLERS)
    for name in ("n1", "n2", "n3"):
        world.start(name)
    names: dict[object, str] = {}
    for turn in range(6):
        name = sorted(HANDLERS)[turn % 3]
        for task_id in world.submit(name, 10 + 7 * turn):
            names[task_id] = name
        keys = [bytes([turn, number]) * 8 for number in range(12)]
        for task_id in world.submit_keys(name, keys + keys[:3]):  # three of them twice
            names[task_id] = name
        for node in world.nodes.values():
            from node import messages as m

            node.feed(m.MoreToRead(frozenset(range(4))))
        run_schedule(world, 120, kills)
    settle_all(world)
    check_books(world, list(names), names)
    world.ledger.check_invariants()
    for task_id in names:
        assert world.ledger.describe(task_id).state in ("executed", "dead"), (seed, task_id)  # type: ignore[arg-type]
    return world


def run_seeds(count: int) -> None:
    for seed in range(count):
        run_seed(seed, kills=0.03)


@pytest.mark.parametrize("block", range(8))
def test_every_task_takes_effect_once_whatever_dies_and_when(block: int) -> None:
    for seed in range(block * 25, block * 25 + 25):
        run_seed(seed, kills=0.03)


def test_without_deaths_nothing_waits_for_a_human() -> None:
    world = run_seed(4711, kills=0.0)
    assert world.ledger.counts().suspect == 0


def test_a_planted_bug_is_seen_settling_a_crash_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from node import coordinator
    from node.workers.port import Ended

    original = coordinator.Coordinator._ended

    def careless(self: coordinator.Coordinator, closing: object, ended: Ended) -> None:
        original(self, closing, Ended.DONE if ended is Ended.CRASHED else ended)  # type: ignore[arg-type]

    monkeypatch.setattr(coordinator.Coordinator, "_ended", careless)
    with pytest.raises(AssertionError):
        run_seeds(30)


def test_a_planted_bug_is_seen_forgetting_what_is_in_our_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    from node.hands import Hands

    monkeypatch.setattr(Hands, "take", lambda self, piece: ([piece], []))
    with pytest.raises((AssertionError, KeyError)):
        run_seeds(30)


def test_a_cancelled_task_never_starts() -> None:
    from raft.commands import Answered, Cancel

    world = World(1, HANDLERS)
    ids = world.submit("app.checked", 5)
    (answer,) = world.propose((Cancel(ids, "me"),))
    assert isinstance(answer, Answered)
    assert [span.outcome for span in answer.spans] == [Outcome.SETTLED]
    world.start("n1")
    settle_all(world)
    assert not world.starts
