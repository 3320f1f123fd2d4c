"""Hold: for a while nobody is granted what has not started, and that is taken back."""

from __future__ import annotations

from raft.commands import AllocateIds, Cancel, Claim, Hold, Outcome, Result, Settle, Settlement
from tests.support.ledger_driver import Driver, run_of


def test_what_is_held_is_early_and_free_again_after_the_time():
    driver = Driver()
    driver.do(AllocateIds(10))
    session = driver.join("n1")
    assert driver.outcomes(Hold(run_of(1, 3), 1000)) == [(3, Outcome.SETTLED)]
    assert driver.outcomes(Claim(session, run_of(1, 4))) == [(3, Outcome.EARLY), (1, Outcome.GRANTED)]
    driver.pass_ms(1000)
    assert driver.outcomes(Claim(session, run_of(1, 3))) == [(3, Outcome.GRANTED)]


def test_a_hold_is_taken_back_at_once():
    driver = Driver()
    driver.do(AllocateIds(10))
    session = driver.join("n1")
    driver.do(Hold(run_of(1, 2), 20_000))
    assert driver.outcomes(Hold(run_of(1, 2), 0)) == [(2, Outcome.SETTLED)]
    assert driver.outcomes(Claim(session, run_of(1, 2))) == [(2, Outcome.GRANTED)]


def test_what_has_started_or_ended_is_not_held_and_the_answer_says_so():
    driver = Driver()
    driver.do(AllocateIds(4))
    session = driver.join("n1")
    fence = driver.claim(session, run_of(1, 2))
    driver.do(Settle(session, (Settlement(fence, run_of(1), Result.DONE),)))
    driver.do(Cancel(run_of(3)))
    assert driver.outcomes(Hold(run_of(1, 5), 100)) == [
        (1, Outcome.EXECUTED),
        (1, Outcome.BUSY),
        (1, Outcome.CANCELLED),
        (1, Outcome.SETTLED),
        (1, Outcome.UNALLOCATED),
    ]
    assert driver.outcomes(Claim(session, run_of(4))) == [(1, Outcome.EARLY)]
