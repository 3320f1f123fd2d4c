from __future__ import annotations

import pytest

from dedup.ids import RANGE_ID_MAX, Ids
from raft.commands import (
    Advance,
    Allocated,
    AllocateIds,
    Answered,
    Cancel,
    Claim,
    Freed,
    Join,
    Leave,
    Outcome,
    Rejected,
    Result,
    Settle,
    Settlement,
    Span,
)
from raft.ledger import LedgerCorrupt, LedgerSettings
from raft.ledger_reads import TaskState
from tests.support.ledger_driver import KEY, Driver, rows, run_of


@pytest.fixture
def driver() -> Driver:
    driver = Driver()
    driver.allocate(1000)
    driver.join("n1")
    driver.join("n2")
    return driver


N1, N2 = 2, 3


def test_a_batch_of_neighbours_is_granted_as_one_span_with_the_entry_as_its_fence(driver: Driver) -> None:
    assert driver.said(Claim(N1, run_of(1, 1000))) == [(1000, Outcome.GRANTED, 4, 1)]


def test_asking_again_gets_the_same_fence(driver: Driver) -> None:
    fence = driver.claim(N1, run_of(1, 10))
    assert driver.said(Claim(N1, run_of(5, 10))) == [
        (6, Outcome.GRANTED, fence, 1),
        (4, Outcome.GRANTED, fence + 1, 1),
    ]


def test_what_a_live_session_holds_is_held_for_all_others(driver: Driver) -> None:
    driver.claim(N1, run_of(1, 10))
    assert driver.said(Claim(N2, run_of(10, 2))) == [(1, Outcome.HELD, 0, N1), (1, Outcome.GRANTED, 5, 1)]


def test_the_answers_follow_the_order_of_the_ids(driver: Driver) -> None:
    executed, held, dead, cancelled = run_of(10), run_of(8), run_of(6), run_of(4)
    driver.settle(N1, driver.claim(N1, executed), executed, Result.DONE)
    driver.claim(N2, held)
    driver.settle(N1, driver.claim(N1, dead), dead, Result.DEAD)
    driver.do(Cancel(cancelled))
    ids = Ids(((10, 1), (8, 1), (6, 1), (4, 1), (1001, 1), (2, 1)), (KEY,))
    fence = driver.index + 1
    assert driver.said(Claim(N1, ids)) == [
        (1, Outcome.EXECUTED, 0, 0),
        (1, Outcome.HELD, 0, N2),
        (1, Outcome.DEAD, 0, 0),
        (1, Outcome.CANCELLED, 0, 0),
        (1, Outcome.UNALLOCATED, 0, 0),
        (2, Outcome.GRANTED, fence, 1),
    ]


def test_an_id_twice_in_a_claim_is_granted_once_and_shown_twice(driver: Driver) -> None:
    ids = Ids(((1, 3), (2, 1)), (KEY, KEY))
    assert driver.said(Claim(N1, ids)) == [(6, Outcome.GRANTED, 4, 1)]
    assert driver.ledger.counts().claimed == 4


def test_a_session_that_is_not_live_gets_lapsed_for_everything(driver: Driver) -> None:
    driver.do(Leave(N1))
    assert driver.said(Claim(N1, Ids(((1, 5), (2000, 5))))) == [(10, Outcome.LAPSED, 0, 0)]


def test_a_run_that_leaves_the_allocated_ranges_is_cut_there(driver: Driver) -> None:
    assert driver.outcomes(Claim(N1, run_of(999, 4))) == [(2, Outcome.GRANTED), (2, Outcome.UNALLOCATED)]


def test_done_is_executed_for_good(driver: Driver) -> None:
    fence = driver.claim(N1, run_of(1, 10))
    assert driver.settle(N1, fence, run_of(1, 10), Result.DONE) == [(10, Outcome.SETTLED)]
    assert driver.settle(N1, fence, run_of(1, 10), Result.DONE) == [(10, Outcome.EXECUTED)]
    assert driver.settle(N1, fence, run_of(1, 10), Result.DEAD) == [(10, Outcome.EXECUTED)]
    assert driver.outcomes(Claim(N2, run_of(1, 10))) == [(10, Outcome.EXECUTED)]


def test_a_retry_is_early_until_it_is_due_and_then_the_next_attempt(driver: Driver) -> None:
    fence = driver.claim(N1, run_of(1))
    assert driver.settle(N1, fence, run_of(1), Result.RETRY, 1500) == [(1, Outcome.SETTLED)]
    assert driver.events == (Freed(run_of(1)),)
    driver.pass_ms(600)
    assert driver.said(Claim(N2, run_of(1))) == [(1, Outcome.EARLY, 0, 900)]
    driver.pass_ms(900)
    assert driver.said(Claim(N2, run_of(1))) == [(1, Outcome.GRANTED, driver.index, 2)]


