"""When a task is due, as people say it: after a delay, or at a time; within a year, in milliseconds.

A delay becomes a time at once, by the clock of the machine that submits. From then on only that time counts, and
the clocks that it is compared with are those of the nodes.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from oncekeeper.durations import duration_ms
from oncekeeper.envelope import THENS, parse_time
from oncekeeper.errors import InvalidTask

DUE_MS_MAX = 366 * 86_400_000
"""How far ahead a due time may lie when it is submitted."""
DUE_RULE = "must lie at most 366 days ahead"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Delay = str | float | timedelta


def delay_ms(delay: Delay) -> int:
    """A delay in milliseconds; InvalidTask says the rule."""
    try:
        ms = duration_ms(delay)
    except ValueError as error:
        raise InvalidTask("delay", str(error)) from None
    if not 0 <= ms <= DUE_MS_MAX:
        raise InvalidTask("delay", f"must be from 0 to 366 days, not {delay}")
    return ms


def due_ms(due: datetime | str, now_ms: int) -> int:
    """A due time in milliseconds of the epoch; InvalidTask for one without a zone, or more than a year ahead.

    One that is past is taken: the task runs at once.
    """
    if isinstance(due, str):
        at_ms = parse_time(due, "due")
    elif not isinstance(due, datetime):
        raise InvalidTask("due", f"must be a datetime with a time zone, not {due!r}")
    elif due.tzinfo is None or due.utcoffset() is None:
        raise InvalidTask(
            "due",
            f"{due.isoformat()} names no time zone, so that nobody knows which moment it is: give it a tzinfo, "
            "such as ZoneInfo('Europe/Berlin') or UTC",
        )
    else:
        at_ms = max(1, (due - _EPOCH) // timedelta(milliseconds=1))
    if at_ms > now_ms + DUE_MS_MAX:
        raise InvalidTask("due", f"{DUE_RULE}, not {due}")
    return at_ms


def check_chosen(delay: Delay | None, due: datetime | str | None, then: str | None) -> None:
    """InvalidTask for choices that contradict one another."""
    if delay is not None and due is not None:
        raise InvalidTask("delay", "goes with no due: a task has one time")
    if then is not None and then not in THENS:
        raise InvalidTask("then", f"must be one of {', '.join(THENS)}, not {str(then)[:40]!r}")
    if then is not None and delay is None and due is None:
        raise InvalidTask("then", "says what happens when a delayed task is due: give delay or due with it")


def time_chosen(delay: Delay | None, due: datetime | str | None, now_ms: int) -> int:
    """The due time in milliseconds of the epoch; 0: none was chosen."""
    if delay is not None:
        return now_ms + delay_ms(delay)
    return due_ms(due, now_ms) if due is not None else 0
