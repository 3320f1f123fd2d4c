"""The leader's schedules: deciding what is due, and bringing decided firings into the task log.

    ledger.schedules --due by the wall clock--> Fire --> ledger.firings --append--> task log --> Launched

Each arrow may be gone by twice, by this node or by its successor, and a node may die on any of them: the ledger
decides a firing once (raft/ledger_schedules.py), and the task's id follows from (schedule, time), so that of two
copies one claim wins. What has been decided runs; what has not, is decided by whoever leads next.

The clock is the leader's wall clock. It is asked whether a time has come, never how much has passed: a firing is
never early by it. Set back, it waits until it comes by the schedule's last time again, and nothing fires twice; set
forward, what it jumped over is missed.

A firing is *missed* when it was due for more than ``late_ms`` and nobody led. All that is overdue then goes the
way of ``catch_up``: none of it runs, or the latest, or all (the latest ``BACKLOG_MAX``). A shorter gap, such as the
death of a leader, loses nothing: what came due in it fires late.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dedup.ids import Ids, keyed_id
from node.workers.port import HandlerInfo
from oncekeeper.envelope import TaskBatch, time_text
from oncekeeper.errors import InvalidSchedule
from oncekeeper.schedules import Timing, parse
from raft.commands import (
    Answer,
    Command,
    DeleteSchedule,
    Done,
    Fire,
    Launched,
    PutSchedule,
    Rejected,
    Timetable,
)
from raft.ledger import Ledger
from raft.ledger_state import Firing, Schedule

_log = logging.getLogger("oncekeeper.schedules")

BACKLOG_MAX: Final = 1000  # of one schedule: missed firings that catch_up="all" runs
DECIDED_MAX: Final = 256  # firings of one proposal
AGAIN_MS: Final = 50
LOOK_MS: Final = 1_000  # how often the wall clock is looked at: it may jump
SLICE: Final = 64  # schedules computed before the loop, which Raft shares, gets its turn
DECLARED: Final = "code"
_NAMESPACE: Final = "@schedule"  # no queue can be called so: a user's key never is a firing


def firing_id(name: str, at_ms: int) -> bytes:
    """The id of the task that a firing is: nothing but (schedule, time) is in it."""
    return keyed_id(_NAMESPACE, f"{at_ms} {name}")


def firing_task(firing: Firing, now_ms: int) -> TaskBatch:
    timetable = firing.timetable
    return TaskBatch(
        queue=timetable.queue,
        handler=timetable.handler,
        ids=Ids((), (firing_id(firing.name, firing.at_ms),)),
        bodies=(timetable.body,),
        ttr_ms=timetable.ttr_ms,
        submitted_ms=now_ms,
        submitted_by=f"schedule {firing.name} for {time_text(firing.at_ms)}",
    )


@dataclass(frozen=True, slots=True)
class Due:
    """What a schedule owes by now: firings, ascending; or a time that passes; and how many that leaves out."""

    times: tuple[int, ...] = ()
    passed_ms: int = 0
    missed: int = 0

    def commands(self, name: str, revision: int) -> list[Command]:
        if self.passed_ms:
            return [Fire(name, revision, self.passed_ms, False, self.missed)]
        return [
            Fire(name, revision, at_ms, True, 0 if number else self.missed)
            for number, at_ms in enumerate(self.times)
        ]


def due(schedule: Schedule, timing: Timing, now_ms: int, late_ms: int) -> Due:
    """What fires at ``now_ms``, by the rule of catch_up (see above)."""
    overdue, more = timing.overdue(max(schedule.since_ms, schedule.fired_ms), now_ms, BACKLOG_MAX)
    if not overdue:
        return Due()
    if not more and now_ms - overdue[0] <= late_ms:
        return Due(tuple(overdue))
    match schedule.timetable.catch_up:
        case "all":
            return Due(tuple(overdue), missed=int(more))
        case "latest":
            return Due((overdue[-1],), missed=len(overdue) - 1 + more)
        case _:
            return Due(passed_ms=overdue[-1], missed=len(overdue) + more)


def next_firing_ms(schedule: Schedule, timing: Timing) -> int | None:
    """The next time that it fires, perhaps past; None if it is paused, or never will."""
    if schedule.paused:
        return None
    return timing.after(max(schedule.since_ms, schedule.fired_ms))


def declared(handlers: Mapping[str, HandlerInfo]) -> dict[str, Timetable]:
    """The schedules that stand in the application's code, each under its handler's name."""
    return {
        name: Timetable(info.schedule, info.tz, name, info.queue, b"{}", 0, info.catch_up)
        for name, info in handlers.items()
        if info.schedule
    }


def declarations(
    ledger: Ledger, handlers: Mapping[str, HandlerInfo], by: str, now_ms: int
) -> list[PutSchedule | DeleteSchedule]:
    """What makes the ledger's schedules those of this code, as far as the code owns them."""
    wanted = declared(handlers)
    changes: list[PutSchedule | DeleteSchedule] = []
    for name, timetable in wanted.items():
        known = ledger.schedules.get(name)
        if known is None or known.timetable != timetable or known.owner != DECLARED:
            changes.append(PutSchedule(name, timetable, DECLARED, by, now_ms))
    for name, known in ledger.schedules.items():
        if known.owner == DECLARED and name not in wanted:
            changes.append(DeleteSchedule(name, DECLARED, by))
    return changes


