"""What a restarted node says about the claims of its former lives."""

from __future__ import annotations

from dedup.ids import Ids
from dedup.suspects import Suspect, SuspectRun
from node.testify import lives, testimonies
from node.workers.testimony import Evidence
from raft.commands import Fact, Testimony


def suspect(ids: Ids, fence: int, incarnation: int = 7) -> SuspectRun:
    return SuspectRun(ids, Suspect(fence, 1, "n1", incarnation, 1, "replaced", 0))


def test_what_a_complete_journal_does_not_name_was_never_started() -> None:
    evidence = Evidence(True, (Testimony(50, Ids(((10, 2),)), Fact.FINISHED),))
    assert testimonies([suspect(Ids(((10, 5),)), 50)], {7: evidence}) == [
        (
            Testimony(50, Ids(((10, 2),)), Fact.FINISHED),
            Testimony(50, Ids(((12, 3),)), Fact.NEVER_STARTED),
        )
    ]


def test_what_an_incomplete_journal_does_not_name_may_have_started() -> None:
    evidence = Evidence(False, (), "the machine was restarted")
    assert testimonies([suspect(Ids((), (b"k" * 16,)), 50)], {7: evidence}) == [
        (Testimony(50, Ids((), (b"k" * 16,)), Fact.STARTED),)
    ]


def test_marks_under_another_fence_say_nothing_of_this_claim() -> None:
    evidence = Evidence(True, (Testimony(49, Ids(((10, 1),)), Fact.FINISHED),))
    assert testimonies([suspect(Ids(((10, 1),)), 50)], {7: evidence}) == [
        (Testimony(50, Ids(((10, 1),)), Fact.NEVER_STARTED),)
    ]


def test_without_any_journal_everything_may_have_started() -> None:
    assert testimonies([suspect(Ids(((1, 3),)), 5)], {}) == [(Testimony(5, Ids(((1, 3),)), Fact.STARTED),)]


def test_a_claim_made_after_joining_anew_is_in_the_journals_of_the_process_that_joined() -> None:
    runs = [suspect(Ids(((1, 1),)), 5, incarnation=12), suspect(Ids(((2, 1),)), 6, incarnation=3)]
    assert lives(runs, [10, 15]) == {12: 10}
