"""How much a node takes."""

from __future__ import annotations

from dedup.ids import Ids
from node.flow import Lane
from node.pieces import Piece
from oncekeeper.envelope import TaskBatch


def piece(queue: str, count: int, handler: str = "app.work", partition: int = 0) -> Piece:
    batch = TaskBatch(queue=queue, handler=handler, ids=Ids(((1, count),)), bodies=(b"{}",) * count)
    return Piece(partition, 1, 0, batch, 0, count)


def lane(slots: int = 4) -> Lane:
    return Lane(slots, horizon_ms=100, rerun_horizon_ms=400, claim_max=10_000)


def test_a_slow_handler_is_claimed_for_the_free_slots_and_a_small_prefetch_only() -> None:
    one = lane(slots=4)
    one.handler("app.work").measured(1, 1_000_000)
    assert one.room("app.work", rerun=False) == 5
    one.handler("app.work").outstanding = 5
    assert one.room("app.work", rerun=False) == 0


def test_a_quick_handler_is_claimed_for_a_span_of_time() -> None:
    one = lane(slots=1)
    one.handler("app.work").measured(1000, 1000 * 50)
    assert one.room("app.work", rerun=False) == 100_000 // 50
    assert one.room("app.work", rerun=True) == 400_000 // 50


def test_claims_are_bounded_however_quick_the_handler() -> None:
    one = lane(slots=16)
    one.handler("app.work").measured(1000, 0)
    assert one.room("app.work", rerun=True) == 10_000


def test_queues_take_turns_so_that_a_deep_one_does_not_starve_another() -> None:
    one = lane()
    for _ in range(3):
        one.push(piece("deep", 10))
    one.push(piece("shallow", 1))
    taken = []
    while (found := one.next_piece(frozenset())) is not None:
        taken.append(one.take(found.count).batch.queue)
    assert taken == ["deep", "shallow", "deep", "deep"]


def test_a_paused_queue_waits_and_the_others_go_on() -> None:
    one = lane()
    one.push(piece("paused", 2))
    one.push(piece("open", 3))
    found = one.next_piece(frozenset({"paused"}))
    assert found is not None
    assert found.batch.queue == "open"
    one.take(3)
    assert one.next_piece(frozenset({"paused"})) is None
    assert one.ready_tasks == 2


def test_a_piece_that_is_taken_in_part_leaves_its_rest_in_front() -> None:
    one = lane()
    one.push(piece("q", 10))
    one.next_piece(frozenset())
    first = one.take(4)
    rest = one.next_piece(frozenset())
    assert rest is not None
    assert (first.ids, rest.ids) == (Ids(((1, 4),)), Ids(((5, 6),)))


def test_what_belongs_to_partitions_given_up_is_dropped() -> None:
    one = lane()
    one.push(piece("q", 10, partition=1))
    one.push(piece("q", 5, partition=2))
    one.drop(frozenset({1}))
    assert one.ready_tasks == 5