class ScheduleDriver:
    """One a node; it works while the node leads and there are schedules. All on the node's loop."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        node: str,
        late_ms: int,
        wall_ms: Callable[[], int],
        is_leader: Callable[[], bool],
        barrier: Callable[[], Awaitable[bool]],
        propose: Callable[[tuple[Command, ...]], Awaitable[tuple[Answer, ...]]],
        append: Callable[[Sequence[TaskBatch]], Awaitable[object]],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        notes: dict[str, str],
        reached: Callable[[str], None] = lambda step: None,
    ) -> None:
        """``barrier``: whether the ledger here is surely not behind. ``propose``: until it is known, however long.
        ``append``: durably, and the owners are woken; repeated until it succeeds. ``spawn``: as a task of the
        node, which stops it. ``reached``: told of each step, for tests that kill the node there."""
        self._ledger = ledger
        self._node = node
        self._late_ms = late_ms
        self._wall_ms = wall_ms
        self._is_leader = is_leader
        self._barrier = barrier
        self._propose = propose
        self._append = append
        self._spawn = spawn
        self._notes = notes
        self._reached = reached
        self._running = False
        self._woken = asyncio.Event()
        # By name: the schedule as it was looked at, and when it fires next.
        self._next: dict[str, tuple[Schedule, int | None]] = {}

    # --- life ------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """This node leads now, or schedules have changed."""
        self._woken.set()
        if not self._running and self._is_leader() and self._has_work:
            self._running = True
            self._spawn(self._lead())

    def declare(self, handlers: Mapping[str, HandlerInfo]) -> None:
        """Put the application's schedules into the ledger. At each start: the code that started last is right."""
        changes = declarations(self._ledger, handlers, f"node {self._node}", self._wall_ms())
        if changes:
            self._spawn(self._put(changes))

    async def _put(self, changes: Sequence[PutSchedule | DeleteSchedule]) -> None:
        for at in range(0, len(changes), DECIDED_MAX):
            some = changes[at : at + DECIDED_MAX]
            for change, answer in zip(some, await self._propose(tuple(some)), strict=True):
                if isinstance(answer, Rejected):
                    self._note(change.name, f"schedule {change.name} of the application: {answer.reason}")

    @property
    def _has_work(self) -> bool:
        return bool(self._ledger.schedules or self._ledger.firings)

    async def _lead(self) -> None:
        try:
            # A ledger that is behind would show firings that were launched long ago. They would be launched once
            # more, and their ids might be forgotten by then.
            while not await self._barrier():
                if not self._is_leader():
                    return
                await asyncio.sleep(AGAIN_MS / 1000)
            while self._is_leader() and self._has_work:
                self._woken.clear()
                wait_ms = await self.turn()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_ms / 1000):
                        await self._woken.wait()
        finally:
            self._running = False
            self._next.clear()

    # --- work ------------------------------------------------------------------------------------------------

    async def turn(self) -> int:
        """Fire all that is due. How many milliseconds there are until something may be, LOOK_MS at most."""
        await self._launch()
        while commands := await self._due():
            self._reached("before_fire")
            answers = await self._propose(tuple(commands))
            self._reached("after_fire")
            await self._launch()
            if not any(isinstance(answer, Done) for answer in answers):
                return AGAIN_MS  # another node was quicker, or the room for firings is full
            if not self._is_leader():
                return LOOK_MS
        at_ms = self.next_ms
        return LOOK_MS if at_ms is None else max(1, min(LOOK_MS, at_ms - self._wall_ms()))

    @property
    def next_ms(self) -> int | None:
        """When something fires next, as of the last turn; None: nothing does."""
        return min((at_ms for _, at_ms in self._next.values() if at_ms is not None), default=None)

    async def _launch(self) -> None:
        """Bring every firing that was decided into the log, and only then let the ledger forget it."""
        while firings := [firing for _, firing in sorted(self._ledger.firings.items())[:DECIDED_MAX]]:
            now_ms = self._wall_ms()
            await self._append([firing_task(firing, now_ms) for firing in firings])
            self._reached("after_fire_append")
            await self._propose(tuple(Launched(firing.name, firing.at_ms) for firing in firings))
            self._reached("after_launch")

    async def _due(self) -> list[Command]:
        """What is due now, as commands; and ``_next`` is brought up to date."""
        commands: list[Command] = []
        schedules = self._ledger.schedules
        for name in self._next.keys() - schedules.keys():
            del self._next[name]
        computed, now_ms = 0, self._wall_ms()
        for name, schedule in list(schedules.items()):
            known = self._next.get(name)
            if known is None or known[0] is not schedule:
                known = self._next[name] = (schedule, self._when(name, schedule))
                computed += 1
                if computed % SLICE == 0:
                    await asyncio.sleep(0)
            if known[1] is None or known[1] > now_ms:
                continue
            timetable = schedule.timetable
            owed = due(schedule, parse(timetable.when, timetable.zone), now_ms, self._late_ms)
            commands += owed.commands(name, schedule.revision)
            if owed.missed:
                _log.warning("schedule %s: %d firings were missed and are left out", name, owed.missed)
            if len(commands) >= DECIDED_MAX:
                break
        return commands[:DECIDED_MAX]

    def _when(self, name: str, schedule: Schedule) -> int | None:
        try:
            return next_firing_ms(schedule, parse(schedule.timetable.when, schedule.timetable.zone))
        except InvalidSchedule as error:
            # It was sound where it was put: this machine's time zones must be others. It stands still, and says so.
            self._note(name, f"schedule {name} cannot fire: {error}")
            return None

    def _note(self, name: str, text: str) -> None:
        self._notes[f"schedule {name}"] = text
        _log.error("%s", text)
