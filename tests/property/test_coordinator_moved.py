"""What was moved to an earlier time runs then, whatever its message says, and when it comes back from aside too."""

from __future__ import annotations

import pytest

from dedup.ids import TaskId
from node import messages as m
from node.deferring import due_by_message, is_kept
from node.pieces import Piece
from oncekeeper.envelope import decode_task
from oncekeeper.log.delayed import Place
from tests.support.coordinated import World, handler, run_schedule

HOUR_MS = 3_600_000


def started() -> World:
    world = World(1, {"app.checked": handler("app.checked")})
    for name in ("n1", "n2", "n3"):
        world.start(name)
    return world


def read(world: World) -> None:
    for node in world.nodes.values():
        node.feed(m.MoreToRead(None))


def moved_to_now(world: World, then: str, handler_name: str) -> TaskId:
    """A task that is due in an hour by its message, and now by the store."""
    (task_id,) = world.submit(handler_name, 1, due_ms=world.wall_ms + HOUR_MS, then=then)
    read(world)
    world.pass_time(100)
    (row,) = world.log.delays.find(task_id)
    assert world.log.delays.move([Place(row.partition, row.offset)], world.wall_ms + 100) == 1
    for node in world.nodes.values():
        node.feed(m.DelaysChanged(frozenset({row.partition})))
    return task_id


@pytest.mark.parametrize("then", ["", "enqueue"])
def test_what_was_moved_to_an_earlier_time_does_not_wait_for_that_of_its_message(then: str) -> None:
    world = started()
    task_id = moved_to_now(world, then, "app.checked")
    for _ in range(20):
        read(world)
        run_schedule(world, 20, 0.0)
        world.pass_time(100)
    assert world.ledger.describe(task_id).state == "executed"


def test_a_dead_letter_that_is_brought_back_does_not_wait_for_the_time_of_its_message() -> None:
    world = started()
    task_id = moved_to_now(world, "", "app.unknown")
    for _ in range(20):
        run_schedule(world, 20, 0.0)
        world.pass_time(100)
    assert world.ledger.describe(task_id).state == "dead"
    ((_, task),) = world.log.aside("dead", 0, 10)
    piece = Piece(0, 1, 0, decode_task(task.message), 0, 1)
    assert due_by_message(piece) == 0
    assert not is_kept(piece.batch)
