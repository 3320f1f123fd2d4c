from __future__ import annotations

import pytest

from raft.commands import (
    Command,
    DeleteSchedule,
    Done,
    Fire,
    Launched,
    PauseSchedule,
    PutSchedule,
    Rejected,
    ScheduleChanged,
    Stale,
    Timetable,
)
from raft.ledger import LedgerSettings
from raft.ledger_state import Firing, Schedule
from tests.support.ledger_driver import Driver

DAILY = Timetable("0 9 * * *", "Europe/Berlin", "shop.report", "default", b"{}")
HOURLY = Timetable("0 * * * *", "Europe/Berlin", "shop.report", "default", b"{}")


def put(driver: Driver, timetable: Timetable = DAILY, now_ms: int = 1000) -> int:
    """Its revision."""
    assert driver.do(PutSchedule("daily", timetable, "hand", "ann", now_ms)) == Done()
    return driver.ledger.schedules["daily"].revision


def test_a_schedule_fires_once_for_a_time_and_lays_the_firing_down() -> None:
    driver = Driver()
    revision = put(driver)
    assert driver.events == (ScheduleChanged("daily"),)
    assert driver.do(Fire("daily", revision, 2000)) == Done()
    for at_ms in (2000, 1999, 1000, 1):
        assert driver.do(Fire("daily", revision, at_ms)) == Stale()
    assert driver.ledger.firings == {("daily", 2000): Firing("daily", 2000, revision, DAILY)}
    assert driver.ledger.schedules == {
        "daily": Schedule(DAILY, "hand", "ann", False, revision, 1000, 2000, 1)
    }


def test_a_firing_is_kept_as_it_was_until_it_is_in_the_log_whatever_becomes_of_its_schedule() -> None:
    driver = Driver()
    revision = put(driver)
    driver.do(Fire("daily", revision, 2000))
    put(driver, HOURLY)
    driver.do(DeleteSchedule("daily", "hand"))
    assert driver.ledger.firings[("daily", 2000)].timetable == DAILY
    assert driver.do(Launched("daily", 2000)) == Done()
    assert driver.do(Launched("daily", 2000)) == Done()
    assert driver.ledger.firings == {}


def test_what_was_read_of_an_earlier_revision_fires_nothing() -> None:
    driver = Driver()
    old = put(driver)
    new = put(driver, HOURLY, 3000)
    assert new > old
    assert driver.do(Fire("daily", old, 4000)) == Stale()
    assert driver.do(Fire("daily", new, 3000)) == Stale(), "it was due before anybody asked for it"
    assert driver.do(Fire("daily", new, 4000)) == Done()


def test_putting_the_same_again_changes_nothing() -> None:
    driver = Driver()
    put(driver)
    before = driver.ledger.schedules["daily"]
    put(driver, DAILY, 9000)
    assert driver.events == ()
    assert driver.ledger.schedules["daily"] == before


def test_another_body_is_no_reason_to_forget_what_was_due() -> None:
    driver = Driver()
    put(driver)
    put(driver, Timetable("0 9 * * *", "Europe/Berlin", "shop.report", "default", b'{"a":1}'), 9000)
    assert driver.ledger.schedules["daily"].since_ms == 1000


def test_a_paused_schedule_fires_nothing_and_what_was_due_meanwhile_is_not_wanted() -> None:
    driver = Driver()
    revision = put(driver)
    driver.do(PauseSchedule("daily", True, "bob", 5000))
    assert driver.events == (ScheduleChanged("daily"),)
    assert driver.do(Fire("daily", revision, 6000)) == Stale()
    driver.do(PauseSchedule("daily", True, "cid", 6000))
    assert driver.events == ()
    assert driver.ledger.schedules["daily"].by == "bob"
    driver.do(PauseSchedule("daily", False, "cid", 9000))
    assert driver.do(Fire("daily", revision, 6000)) == Stale()
    assert driver.do(Fire("daily", revision, 9001)) == Done()


def test_a_time_that_passes_without_a_task_is_counted_and_does_not_come_again() -> None:
    driver = Driver()
    revision = put(driver)
    assert driver.do(Fire("daily", revision, 5000, False, 4)) == Done()
    assert driver.ledger.firings == {}
    assert driver.do(Fire("daily", revision, 5000)) == Stale()
    schedule = driver.ledger.schedules["daily"]
    assert (schedule.fired, schedule.missed, schedule.fired_ms) == (0, 4, 5000)


def test_what_the_code_owns_is_not_changed_by_hand_nor_the_other_way() -> None:
    driver = Driver()
    put(driver)
    theirs = "name: schedule daily is there already, and is owned by people, by hand"
    assert driver.do(PutSchedule("daily", HOURLY, "code", "n1", 1)) == Rejected(theirs)
    assert driver.do(DeleteSchedule("daily", "code")) == Rejected(theirs)
    assert driver.do(PutSchedule("coded", HOURLY, "code", "n1", 1)) == Done()
    ours = "name: schedule coded is there already, and is owned by the application's code"
    assert driver.do(PutSchedule("coded", DAILY, "hand", "ann", 1)) == Rejected(ours)
    assert driver.do(DeleteSchedule("coded", "hand")) == Rejected(ours)
    assert driver.do(DeleteSchedule("coded", "code")) == Done()
    assert driver.do(DeleteSchedule("coded", "code")) == Done()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (Fire("daily", 1, 0), "at_ms=0 must be from 1 to 140737488355328"),
        (Fire("daily", 1, 1, True, -1), "missed=-1 must be from 0 to 1099511627776"),
        (PauseSchedule("none", True, "", 1), "name: there is no schedule none"),
        (PutSchedule("s", DAILY, "me", "", 1), "owner must be one of code, hand"),
        (PutSchedule("", DAILY, "hand", "", 1), "name must be 1 to 256 printable characters"),
        (
            PutSchedule("s", Timetable("x", "", "h", "q", bytes(70_000)), "hand", "", 1),
            "body has 70000 bytes: at most 65536 are allowed in a schedule",
        ),
        (
            PutSchedule("s", Timetable("x", "", "h", "q", b"{}", 0, "some"), "hand", "", 1),
            "catch_up must be one of none, latest, all",
        ),
        (
            PutSchedule("s", Timetable("x" * 300, "", "h", "q", b"{}"), "hand", "", 1),
            "when has 300 characters: at most 256 bytes are allowed",
        ),
    ],
)
def test_bad_input_is_rejected_with_field_and_rule(command: Command, reason: str) -> None:
    assert Driver().do(command) == Rejected(reason)


def test_full_rooms_refuse_what_is_new_and_take_what_is_known() -> None:
    driver = Driver(LedgerSettings(schedules_max=1, firings_max=1))
    revision = put(driver)
    assert isinstance(driver.do(PutSchedule("other", DAILY, "hand", "ann", 1)), Rejected)
    assert driver.do(Fire("daily", revision, 2000)) == Done()
    assert isinstance(driver.do(Fire("daily", revision, 3000)), Rejected)
    driver.do(Launched("daily", 2000))
    assert driver.do(Fire("daily", revision, 3000)) == Done()
