from __future__ import annotations

import pytest

from dedup.ids import Ids
from dedup.suspects import TESTIMONIES_MAX, Suspect, SuspectRun
from raft import commands as words  # pytest would take Testify, imported by name, for a test
from raft.commands import (
    Claim,
    Fact,
    Freed,
    Heartbeat,
    Leave,
    Outcome,
    Resolved,
    Result,
    Rule,
    Suspected,
    Testified,
    Verdict,
)
from raft.ledger_reads import TaskState
from tests.support.ledger_driver import KEY, Driver, run_of

IDS = run_of(1, 10)
NODE, SESSION, FENCE = "n1", 2, 4


@pytest.fixture
def driver() -> Driver:
    """Ids 1 to 10 were claimed by n1 (incarnation 5, session 2, fence 4), which lapsed; n2 (session 3) lives."""
    driver = Driver()
    driver.allocate()
    assert driver.join(NODE, 5, timeout_ms=1000) == SESSION
    driver.join("n2", timeout_ms=60_000)
    assert driver.claim(SESSION, IDS) == FENCE
    driver.pass_ms(1000)
    assert driver.events[-1] == Suspected(IDS, FENCE, NODE, 5, "lapsed")
    return driver


def witness(
    driver: Driver, fact: Fact, ids: Ids = IDS, node: str = NODE, incarnation: int = 6, fence: int = FENCE
) -> list[tuple[int, Outcome]]:
    return driver.outcomes(words.Testify(node, incarnation, (words.Testimony(fence, ids, fact),)))


def test_a_suspect_is_granted_to_nobody_however_long_it_stands(driver: Driver) -> None:
    driver.do(Heartbeat(3))
    driver.pass_ms(50_000)
    assert driver.said(Claim(3, IDS)) == [(10, Outcome.SUSPECT, FENCE, 0)]


def test_never_started_frees_the_task_for_the_same_attempt(driver: Driver) -> None:
    assert witness(driver, Fact.NEVER_STARTED) == [(10, Outcome.SETTLED)]
    assert driver.events == (
        Testified(IDS, FENCE, NODE, Fact.NEVER_STARTED),
        Resolved(IDS, FENCE, Verdict.NOT_EXECUTED, "testimony", "n1: never started"),
        Freed(IDS),
    )
    assert driver.said(Claim(3, IDS)) == [(10, Outcome.GRANTED, driver.index, 1)]


def test_finished_executes(driver: Driver) -> None:
    assert witness(driver, Fact.FINISHED) == [(10, Outcome.SETTLED)]
    assert driver.events == (
        Testified(IDS, FENCE, NODE, Fact.FINISHED),
        Resolved(IDS, FENCE, Verdict.EXECUTED, "testimony", "n1: finished"),
    )
    assert driver.outcomes(Claim(3, IDS)) == [(10, Outcome.EXECUTED)]


def test_failed_allows_the_next_attempt_at_once(driver: Driver) -> None:
    witness(driver, Fact.FAILED)
    assert driver.said(Claim(3, IDS)) == [(10, Outcome.GRANTED, driver.index, 2)]


def test_started_is_written_down_and_the_suspect_stays(driver: Driver) -> None:
    assert witness(driver, Fact.STARTED, run_of(1)) == [(1, Outcome.SETTLED)]
    assert driver.ledger.describe(1) == TaskState(
        "suspect", FENCE, SESSION, NODE, 5, 1, since_ms=1000, why="lapsed", testified=(6,)
    )


def test_a_second_testimony_of_one_incarnation_cannot_overturn_the_first(driver: Driver) -> None:
    witness(driver, Fact.STARTED)
    assert witness(driver, Fact.NEVER_STARTED) == [(10, Outcome.FENCED)]
    assert witness(driver, Fact.STARTED) == [(10, Outcome.SETTLED)]
    assert driver.events == ()
    assert witness(driver, Fact.FINISHED, incarnation=7) == [(10, Outcome.SETTLED)]


@pytest.mark.parametrize(
    ("node", "incarnation", "fence"), [("n2", 6, FENCE), (NODE, 4, FENCE), (NODE, 6, FENCE + 1)]
)
def test_only_the_claims_own_node_testifies_of_its_fence(
    driver: Driver, node: str, incarnation: int, fence: int
) -> None:
    outcome = witness(driver, Fact.FINISHED, node=node, incarnation=incarnation, fence=fence)
    assert outcome == [(10, Outcome.FENCED)]
    assert driver.ledger.counts().suspect == 10


def test_testimony_about_anything_else_says_what_stands(driver: Driver) -> None:
    held = run_of(20)
    driver.claim(3, held)
    ids = Ids(((20, 1), (30, 1), (1001, 1)))
    assert witness(driver, Fact.FINISHED, ids) == [
        (1, Outcome.HELD),
        (1, Outcome.NEW),
        (1, Outcome.UNALLOCATED),
    ]


def test_a_node_that_restarts_for_ever_fills_no_room(driver: Driver) -> None:
    for incarnation in range(6, 6 + 2 * TESTIMONIES_MAX):
        assert witness(driver, Fact.STARTED, incarnation=incarnation) == [(10, Outcome.SETTLED)]
    assert len(driver.ledger.describe(1).testified) == TESTIMONIES_MAX


