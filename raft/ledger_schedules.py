"""Schedules: what the ledger knows of them, and the firings that it has decided.

A firing is (schedule, time). ``Fire`` decides one, once: it moves the schedule's last time forward, which never
goes back, and in the same step lays the firing down with the whole task that it is. Any leader may then bring that
task into the log, under an id that follows from (schedule, time) alone, and say ``Launched``. So each step may be
done again by another one, and the firing happens once: a leader that dies before ``Fire`` was decided has done
nothing, one that dies after it leaves a firing that its successor finds here, and a task that is appended twice is
claimed once. A leader that was deposed and does not know it can decide nothing, for it has no majority.

When a firing is due is not decided here: the ledger knows no wall clock and reads no timetable.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from raft.commands import (
    DeleteSchedule,
    Done,
    Fire,
    Launched,
    PauseSchedule,
    PutSchedule,
    ScheduleChanged,
    Stale,
    Timetable,
)
from raft.ledger_state import Firing, LedgerState, Schedule, check_name, check_number, check_text, reject

CATCH_UPS: Final = ("none", "latest", "all")
OWNERS: Final = ("code", "hand")
WHEN_BYTES_MAX: Final = 256
TIME_MS_MAX: Final = 2**47  # the year 6429: every text of a time can be read
_MISSED_MAX: Final = 2**40
_TTR_MS_MAX: Final = 2**40


def put_schedule(state: LedgerState, command: PutSchedule) -> Done:
    _check_timetable(state, command)
    name, timetable, now_ms = command.name, command.timetable, command.now_ms
    known = state.schedules.get(name)
    if known is None:
        if len(state.schedules) >= state.settings.schedules_max:
            reject(f"name: {len(state.schedules)} schedules are known, as many as schedules_max allows")
        state.schedules[name] = Schedule(timetable, command.owner, command.by, False, state.index, now_ms)
        state.events.append(ScheduleChanged(name))
        return Done()
    _check_owner(name, known, command.owner)
    if known.timetable == timetable:
        return Done()
    since_ms = known.since_ms
    if (known.timetable.when, known.timetable.zone) != (timetable.when, timetable.zone):
        # What was due by the new times before anybody asked for them was never wanted.
        since_ms = max(since_ms, now_ms)
    # A changed schedule keeps its last time: it must not fire once more for what is past.
    state.schedules[name] = replace(
        known, timetable=timetable, by=command.by, revision=state.index, since_ms=since_ms
    )
    state.events.append(ScheduleChanged(name))
    return Done()


def delete_schedule(state: LedgerState, command: DeleteSchedule) -> Done:
    check_name("name", command.name)
    check_text("by", command.by)
    _check_owner_word(command.owner)
    known = state.schedules.get(command.name)
    if known is not None:
        _check_owner(command.name, known, command.owner)
        del state.schedules[command.name]
        state.events.append(ScheduleChanged(command.name))
    return Done()


def pause_schedule(state: LedgerState, command: PauseSchedule) -> Done:
    check_name("name", command.name)
    check_text("by", command.by)
    check_number("now_ms", command.now_ms, 1, TIME_MS_MAX)
    known = _known(state, command.name)
    if known.paused != command.paused:
        since_ms = known.since_ms if command.paused else max(known.since_ms, command.now_ms)
        state.schedules[command.name] = replace(
            known, paused=command.paused, by=command.by, since_ms=since_ms
        )
        state.events.append(ScheduleChanged(command.name))
    return Done()


def fire(state: LedgerState, command: Fire) -> Done | Stale:
    check_name("name", command.name)
    check_number("at_ms", command.at_ms, 1, TIME_MS_MAX)
    check_number("missed", command.missed, 0, _MISSED_MAX)
    name, at_ms = command.name, command.at_ms
    known = state.schedules.get(name)
    if known is None or known.paused or known.revision != command.revision:
        return Stale()
    if at_ms <= max(known.fired_ms, known.since_ms):
        return Stale()
    if command.runs:
        if len(state.firings) >= state.settings.firings_max:
            reject(
                f"name: {len(state.firings)} firings are on their way to the log, as many as firings_max allows"
            )
        state.firings[name, at_ms] = Firing(name, at_ms, known.revision, known.timetable)
    state.schedules[name] = replace(
        known, fired_ms=at_ms, fired=known.fired + command.runs, missed=known.missed + command.missed
    )
    state.events.append(ScheduleChanged(name))
    return Done()


def launched(state: LedgerState, command: Launched) -> Done:
    check_name("name", command.name)
    state.firings.pop((command.name, command.at_ms), None)
    return Done()


def _known(state: LedgerState, name: str) -> Schedule:
    known = state.schedules.get(name)
    if known is None:
        reject(f"name: there is no schedule {name}")
    return known


def _check_owner(name: str, known: Schedule, owner: str) -> None:
    if known.owner != owner:
        whose = "the application's code" if known.owner == "code" else "people, by hand"
        reject(f"name: schedule {name} is there already, and is owned by {whose}")


def _check_owner_word(owner: str) -> None:
    if owner not in OWNERS:
        reject(f"owner must be one of {', '.join(OWNERS)}")


def _check_timetable(state: LedgerState, command: PutSchedule) -> None:
    timetable: Timetable = command.timetable
    check_name("name", command.name)
    check_text("by", command.by)
    _check_owner_word(command.owner)
    check_number("now_ms", command.now_ms, 1, TIME_MS_MAX)
    check_text("when", timetable.when, WHEN_BYTES_MAX)
    check_text("zone", timetable.zone, WHEN_BYTES_MAX)
    check_name("handler", timetable.handler)
    check_name("queue", timetable.queue)
    check_number("ttr_ms", timetable.ttr_ms, 0, _TTR_MS_MAX)
    if timetable.catch_up not in CATCH_UPS:
        reject(f"catch_up must be one of {', '.join(CATCH_UPS)}")
    if len(timetable.body) > state.settings.schedule_bytes_max:
        limit = state.settings.schedule_bytes_max
        reject(f"body has {len(timetable.body)} bytes: at most {limit} are allowed in a schedule")