def test_a_claim_of_another_attempt_than_the_next_is_stale(driver: Driver) -> None:
    assert driver.said(Claim(N1, run_of(1), 2)) == [(1, Outcome.STALE, 0, 1)]
    driver.settle(N1, driver.claim(N1, run_of(1)), run_of(1), Result.RETRY)
    assert driver.said(Claim(N1, run_of(1), 1)) == [(1, Outcome.STALE, 0, 2)]
    assert driver.outcomes(Claim(N1, run_of(1), 2)) == [(1, Outcome.GRANTED)]


def test_a_release_gives_the_attempt_back(driver: Driver) -> None:
    driver.settle(N1, driver.claim(N1, run_of(1)), run_of(1), Result.RELEASED)
    assert driver.said(Claim(N2, run_of(1))) == [(1, Outcome.GRANTED, driver.index, 1)]


def test_a_settle_with_another_fence_or_session_changes_nothing(driver: Driver) -> None:
    fence = driver.claim(N1, run_of(1, 3))
    before = driver.ledger.describe(1)
    assert driver.settle(N1, fence + 1, run_of(1, 3), Result.DONE) == [(3, Outcome.FENCED)]
    assert driver.settle(N2, fence, run_of(1, 3), Result.DONE) == [(3, Outcome.FENCED)]
    assert driver.ledger.describe(1) == before


def test_a_settle_of_what_was_never_claimed_is_fenced(driver: Driver) -> None:
    assert driver.settle(N1, 1, Ids(((1000, 2),), (KEY,)), Result.DONE) == [
        (1, Outcome.FENCED),
        (1, Outcome.UNALLOCATED),
        (1, Outcome.FENCED),
    ]


@pytest.mark.parametrize("result", [Result.RETRY, Result.RELEASED, Result.DEAD, Result.DOUBT])
def test_a_settle_that_was_taken_may_be_repeated(driver: Driver, result: Result) -> None:
    fence = driver.claim(N1, run_of(1))
    assert driver.settle(N1, fence, run_of(1), result) == [(1, Outcome.SETTLED)]
    assert driver.settle(N1, fence, run_of(1), result) == [(1, Outcome.SETTLED)]
    assert driver.events == ()


def test_a_claim_that_was_closed_cannot_be_closed_otherwise(driver: Driver) -> None:
    fence = driver.claim(N1, run_of(1))
    driver.settle(N1, fence, run_of(1), Result.DEAD)
    assert driver.settle(N1, fence, run_of(1), Result.DONE) == [(1, Outcome.FENCED)]
    assert driver.ledger.describe(1) == TaskState("dead", fence, attempt=1)


def test_one_entry_never_grants_an_id_twice(driver: Driver) -> None:
    fence = driver.index + 1
    answers = driver.apply(
        Claim(N1, run_of(1)),
        Settle(N1, (Settlement(fence, run_of(1), Result.RETRY),)),
        Claim(N1, run_of(1)),
    ).answers
    assert isinstance(answers[2], Answered)
    assert rows(answers[2].spans) == [(1, Outcome.EARLY, 0, 1)]
    assert driver.claim(N1, run_of(1)) > fence


def test_several_settlements_are_answered_in_order_in_one_list(driver: Driver) -> None:
    first = driver.claim(N1, run_of(1, 4))
    second = driver.claim(N1, Ids((), (KEY,)))
    command = Settle(
        N1,
        (
            Settlement(first, run_of(1, 2), Result.DONE),
            Settlement(second, Ids((), (KEY,)), Result.DEAD),
            Settlement(second, run_of(3, 2), Result.DONE),
        ),
    )
    assert driver.outcomes(command) == [(3, Outcome.SETTLED), (2, Outcome.FENCED)]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (Ids(((0, 1),)), "ids.runs: (0, 1) must lie within"),
        (Ids(((5, 0),)), "ids.runs: (5, 0) must lie within"),
        (Ids(((RANGE_ID_MAX, 2),)), "must lie within"),
        (Ids((), (b"short",)), "ids.keys: a key must have 16 bytes, not 5"),
        (Ids(((1, 1_048_577),)), "command_ids_max=1048576"),
    ],
)
def test_malformed_ids_are_rejected_with_field_and_rule(driver: Driver, ids: Ids, reason: str) -> None:
    answer = driver.do(Claim(N1, ids))
    assert isinstance(answer, Rejected)
    assert reason in answer.reason


def test_a_settle_with_one_bad_part_changes_nothing(driver: Driver) -> None:
    fence = driver.claim(N1, run_of(1))
    bad = Settlement(fence, run_of(1), Result.RETRY, -5)
    answer = driver.do(Settle(N1, (Settlement(fence, run_of(1), Result.DONE), bad)))
    assert isinstance(answer, Rejected)
    assert driver.ledger.counts().claimed == 1