@pytest.mark.parametrize(
    ("result", "fact", "state", "attempt"),
    [
        (Result.DONE, Fact.FINISHED, "executed", 0),
        (Result.RETRY, Fact.FAILED, "waiting", 2),
        (Result.DEAD, Fact.FAILED, "dead", 1),
        (Result.RELEASED, Fact.NEVER_STARTED, "waiting", 1),
        (Result.DOUBT, Fact.STARTED, "suspect", 1),
    ],
)
def test_a_late_settle_is_the_lost_holders_testimony(
    driver: Driver, result: Result, fact: Fact, state: str, attempt: int
) -> None:
    assert driver.settle(SESSION, FENCE, IDS, result, 700) == [(10, Outcome.LAPSED)]
    assert driver.events[0] == Testified(IDS, FENCE, NODE, fact)
    told = driver.ledger.describe(1)
    assert (told.state, told.attempt) == (state, attempt)
    assert told.due_ms == {"RETRY": 1700, "RELEASED": 1000}.get(result.name, 0)


def test_a_late_verdict_cannot_settle_what_was_ruled_and_claimed_again(driver: Driver) -> None:
    driver.do(Rule(IDS, Verdict.NOT_EXECUTED, "check"))
    driver.claim(3, IDS)
    assert driver.settle(SESSION, FENCE, IDS, Result.DONE) == [(10, Outcome.FENCED)]


def test_a_late_settle_after_the_ruling_is_fenced(driver: Driver) -> None:
    driver.do(Rule(IDS, Verdict.NOT_EXECUTED, "check"))
    assert driver.settle(SESSION, FENCE, IDS, Result.RETRY) == [(10, Outcome.FENCED)]


def test_doubt_makes_a_suspect_that_its_holder_said_was_started(driver: Driver) -> None:
    fence = driver.claim(3, run_of(50))
    assert driver.settle(3, fence, run_of(50), Result.DOUBT) == [(1, Outcome.SETTLED)]
    assert driver.events == (
        Suspected(run_of(50), fence, "n2", 1, "doubt"),
        Testified(run_of(50), fence, "n2", Fact.STARTED),
    )
    assert driver.settle(3, fence, run_of(50), Result.DONE) == [(1, Outcome.FENCED)]


def test_a_ruling_executed_closes_the_suspect(driver: Driver) -> None:
    assert driver.outcomes(Rule(IDS, Verdict.EXECUTED, "human:ann", "seen in the bank")) == [
        (10, Outcome.SETTLED)
    ]
    assert driver.events == (Resolved(IDS, FENCE, Verdict.EXECUTED, "human:ann", "seen in the bank"),)
    assert driver.outcomes(Rule(IDS, Verdict.NOT_EXECUTED, "check")) == [(10, Outcome.EXECUTED)]


def test_a_ruling_not_executed_allows_one_more_attempt(driver: Driver) -> None:
    assert driver.outcomes(Rule(IDS, Verdict.NOT_EXECUTED, "check", "", FENCE)) == [(10, Outcome.SETTLED)]
    assert driver.events == (Resolved(IDS, FENCE, Verdict.NOT_EXECUTED, "check", ""), Freed(IDS))
    assert driver.outcomes(Rule(IDS, Verdict.NOT_EXECUTED, "check")) == [(10, Outcome.NEW)]
    assert driver.said(Claim(3, IDS)) == [(10, Outcome.GRANTED, driver.index, 2)]


def test_a_ruling_for_another_fence_changes_nothing(driver: Driver) -> None:
    assert driver.outcomes(Rule(IDS, Verdict.EXECUTED, "check", "", FENCE + 1)) == [(10, Outcome.FENCED)]
    assert driver.ledger.counts().suspect == 10


def test_a_held_suspect_stays_until_a_human_or_its_node_resolves_it(driver: Driver) -> None:
    hold = Rule(IDS, Verdict.HELD, "policy:hold", "ask the bank")
    assert driver.outcomes(hold) == [(10, Outcome.SETTLED)]
    assert driver.events == (Resolved(IDS, FENCE, Verdict.HELD, "policy:hold", "ask the bank"),)
    counts = driver.ledger.counts()
    assert (counts.suspect, counts.held) == (10, 10)
    assert driver.ledger.describe(3).held_reason == "ask the bank"
    assert driver.outcomes(hold) == [(10, Outcome.SETTLED)]
    assert driver.events == ()
    driver.do(Rule(run_of(1, 4), Verdict.EXECUTED, "human:ann"))
    witness(driver, Fact.FINISHED, run_of(5, 6))
    counts = driver.ledger.counts()
    assert (counts.suspect, counts.held, counts.executed) == (0, 0, 10)


def test_suspects_page_in_canonical_order(driver: Driver) -> None:
    driver.claim(3, Ids(((40, 2),), (b"z" * 16, KEY)))
    driver.do(Leave(3))
    first = Suspect(FENCE, SESSION, NODE, 5, 1, "lapsed", 1000)
    second = Suspect(6, 3, "n2", 1, 1, "left", 1000)
    assert driver.ledger.suspects(None, 4) == (SuspectRun(run_of(1, 4), first),)
    assert driver.ledger.suspects(4, 7) == (
        SuspectRun(run_of(5, 6), first),
        SuspectRun(run_of(40, 1), second),
    )
    assert driver.ledger.suspects(40, 7) == (
        SuspectRun(run_of(41, 1), second),
        SuspectRun(Ids((), (KEY,)), second),
        SuspectRun(Ids((), (b"z" * 16,)), second),
    )
    assert driver.ledger.suspects(b"z" * 16, 7) == ()
    assert driver.ledger.suspects_of("n1") == (SuspectRun(IDS, first),)
    assert driver.ledger.suspects_of("n9") == ()
    driver.do(Rule(IDS, Verdict.EXECUTED, "check"))
    assert driver.ledger.suspects(None, 1) == (SuspectRun(run_of(40, 1), second),)
