from __future__ import annotations

from dedup.ids import Ids
from raft.commands import (
    Advance,
    Advanced,
    Answered,
    Claim,
    Done,
    Gone,
    Heartbeat,
    Join,
    Joined,
    Leave,
    Outcome,
    Rejected,
    Renewed,
    Result,
    SessionClosed,
    SessionOpened,
    Span,
    Suspected,
)
from raft.ledger import LedgerSettings
from tests.support.ledger_driver import Driver, run_of


def test_two_joins_in_one_entry_get_different_sessions() -> None:
    driver = Driver()
    answers = driver.apply(Join("n1", 1, 4000), Join("n2", 1, 4000)).answers
    assert answers == (Joined(1, 0), Joined(2, 0))
    assert driver.join("n3") == 3
    assert driver.ledger.live_nodes() == ("n1", "n2", "n3")


def test_joining_again_with_the_same_incarnation_keeps_the_session() -> None:
    driver = Driver()
    session = driver.join("n1", 5)
    assert driver.join("n1", 5) == session
    assert driver.events == ()


def test_a_higher_incarnation_replaces_the_session_and_its_claims_become_suspects() -> None:
    driver = Driver()
    driver.allocate()
    old = driver.join("n1", 1)
    fence = driver.claim(old, run_of(1, 10))
    new = driver.join("n1", 2)
    assert driver.events == (
        SessionClosed(old, "n1", 1, "replaced"),
        Suspected(run_of(1, 10), fence, "n1", 1, "replaced"),
        SessionOpened(new, "n1", 2),
    )
    assert driver.do(Heartbeat(old)) == Gone(old)
    assert driver.do(Heartbeat(new)) == Renewed(0)


def test_a_lower_incarnation_is_refused_even_after_the_session_is_gone() -> None:
    driver = Driver()
    session = driver.join("n1", 7)
    driver.do(Leave(session))
    answer = driver.do(Join("n1", 6, 4000))
    assert answer == Rejected("incarnation=6 of n1 must be at least 7, which has joined")


def test_a_lapsed_incarnation_may_join_again_as_a_new_session() -> None:
    driver = Driver()
    old = driver.join("n1", 1, timeout_ms=2000)
    driver.pass_ms(2000)
    assert driver.join("n1", 1) > old


def test_a_session_lapses_exactly_at_its_timeout_and_a_heartbeat_moves_it() -> None:
    driver = Driver()
    session = driver.join("n1", timeout_ms=3000)
    driver.pass_ms(2999)
    assert driver.do(Heartbeat(session)) == Renewed(2999)
    driver.pass_ms(2999)
    assert session in driver.ledger.sessions
    driver.pass_ms(1)
    assert driver.events == (SessionClosed(session, "n1", 1, "lapsed"),)
    assert driver.do(Heartbeat(session)) == Gone(session)


def test_leaving_with_open_claims_leaves_suspects() -> None:
    driver = Driver()
    driver.allocate()
    session = driver.join()
    fence = driver.claim(session, run_of(1, 2))
    assert driver.do(Leave(session)) == Done()
    assert driver.events == (
        SessionClosed(session, "n1", 1, "left"),
        Suspected(run_of(1, 2), fence, "n1", 1, "left"),
    )
    assert driver.do(Leave(session)) == Gone(session)


def test_a_lapse_gathers_what_was_claimed_under_a_fence_into_one_event() -> None:
    driver = Driver()
    driver.allocate()
    session = driver.join(timeout_ms=1000)
    first = driver.claim(session, run_of(1, 10))
    second = driver.claim(session, run_of(11, 10))
    driver.settle(session, first, run_of(4, 2), Result.DONE)
    driver.pass_ms(1000)
    assert driver.events[1:] == (
        Suspected(Ids(((1, 3), (6, 5))), first, "n1", 1, "lapsed"),
        Suspected(run_of(11, 10), second, "n1", 1, "lapsed"),
    )


def test_one_step_of_time_counts_for_no_more_than_the_cap() -> None:
    driver = Driver(LedgerSettings(advance_ms_max=1000))
    session = driver.join(timeout_ms=4000)
    assert driver.do(Advance("t", 3_600_000)) == Advanced(1000)
    assert session in driver.ledger.sessions


def test_time_never_goes_back() -> None:
    driver = Driver()
    driver.pass_ms(500)
    assert driver.do(Advance("t", -1)) == Rejected(
        "elapsed_ms=-1 must not be negative: ledger time only grows"
    )
    assert driver.ledger.now_ms == 500


def test_a_new_timekeeper_adds_nothing_at_first_so_that_no_time_counts_twice() -> None:
    driver = Driver()
    assert driver.do(Advance("n1", 400)) == Advanced(400)
    assert driver.do(Advance("n2", 400)) == Advanced(400)
    assert driver.do(Advance("n2", 300)) == Advanced(700)
    assert driver.do(Advance("n1", 300)) == Advanced(700)


def test_timeouts_out_of_bounds_are_refused_with_the_rule() -> None:
    driver = Driver()
    assert driver.do(Join("n1", 1, 10)) == Rejected("timeout_ms=10 must be from 50 to 600000")
    assert driver.do(Join("", 1, 4000)) == Rejected("node must be 1 to 256 printable characters")


def test_a_full_room_of_sessions_refuses_more() -> None:
    driver = Driver(LedgerSettings(sessions_max=1))
    driver.join("n1")
    assert isinstance(driver.do(Join("n2", 1, 4000)), Rejected)
    assert driver.join("n1", 2)  # it replaces its own


def test_of_too_many_nodes_the_longest_gone_is_forgotten() -> None:
    driver = Driver(LedgerSettings(nodes_max=2))
    driver.do(Leave(driver.join("n1", 9)))
    driver.pass_ms(1)
    driver.do(Leave(driver.join("n2", 9)))
    driver.join("n3", 1)
    assert isinstance(driver.do(Join("n2", 1, 4000)), Rejected)
    assert isinstance(driver.do(Join("n1", 1, 4000)), Joined)


def test_a_claim_of_a_session_that_lapsed_in_the_same_entry_is_not_granted() -> None:
    driver = Driver()
    driver.allocate()
    session = driver.join(timeout_ms=1000)
    answers = driver.apply(Advance("t", 1000), Claim(session, run_of(1, 5))).answers
    assert answers == (Advanced(1000), Answered((Span(5, Outcome.LAPSED),)))
