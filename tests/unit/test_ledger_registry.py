from __future__ import annotations

import pytest

from dedup.ids import Ids
from raft.commands import (
    Cancel,
    Claim,
    Command,
    Deleted,
    Done,
    Freed,
    Leave,
    Outcome,
    PutClass,
    PutQueue,
    QueueChanged,
    Rejected,
    Result,
    Revive,
)
from raft.ledger import LedgerSettings
from raft.ledger_state import HandlerClass, QueueSetting
from tests.support.ledger_driver import KEY, Driver, run_of


@pytest.fixture
def driver() -> Driver:
    """Of the ids 1 to 7: executed, dead, claimed, suspect, waiting, cancelled, new."""
    driver = Driver()
    driver.allocate(7)
    n1, n2 = driver.join("n1"), driver.join("n2")
    fence = driver.claim(n1, Ids(((1, 3), (5, 1))))
    driver.settle(n1, fence, run_of(1), Result.DONE)
    driver.settle(n1, fence, run_of(2), Result.DEAD)
    driver.settle(n1, fence, run_of(5), Result.RETRY, 1000)
    driver.claim(n2, run_of(4))
    driver.do(Leave(n2))
    driver.do(Cancel(run_of(6), "ann"))
    return driver


ALL = Ids(((1, 8),), (KEY,))


def test_cancel_deletes_what_has_not_started_and_says_what_stands_otherwise(driver: Driver) -> None:
    assert driver.outcomes(Cancel(ALL, "bob")) == [
        (1, Outcome.EXECUTED),
        (1, Outcome.DEAD),
        (2, Outcome.BUSY),
        (3, Outcome.SETTLED),
        (1, Outcome.UNALLOCATED),
        (1, Outcome.SETTLED),
    ]
    deleted = (Deleted(run_of(5), "bob"), Deleted(run_of(7), "bob"), Deleted(Ids((), (KEY,)), "bob"))
    assert driver.events == deleted
    assert driver.outcomes(Claim(2, Ids(((5, 3),), (KEY,)))) == [(4, Outcome.CANCELLED)]
    assert (driver.ledger.describe(6).by, driver.ledger.describe(7).by) == ("ann", "bob")


def test_revive_frees_what_is_dead_or_cancelled_from_attempt_one(driver: Driver) -> None:
    assert driver.outcomes(Revive(ALL)) == [
        (1, Outcome.EXECUTED),
        (1, Outcome.SETTLED),
        (2, Outcome.BUSY),
        (1, Outcome.NEW),
        (1, Outcome.SETTLED),
        (1, Outcome.NEW),
        (1, Outcome.UNALLOCATED),
        (1, Outcome.NEW),
    ]
    assert driver.events == (Freed(run_of(2)), Freed(run_of(6)))
    granted = driver.said(Claim(2, Ids(((2, 1), (6, 1)))))
    assert granted == [(2, Outcome.GRANTED, driver.index, 1)]


def test_reviving_again_finds_its_work_done(driver: Driver) -> None:
    driver.do(Revive(run_of(2)))
    assert driver.outcomes(Revive(run_of(2))) == [(1, Outcome.SETTLED)]
    assert driver.events == ()


def test_a_queue_pauses_and_resumes_and_tells_of_changes_only(driver: Driver) -> None:
    assert driver.do(PutQueue("mail", True, "ann")) == Done()
    assert driver.events == (QueueChanged("mail", True),)
    assert driver.ledger.paused("mail")
    driver.do(PutQueue("mail", True, "bob"))
    assert driver.events == ()
    assert driver.ledger.queues == {"mail": QueueSetting(True, "ann", 0)}
    driver.do(PutQueue("mail", False, "bob"))
    assert driver.events == (QueueChanged("mail", False),)
    assert not driver.ledger.paused("mail")
    assert not driver.ledger.paused("unheard of")


def test_a_learned_class_is_kept(driver: Driver) -> None:
    driver.do(PutClass("shop.charge", "io", "short"))
    assert driver.ledger.classes == {"shop.charge": HandlerClass("io", "short")}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (PutClass("h", "gpu", "short"), "kind must be one of cpu, io"),
        (PutClass("h", "io", "medium"), "length must be one of short, long"),
        (PutClass("", "io", "long"), "handler must be 1 to 256 printable characters"),
        (PutQueue("a\nb", True), "queue must be 1 to 256 printable characters"),
        (PutQueue("q", True, "x" * 5000), "by has 5000 characters: at most 4096 bytes are allowed"),
    ],
)
def test_bad_input_is_rejected_with_field_and_rule(driver: Driver, command: Command, reason: str) -> None:
    assert driver.do(command) == Rejected(reason)


def test_full_rooms_refuse_what_is_new_and_take_what_is_known() -> None:
    driver = Driver(LedgerSettings(queues_max=1, classes_max=1))
    for name, expected in (("a", True), ("b", False), ("a", True)):
        for command in (PutQueue(name, True), PutClass(name, "io", "long")):
            assert (driver.do(command) == Done()) is expected
