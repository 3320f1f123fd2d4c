from __future__ import annotations

import pytest

from raft.commands import (
    Allocated,
    AllocateIds,
    Answered,
    Claim,
    Effects,
    Heartbeat,
    Outcome,
    Proposal,
    Rejected,
    Span,
)
from raft.ledger import Ledger, LedgerSettings
from tests.support.ledger_driver import Driver, run_of


def ask(driver: Driver, sequence: int, proposer: int = 9) -> Effects:
    return driver.apply(AllocateIds(10), proposer=proposer, sequence=sequence)


def test_a_repeated_token_gets_its_first_answers_and_changes_nothing() -> None:
    driver = Driver()
    first = ask(driver, 1)
    ask(driver, 2)
    again = ask(driver, 1)
    assert (again.answers, again.events, again.repeated) == (first.answers, (), True)
    assert driver.ledger.counts().allocated == 20


def test_the_same_sequence_of_another_proposer_is_another_token() -> None:
    driver = Driver()
    assert ask(driver, 1, proposer=1).answers == (Allocated(1, 10),)
    assert ask(driver, 1, proposer=2).answers == (Allocated(11, 10),)


def test_a_rejected_proposal_is_remembered_too() -> None:
    driver = Driver()
    bad = driver.apply(AllocateIds(0), proposer=9, sequence=1)
    assert driver.apply(AllocateIds(0), proposer=9, sequence=1).answers == bad.answers


def test_proposals_may_arrive_out_of_order_within_the_window() -> None:
    driver = Driver(LedgerSettings(tokens_per_proposer=4))
    starts = [ask(driver, sequence).answers for sequence in (2, 1, 4, 3)]
    assert len(set(starts)) == 4
    assert [ask(driver, sequence).answers for sequence in (2, 1, 4, 3)] == starts


def test_what_left_the_window_is_refused_and_never_applied_again() -> None:
    driver = Driver(LedgerSettings(tokens_per_proposer=4))
    for sequence in range(1, 7):
        ask(driver, sequence)
    allocated = driver.ledger.counts().allocated
    (answer,) = ask(driver, 2).answers
    assert answer == Rejected("sequence=2 must be above 2: older answers are forgotten")
    assert ask(driver, 3).repeated
    assert driver.ledger.counts().allocated == allocated


def test_a_jump_in_the_sequence_forgets_all_that_is_older() -> None:
    driver = Driver()
    ask(driver, 1)
    ask(driver, 2**64 - 1)
    assert isinstance(ask(driver, 1).answers[0], Rejected)


def test_a_token_that_is_used_for_another_proposal_is_refused() -> None:
    driver = Driver()
    ask(driver, 1)
    effects = driver.apply(Heartbeat(1), Heartbeat(2), proposer=9, sequence=1)
    reason = Rejected("sequence=1 was used for a proposal of 1 commands")
    assert effects.answers == (reason, reason)


def test_of_too_many_proposers_the_least_recently_used_is_forgotten() -> None:
    driver = Driver(LedgerSettings(proposers_max=2))
    ask(driver, 1, proposer=1)
    ask(driver, 1, proposer=2)
    ask(driver, 2, proposer=1)
    ask(driver, 1, proposer=3)
    assert ask(driver, 2, proposer=1).repeated
    assert not ask(driver, 1, proposer=2).repeated


def test_an_idle_proposer_is_forgotten_after_its_hour() -> None:
    driver = Driver(LedgerSettings(proposer_idle_ms=3000))
    ask(driver, 1)
    driver.pass_ms(2999)
    assert ask(driver, 1).repeated
    driver.pass_ms(1)
    assert not ask(driver, 1).repeated


def test_large_answers_leave_less_room_for_old_ones() -> None:
    driver = Driver(LedgerSettings(token_spans_max=20))
    driver.allocate(100)
    session = driver.join()
    for start in range(1, 40, 2):
        driver.claim(session, run_of(start))
    wide = driver.apply(Claim(session, run_of(1, 12)), proposer=9, sequence=1)
    assert driver.apply(Claim(session, run_of(1, 12)), proposer=9, sequence=1).answers == wide.answers
    driver.apply(Claim(session, run_of(13, 12)), proposer=9, sequence=2)
    assert isinstance(
        driver.apply(Claim(session, run_of(1, 12)), proposer=9, sequence=1).answers[0], Rejected
    )


@pytest.mark.parametrize(("proposer", "sequence"), [(-1, 1), (2**64, 1), (1, 0), (1, 2**64)])
def test_a_token_out_of_bounds_is_refused_for_every_command(proposer: int, sequence: int) -> None:
    effects = Ledger(1).apply_proposal(1, Proposal(proposer, sequence, (AllocateIds(1), AllocateIds(1))))
    assert [type(answer) for answer in effects.answers] == [Rejected, Rejected]


def test_too_many_commands_are_refused_together() -> None:
    driver = Driver(LedgerSettings(commands_max=2))
    answers = driver.apply(AllocateIds(1), AllocateIds(1), AllocateIds(1)).answers
    assert answers == (Rejected("commands: 3 are more than 2"),) * 3


def test_bytes_that_are_no_proposal_get_one_refusal_and_count_as_an_entry() -> None:
    ledger = Ledger(1)
    effects = ledger.apply(5, b"\xff whatever")
    assert effects == Effects(
        5, Proposal(0, 0, ()), (Rejected("proposal format 255 is unknown: this program reads 1"),), ()
    )
    assert ledger.applied_index == 5


def test_tokens_survive_a_snapshot() -> None:
    driver = Driver()
    driver.allocate()
    session = driver.join()
    first = driver.apply(Claim(session, run_of(1, 3)), proposer=9, sequence=1)
    restored = Ledger(3)
    restored.restore(driver.ledger.snapshot())
    effects = restored.apply_proposal(9, Proposal(9, 1, (Claim(session, run_of(1, 3)),)))
    assert (effects.answers, effects.repeated) == (first.answers, True)
    assert first.answers == (Answered((Span(3, Outcome.GRANTED, 3, 1),)),)
