"""When schedules fire: cron lines in a time zone, and intervals (no clock is read here).

A cron line has five fields (minute, hour, day of month, month, day of week) and means what Debian's cron makes of
it; the library cronsim, which Healthchecks is built on, does the same, daylight saving included. In the hour that
clocks skip, a job of a set time runs right after the change; in the hour that comes twice, once, the first time.
A job with a star for its minute or hour goes by real time: it runs in both, and nowhere in what is skipped.

An interval is counted from the beginning of 1970 in UTC: ``every("10s")`` fires at :00, :10, :20, … on whatever
node leads, and a schedule that is put again does not begin anew.

All times are milliseconds of the epoch.
"""

from __future__ import annotations

import zoneinfo
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

from cronsim import CronSim, CronSimError

from oncekeeper.durations import duration_ms, duration_text
from oncekeeper.errors import InvalidSchedule

CATCH_UPS: Final = ("none", "latest", "all")
EVERY_MS_MIN: Final = 100
EVERY_MS_MAX: Final = 366 * 86_400_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TIME_MS_MAX: Final = 250_000_000_000_000  # the year 9892: what is after it has no datetime
_ZONE_CHARS_MAX: Final = 64
_EVERY: Final = "every "
_WHEN_CHARS_MAX: Final = 200
_DAYS: Final = frozenset(str(day) for day in range(1, 32))


@dataclass(frozen=True, slots=True)
class Every:
    """An interval; make one with ``every``."""

    ms: int

    def __str__(self) -> str:
        return f"{_EVERY}{duration_text(self.ms)}"

    def after(self, time_ms: int) -> int | None:
        """The first firing after a time."""
        return (time_ms // self.ms + 1) * self.ms

    def overdue(self, after_ms: int, now_ms: int, most: int) -> tuple[list[int], bool]:
        """The firings after one time and up to another, the latest ``most`` of them; whether there are more."""
        first, last = after_ms // self.ms + 1, now_ms // self.ms
        begin = max(first, last - most + 1)
        return [number * self.ms for number in range(begin, last + 1)], begin > first


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron line in a time zone; make one with ``parse``."""

    line: str
    zone: zoneinfo.ZoneInfo

    def __str__(self) -> str:
        return self.line

    def after(self, time_ms: int) -> int | None:
        """The first firing after a time; None if there is none within fifty years."""
        if time_ms > _TIME_MS_MAX:
            return None
        for found in CronSim(self.line, (_EPOCH + timedelta(milliseconds=time_ms)).astimezone(self.zone)):
            # The search goes by the clock on the wall, which comes by some times twice: what it finds first may
            # be the first pass of an hour that is in its second.
            if (found_ms := (found - _EPOCH) // timedelta(milliseconds=1)) > time_ms:
                return found_ms
        return None

    def overdue(self, after_ms: int, now_ms: int, most: int) -> tuple[list[int], bool]:
        """The firings after one time and up to another, the latest ``most`` of them; whether there are more."""
        # Backwards the search would have to undo what daylight saving did; so look forward, from ever earlier.
        span_ms = 60_000
        while True:
            begin_ms = max(after_ms, now_ms - span_ms)
            found: deque[int] = deque(maxlen=most)
            count, at_ms = 0, self.after(begin_ms)
            while at_ms is not None and at_ms <= now_ms:
                found.append(at_ms)
                count += 1
                at_ms = self.after(at_ms)
            if count >= most or begin_ms == after_ms:
                more = count > most or (begin_ms > after_ms and (self.after(after_ms) or now_ms) < found[0])
                return list(found), more
            span_ms *= 4


Timing = Every | Cron


def every(interval: str | float | timedelta) -> Every:
    """A schedule that fires every so often: ``every("10s")``, ``every("1h30m")``, ``every(0.5)`` (seconds).

    From 100 ms to 366 days; counted from 1970 in UTC, not from now. InvalidSchedule for anything else.
    """
    try:
        ms = duration_ms(interval)
    except ValueError as error:
        raise InvalidSchedule("schedule", str(error)) from None
    if not EVERY_MS_MIN <= ms <= EVERY_MS_MAX:
        raise InvalidSchedule("schedule", f"every {interval} must be from 100ms to 366d")
    return Every(ms)


@lru_cache(maxsize=4096)
def parse(when: str, zone: str = "") -> Timing:
    """What the text of a schedule means: ``every 10s``, or a cron line in ``zone`` (UTC if there is none).

    InvalidSchedule names what is wrong: the line, a line that never fires, the zone.
    """
    if len(when) > _WHEN_CHARS_MAX:
        raise InvalidSchedule("schedule", f"has {len(when)} characters, the most is {_WHEN_CHARS_MAX}")
    if when.startswith(_EVERY):
        if zone:
            raise InvalidSchedule("tz", f"{when!r} goes by real time and knows no zone: leave tz out")
        return every(when.removeprefix(_EVERY))
    if len(when.split()) != 5:
        raise InvalidSchedule(
            "schedule",
            f"{when[:80]!r} must be a cron line of five fields (minute, hour, day of month, month, day of week), "
            "or an interval such as every 10s",
        )
    cron = Cron(" ".join(when.split()), _zone(zone))
    try:
        first = cron.after(0)
    except CronSimError as error:
        raise InvalidSchedule("schedule", f"{when!r}: {_said(when, error)}") from None
    if first is None:
        raise InvalidSchedule("schedule", f"{when!r}: never fires: no day of fifty years fits it")
    return cron


def check(when: object, zone: object = "", catch_up: object = "latest") -> tuple[str, str, str]:
    """The texts of a declared schedule; InvalidSchedule if they cannot work."""
    if not isinstance(when, (str, Every)):
        raise InvalidSchedule("schedule", f'must be a cron line or every("10s"), not {when!r}')
    if not isinstance(zone, str):
        raise InvalidSchedule("tz", f"must be the name of a time zone such as Europe/Berlin, not {zone!r}")
    if catch_up not in CATCH_UPS:
        raise InvalidSchedule("catch_up", f"must be one of {', '.join(CATCH_UPS)}, not {catch_up!r}")
    return str(parse(str(when), zone)), zone, str(catch_up)


def _zone(name: str) -> zoneinfo.ZoneInfo:
    if len(name) <= _ZONE_CHARS_MAX:
        try:
            return zoneinfo.ZoneInfo(name or "UTC")
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            pass  # not there; no name of a zone; a folder of zones
    raise InvalidSchedule(
        "tz", f"{name[:80]!r} is no known time zone; names are such as Europe/Berlin or UTC"
    )


def _said(when: str, error: CronSimError) -> str:
    fields = when.split()
    if str(error) == "Bad day-of-month" and fields[2] in _DAYS:
        return "never fires: none of its months has such a day"
    return str(error)[:1].lower() + str(error)[1:]