def test_a_full_session_is_refused_and_settling_makes_room() -> None:
    driver = Driver(LedgerSettings(session_claims_max=10))
    driver.allocate()
    session = driver.join()
    fence = driver.claim(session, run_of(1, 10))
    answer = driver.do(Claim(session, run_of(11)))
    assert isinstance(answer, Rejected)
    assert "session_claims_max=10" in answer.reason
    driver.settle(session, fence, run_of(1), Result.DONE)
    driver.claim(session, run_of(11))


def test_full_entries_refuse_claims_and_cancels_but_never_a_settle() -> None:
    driver = Driver(LedgerSettings(entries_max=2))
    driver.allocate()
    session = driver.join()
    fence = driver.claim(session, Ids(((1, 1), (5, 3))))
    for command in (Claim(session, run_of(20)), Cancel(run_of(20))):
        answer = driver.do(command)
        assert isinstance(answer, Rejected)
        assert "entries_max=2" in answer.reason
    assert driver.settle(session, fence, run_of(6), Result.DONE) == [(1, Outcome.SETTLED)]


def test_ids_are_allocated_without_gaps_from_one() -> None:
    driver = Driver()
    assert driver.do(AllocateIds(65_536)) == Allocated(1, 65_536)
    assert driver.do(AllocateIds(1)) == Allocated(65_537, 1)
    assert driver.do(AllocateIds(0)) == Rejected("count=0 must be from 1 to 1048576")
    assert driver.do(AllocateIds(1_048_577)) == Rejected("count=1048577 must be from 1 to 1048576")
    assert driver.do(AllocateIds(1_048_576)) == Allocated(65_538, 1_048_576)


def test_an_entry_that_was_applied_before_is_corruption(driver: Driver) -> None:
    driver.index -= 1
    with pytest.raises(LedgerCorrupt, match="must be above"):
        driver.do(Advance("t", 1))


def test_what_was_settled_leaves_no_litter_in_the_index(driver: Driver) -> None:
    keys = tuple(number.to_bytes(16, "big") for number in range(4000))
    fence = driver.claim(N1, Ids((), keys))
    driver.settle(N1, fence, Ids((), keys[1:]), Result.DONE)
    held = driver.ledger._state.open[N1]
    assert held.parts(fence) == (Ids((), keys[:1]),)
    assert list(driver.ledger.open_claims(N1)) == [(Ids((), keys[:1]), fence, 1)]


def test_dead_cancelled_and_unclaimed_retries_are_forgotten_after_their_retention() -> None:
    driver = Driver(LedgerSettings(closed_retention_ms=120_000))
    driver.allocate()
    session = driver.join(timeout_ms=600_000)
    fence = driver.claim(session, run_of(1, 3))
    driver.settle(session, fence, run_of(1), Result.DEAD)
    driver.settle(session, fence, run_of(2), Result.RETRY, 60_000)
    driver.do(Cancel(run_of(9)))
    driver.pass_ms(120_000)
    assert driver.outcomes(Cancel(run_of(1))) == [(1, Outcome.DEAD)]
    driver.pass_ms(60_000)
    states = [driver.ledger.describe(each).state for each in (1, 2, 3, 9)]
    assert states == ["new", "waiting", "claimed", "new"]
    driver.pass_ms(60_000)
    assert driver.ledger.describe(2).state == "new"


def test_executed_keyed_ids_are_forgotten_after_their_retention() -> None:
    driver = Driver(LedgerSettings(keyed_retention_ms=60_000))
    session = driver.join(timeout_ms=600_000)
    driver.settle(session, driver.claim(session, Ids((), (KEY,))), Ids((), (KEY,)), Result.DONE)
    driver.pass_ms(60_000)
    assert driver.ledger.describe(KEY).state == "executed"
    driver.pass_ms(60_000)
    assert driver.ledger.describe(KEY).state == "new"


def test_classify_says_what_a_stranger_would_be_told_and_changes_nothing(driver: Driver) -> None:
    fence = driver.claim(N1, run_of(1, 3))
    driver.settle(N1, fence, run_of(1), Result.DONE)
    driver.settle(N1, fence, run_of(2), Result.RETRY, 500)
    before = driver.ledger.digest()
    assert driver.ledger.classify(Ids(((1, 4), (1001, 1)), (KEY,))) == (
        Span(1, Outcome.EXECUTED),
        Span(1, Outcome.EARLY, 0, 500),
        Span(1, Outcome.HELD, 0, N1),
        Span(1, Outcome.NEW),
        Span(1, Outcome.UNALLOCATED),
        Span(1, Outcome.NEW),
    )
    assert driver.ledger.digest() == before


def test_a_claim_and_its_session_may_be_in_one_entry() -> None:
    driver = Driver()
    answers = driver.apply(AllocateIds(5), Join("n1", 1, 4000), Claim(1, run_of(1, 5))).answers
    assert answers[2] == Answered((Span(5, Outcome.GRANTED, 1, 1),))
