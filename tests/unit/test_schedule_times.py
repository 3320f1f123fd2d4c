"""When schedules fire: cron lines, zones, daylight saving, intervals, and what cannot work."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncekeeper.durations import duration_ms, duration_text
from oncekeeper.errors import InvalidSchedule
from oncekeeper.schedules import Every, check, every, parse

BERLIN = "Europe/Berlin"
SPRING, AUTUMN = "2026-03-28T12:00+01:00", "2026-10-24T12:00+02:00"  # the days before
DAY_MS = 86_400_000


def ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def firings(when: str, after: str, count: int, zone: str = BERLIN) -> list[str]:
    """The next firings as the clock on the wall shows them, with its distance from UTC."""
    timing, at_ms, found = parse(when, zone), ms(after), []
    for _ in range(count):
        at_ms = timing.after(at_ms) or 0
        found.append(datetime.fromtimestamp(at_ms / 1000, ZoneInfo(zone)).strftime("%d %H:%M%z"))
    return found


def test_a_cron_line_fires_by_the_clock_of_its_zone() -> None:
    assert firings("0 9 * * mon-fri", "2026-11-20T12:00+01:00", 3) == [
        "23 09:00+0100",
        "24 09:00+0100",
        "25 09:00+0100",
    ]
    assert parse("0 9 * * *").after(ms("2026-11-20T09:00Z")) == ms("2026-11-21T09:00Z")


def test_a_set_time_that_spring_skips_comes_right_after_the_change_and_once() -> None:
    assert firings("30 2 * * *", SPRING, 3) == ["29 03:00+0200", "30 02:30+0200", "31 02:30+0200"]
    assert firings("0,30 2,3 * * *", SPRING, 3) == ["29 03:00+0200", "29 03:30+0200", "30 02:00+0200"]


def test_a_set_time_that_autumn_has_twice_comes_the_first_time_only() -> None:
    assert firings("30 2 * * *", AUTUMN, 3) == ["25 02:30+0200", "26 02:30+0100", "27 02:30+0100"]
    # Also where the search begins between the two: the first has gone by.
    assert firings("30 2 * * *", "2026-10-25T02:10+01:00", 1) == ["26 02:30+0100"]


def test_a_job_of_every_hour_or_minute_goes_by_real_time_on_both_days() -> None:
    assert firings("30 * * * *", "2026-03-29T00:40+01:00", 3) == [
        "29 01:30+0100",
        "29 03:30+0200",
        "29 04:30+0200",
    ]
    assert firings("30 * * * *", "2026-10-25T01:40+02:00", 3) == [
        "25 02:30+0200",
        "25 02:30+0100",
        "25 03:30+0100",
    ]
    assert len(parse("*/15 * * * *", BERLIN).overdue(ms(AUTUMN), ms(AUTUMN) + DAY_MS, 1000)[0]) == 96


@pytest.mark.parametrize(
    ("zone", "spring", "in_spring", "autumn", "in_autumn"),
    [
        (
            "America/New_York", "2026-03-07T12:00-05:00", ["08 03:00-0400", "09 02:30-0400"],
            "2026-10-31T12:00-04:00", ["01 02:30-0500", "02 02:30-0500"],
        ),
        (
            "Australia/Sydney", "2026-10-03T12:00+10:00", ["04 03:00+1100", "05 02:30+1100"],
            "2026-04-04T12:00+11:00", ["05 02:30+1100", "06 02:30+1000"],
        ),
        (  # by half an hour: 02:00 -> 02:30, and 02:00 -> 01:30
            "Australia/Lord_Howe", "2026-10-03T12:00+10:30", ["04 02:30+1100", "05 02:30+1100"],
            "2026-04-04T12:00+11:00", ["05 02:30+1030", "06 02:30+1030"],
        ),
    ],
)  # fmt: skip
def test_other_zones_change_on_days_and_by_steps_of_their_own(
    zone: str, spring: str, in_spring: list[str], autumn: str, in_autumn: list[str]
) -> None:
    assert firings("30 2 * * *", spring, 2, zone) == in_spring
    assert firings("30 2 * * *", autumn, 2, zone) == in_autumn
    # What goes by real time has neither a gap nor a double on either day.
    for day in (spring, autumn):
        quarters, _ = parse("*/15 * * * *", zone).overdue(ms(day), ms(day) + DAY_MS, 1000)
        assert {b - a for a, b in pairwise(quarters)} == {900_000}


def test_an_interval_is_counted_from_1970_whoever_counts() -> None:
    ten = every("10s")
    assert (ten.after(0), ten.after(9_999), ten.after(10_000)) == (10_000, 10_000, 20_000)
    assert ten.overdue(0, 40_000, 3) == ([20_000, 30_000, 40_000], True)
    assert ten.overdue(10_000, 19_999, 3) == ([], False)
    assert parse("every 10s") == ten == every(10) == every(timedelta(seconds=10))


@pytest.mark.parametrize(
    "when", ["every 7s", "*/7 3 * * *", "30 2 * * *", "0 0 29 2 *", "* 9 * * mon#1", "0 0 L * *"]
)
@settings(max_examples=40, deadline=None)
@given(
    begin=st.integers(ms("2025-12-01T00:00Z"), ms("2027-02-01T00:00Z")),
    span=st.one_of(st.integers(0, DAY_MS), st.integers(0, 400 * DAY_MS)),
    most=st.integers(1, 40),
)
def test_what_is_overdue_is_what_stepping_from_one_to_the_next_finds(
    when: str, begin: int, span: int, most: int
) -> None:
    timing = parse(when, "" if when.startswith("every") else BERLIN)
    if isinstance(timing, Every):
        span //= 400
    stepped, at_ms = [], timing.after(begin)
    while at_ms is not None and at_ms <= begin + span:
        assert not stepped or at_ms > stepped[-1]
        stepped.append(at_ms)
        at_ms = timing.after(at_ms)
    assert timing.overdue(begin, begin + span, most) == (stepped[-most:], len(stepped) > most)


@pytest.mark.parametrize(
    ("when", "zone", "field", "rule"),
    [
        ("0 0 30 2 *", "", "schedule", "never fires: none of its months has such a day"),
        ("0 0 31 4,6 *", "", "schedule", "never fires: none of its months has such a day"),
        ("* * */20 * 1L", "", "schedule", "never fires: no day of fifty years fits it"),
        ("61 * * * *", "", "schedule", "bad minute"),
        ("0 0 32 * *", "", "schedule", "bad day-of-month"),
        ("0 0 ² * *", "", "schedule", "bad day-of-month"),
        ("0 0 * *", "", "schedule", "must be a cron line of five fields"),
        ("0 0 0 * * *", "", "schedule", "must be a cron line of five fields"),
        ("", "", "schedule", "must be a cron line of five fields"),
        ("*" * 300, "", "schedule", "has 300 characters"),
        ("* * * * *", "Mars/Base", "tz", "'Mars/Base' is no known time zone"),
        ("* * * * *", "../secret", "tz", "is no known time zone"),
        ("* * * * *", "Europe", "tz", "is no known time zone"),
        ("* * * * *", "\0", "tz", "is no known time zone"),
        ("every 10s", "UTC", "tz", "knows no zone"),
        ("every 99ms", "", "schedule", "must be from 100ms to 366d"),
        ("every 367d", "", "schedule", "must be from 100ms to 366d"),
        ("every day", "", "schedule", "must be a duration such as"),
    ],
)
def test_what_cannot_work_is_refused_with_field_and_rule(when: str, zone: str, field: str, rule: str) -> None:
    with pytest.raises(InvalidSchedule) as raised:
        parse(when, zone)
    assert raised.value.field == field
    assert rule in raised.value.rule


def test_a_declared_schedule_is_checked_as_it_stands_in_the_code() -> None:
    assert check(every("90m")) == ("every 90m", "", "latest")
    assert check(" 0 9  * * * ", BERLIN, "all") == ("0 9 * * *", BERLIN, "all")
    for wrong in ((5, ""), ("0 9 * * *", 5), ("0 9 * * *", "", "some")):
        with pytest.raises(InvalidSchedule):
            check(*wrong)


@given(st.text("0123456789*/,-#LW MONJ²\t", max_size=24))
def test_any_text_is_a_schedule_or_refused(text: str) -> None:
    try:
        parse(text)
    except InvalidSchedule:
        return
    assert len(text.split()) == 5


@given(st.integers(1, 10**12))
def test_a_duration_comes_back_as_it_went(milliseconds: int) -> None:
    assert duration_ms(duration_text(milliseconds)) == milliseconds


@pytest.mark.parametrize(
    "given", ["", "10", "10 s", "s", "-1s", "1x", "1h 30m", None, True, float("nan"), float("inf")]
)
def test_what_is_no_duration_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="must be a duration"):
        duration_ms(given)  # type: ignore[arg-type]
