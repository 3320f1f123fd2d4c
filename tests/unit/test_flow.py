"""How much a node takes."""

from __future__ import annotations

import pytest

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
    one.handler("app.work").finished(1, now_ms=1_000)
    assert one.room("app.work", rerun=False, now_ms=2_000) == 5
    one.handler("app.work").outstanding = 5
    assert one.room("app.work", rerun=False, now_ms=2_000) == 0


def test_a_quick_handler_is_claimed_for_twice_what_was_finished_in_the_horizon() -> None:
    one = lane(slots=1)
    for now_ms in range(10_000, 11_000):
        one.handler("app.work").finished(10, now_ms)  # 10 a millisecond
    assert one.room("app.work", rerun=False, now_ms=11_000) == pytest.approx(2 * 10 * 100, rel=0.03)
    assert one.room("app.work", rerun=True, now_ms=11_000) == pytest.approx(2 * 10 * 400, rel=0.03)


def test_the_claim_doubles_each_round_while_the_workers_keep_up() -> None:
    one = Lane(1, horizon_ms=50, rerun_horizon_ms=200, claim_max=100_000)
    claims = []
    for turn in range(12):
        claims.append(one.room("app.work", rerun=False, now_ms=1_000 + 3 * turn))
        one.handler("app.work").finished(claims[-1], now_ms=1_002 + 3 * turn)
    assert claims[0] == 2
    assert claims[-1] > 1_000


def test_what_holds_the_workers_back_holds_the_claims_back() -> None:
    """Sixteen threads behind one lock: 700 tasks a second, whatever the threads' number says."""
    one = lane(slots=16)
    for turn in range(1_000):
        if turn % 10 == 0:
            one.handler("app.work").finished(7, now_ms=5_000 + turn)
    assert one.room("app.work", rerun=False, now_ms=6_000) == pytest.approx(2 * 0.7 * 100, rel=0.15)


def test_claims_are_bounded_however_quick_the_handler() -> None:
    one = lane(slots=16)
    one.handler("app.work").finished(10_000_000, now_ms=5)
    assert one.room("app.work", rerun=True, now_ms=5) == 10_000


def test_a_handler_that_rests_is_claimed_carefully_again() -> None:
    one = lane(slots=2)
    one.handler("app.work").finished(100_000, now_ms=1_000)
    assert one.room("app.work", rerun=False, now_ms=3_000) == 3


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
