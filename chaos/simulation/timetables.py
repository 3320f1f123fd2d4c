"""Schedules, from outside: what each of them owes by what was asked of it, and whether just that came about.

Written from docs/schedules.md and not from the code that decides: what is in the ledger's log is read once, in its
order, as a person would do it with a calendar beside. A firing is (schedule, time), and:

- it is decided once, by a schedule that is there, is not paused, and says so (*not* by one of before);
- never before its time, by the wall clock of whoever decides it;
- a time that is passed over was missed: due for longer than ``late_ms`` by that clock; and catch_up wants it so;
- it comes into the task log after it was decided, as the task that the schedule said then, under one id, and that
  id is no other firing's;
- what a client was told is in the ledger's log; what was decided is in the task log in the end.

That the task of a firing then runs once is checked as for every other task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chaos.simulation.workload import POLICY
from dedup.ids import TaskId, id_text
from oncekeeper.envelope import TaskBatch, time_text
from raft import commands as c

if TYPE_CHECKING:
    from chaos.simulation.witness import Witness

SCHEDULES = 15
"""Of the invariants: that of schedules (docs/simulation.md)."""
BACKLOG_MAX = 6
"""Of a run: how many missed firings `all` makes up for."""
Firing = tuple[str, int]


def every_ms(timetable: c.Timetable) -> int:
    """Of what the simulation's schedules say: `every 700ms`."""
    return int(timetable.when.removeprefix("every ").removesuffix("ms"))


@dataclass
class Known:
    """A schedule, as it stands by what was decided so far."""

    timetable: c.Timetable
    owner: str
    revision: int
    since_ms: int
    paused: bool = False
    passed_ms: int = 0
    """The latest time that it fired or was passed for."""
    fired: int = 0
    decided: set[int] = field(default_factory=set)

    @property
    def begin_ms(self) -> int:
        """What is due up to then is not owed, or not any more."""
        return max(self.since_ms, self.passed_ms)

    def times(self, until_ms: int) -> range:
        """What is due after ``begin_ms``, and up to then."""
        step = every_ms(self.timetable)
        return range((self.begin_ms // step + 1) * step, until_ms + 1, step)


class Timetables:
    def __init__(self, witness: Witness, late_ms: int) -> None:
        self._witness = witness
        self._late_ms = late_ms
        self.known: dict[str, Known] = {}
        self.owed: dict[Firing, c.Timetable] = {}
        """Decided, and not in the task log."""
        self._asked: dict[Firing, list[int]] = {}
        """The wall clocks of those who wanted to decide it, when they did."""
        self._by: set[str] = set()
        self._texts: dict[str, Firing] = {}
        self._tasks: dict[Firing, c.Timetable] = {}
        self._ids: dict[Firing, TaskId] = {}
        self._firings: dict[TaskId, Firing] = {}
        self._rules: dict[type, Callable[[Any, int], None]] = {
            c.PutSchedule: self._put,
            c.DeleteSchedule: self._delete,
            c.PauseSchedule: self._pause,
            c.Fire: self._fire,
        }

    def _wrong(self, text: str, *ids: TaskId) -> None:
        self._witness.violated(SCHEDULES, text, *ids)

    # --- what a leader is about to do ---------------------------------------------------------------------------

    def proposing(self, node: str, commands: Iterable[c.Command], wall_ms: int) -> None:
        for command in commands:
            if isinstance(command, c.Fire):
                self._asked.setdefault((command.name, command.at_ms), []).append(wall_ms)
                if wall_ms < command.at_ms:
                    early_ms = command.at_ms - wall_ms
                    self._wrong(
                        f"schedule {command.name}: {node} fires {early_ms} ms early, by its own clock"
                    )

    # --- what was decided ---------------------------------------------------------------------------------------

    def on(self, effects: c.Effects) -> None:
        for command, answer in zip(effects.proposal.commands, effects.answers, strict=True):
            rule = self._rules.get(type(command))
            if rule is not None and isinstance(answer, c.Done):
                text = f"{type(command).__name__} {command.name}"  # type: ignore[union-attr]
                self._witness.note("ledger", "SCHEDULE", None, f"{effects.index}: {text} {_short(command)}")
                rule(command, effects.index)

    def _put(self, command: c.PutSchedule, index: int) -> None:
        self._by.add(command.by)
        known = self.known.get(command.name)
        if known is None:
            self.known[command.name] = Known(command.timetable, command.owner, index, command.now_ms)
        elif known.timetable != command.timetable:
            if known.timetable.when != command.timetable.when:
                known.since_ms = max(known.since_ms, command.now_ms)
            known.timetable, known.revision = command.timetable, index

    def _delete(self, command: c.DeleteSchedule, index: int) -> None:
        self._by.add(command.by)
        self.known.pop(command.name, None)

    def _pause(self, command: c.PauseSchedule, index: int) -> None:
        self._by.add(command.by)
        known = self.known[command.name]
        if known.paused and not command.paused:
            known.since_ms = max(known.since_ms, command.now_ms)
        known.paused = command.paused

    def _fire(self, command: c.Fire, index: int) -> None:
        name, at_ms = command.name, command.at_ms
        known = self.known.get(name)
        what = f"schedule {name} fires for {at_ms}"
        if known is None:
            self._wrong(f"{what}, and there is none")
        elif known.paused:
            self._wrong(f"{what}, and is paused")
        elif command.revision != known.revision:
            self._wrong(f"{what} as it was at index {command.revision}, and was changed at {known.revision}")
        elif at_ms in known.decided:
            self._wrong(f"{what} for the second time")
        elif at_ms <= known.begin_ms:
            self._wrong(f"{what}, and is past {known.begin_ms}")
        elif at_ms % every_ms(known.timetable):
            self._wrong(f"{what}, which is no time of {known.timetable.when!r}")
        else:
            why = [self._unfit(known, command, now) for now in self._asked.get((name, at_ms), ())]
            if not why:
                self._wrong(f"{what}, and nobody asked for it")
            elif all(why):
                self._wrong(f"{what}: {why[0]}")
            self._take(known, command)

    def _unfit(self, known: Known, command: c.Fire, now_ms: int) -> str:
        """Why this is not what the schedule owed at that time, by catch_up; "" if it is."""
        at_ms, times = command.at_ms, known.times(now_ms)
        skipped = times.index(at_ms) if at_ms in times else 0
        is_late = bool(times) and now_ms - times[0] > self._late_ms
        is_late = is_late or len(times) > BACKLOG_MAX
        catch_up = known.timetable.catch_up
        said = f"{skipped} are left out, and at {now_ms} {len(times)} were due from {times[:1]}, {catch_up}"
        if not is_late:
            return said if skipped or not command.runs else ""
        if catch_up == "all":
            is_right = command.runs and skipped <= max(0, len(times) - BACKLOG_MAX)
        else:
            is_right = times[-1:] == range(at_ms, at_ms + 1, times.step) and command.runs == (
                catch_up == "latest"
            )
        return "" if is_right else said

    def _take(self, known: Known, command: c.Fire) -> None:
        firing = command.name, command.at_ms
        reached = self._witness.reached
        if known.times(command.at_ms)[0] < command.at_ms:
            reached.add(f"firings left out: {known.timetable.catch_up}")
        known.passed_ms = command.at_ms
        known.decided.add(command.at_ms)
        if command.runs:
            known.fired += 1
            reached.add(f"firing: {known.timetable.catch_up}")
            self.owed.setdefault(firing, known.timetable)
            self._tasks[firing] = known.timetable
            self._texts[f"schedule {command.name} for {time_text(command.at_ms)}"] = firing
            if (
                firing in self._ids
            ):  # of a schedule of that name that was deleted: the same firing, and the same task
                del self.owed[firing]

    # --- what comes into the task log ---------------------------------------------------------------------------

    def appended(self, batch: TaskBatch) -> None:
        """Called of each batch that any node appended."""
        if not batch.submitted_by.startswith("schedule ") or " for " not in batch.submitted_by:
            return
        firing = self._texts.get(batch.submitted_by)
        (task_id,) = batch.ids
        what = f"{batch.submitted_by}: {id_text(task_id)}"
        if firing is None:
            self._wrong(f"{what} is appended, and was not decided", task_id)
            return
        timetable = self._tasks[firing]
        if self._ids.setdefault(firing, task_id) != task_id:
            self._wrong(f"{what} is the second id of that firing", task_id, self._ids[firing])
        elif self._firings.setdefault(task_id, firing) != firing:
            self._wrong(f"{what} is the id of another firing too: {self._firings[task_id]}", task_id)
        elif (batch.handler, batch.bodies) != (timetable.handler, (timetable.body,)):
            self._wrong(f"{what} is not the task that was decided", task_id)
        self.owed.pop(firing, None)
        history = self._witness.history
        history.submit([task_id], POLICY[timetable.handler], acknowledged=True, t_ns=self._witness.t_ns)

    # --- what clients are told, and what must be in the end -----------------------------------------------------

    def told(self, by: str) -> None:
        """A client is told that what it asked for under this name was done."""
        if by not in self._by:
            self._wrong(f"{by} was acknowledged, and is not decided")

    def behind(self, name: str, wall_ms: int) -> bool:
        """Whether it owes something by then."""
        known = self.known.get(name)
        return known is not None and not known.paused and bool(known.times(wall_ms))

    def compare(self, node: str, schedules: Any, firings: Any) -> None:
        """A ledger's own idea of all this, when everything has ended."""
        mine = {
            name: (known.timetable, known.paused, known.revision, known.since_ms, known.passed_ms)
            for name, known in self.known.items()
        }
        its = {
            name: (each.timetable, each.paused, each.revision, each.since_ms, each.fired_ms)
            for name, each in schedules.items()
        }
        if mine != its or firings:
            self._wrong(f"{node} has schedules {its} and firings {list(firings)}, and not {mine}")


def _short(command: Any) -> str:
    match command:
        case c.Fire(_, revision, at_ms, runs, missed):
            return f"for {at_ms} of revision {revision}, runs {runs}, missed {missed}"
        case c.PutSchedule(_, timetable, _, by, now_ms):
            return f"{timetable.when} {timetable.handler} {timetable.catch_up} by {by} at {now_ms}"
        case c.PauseSchedule(_, paused, by, now_ms):
            return f"{'paused' if paused else 'resumed'} by {by} at {now_ms}"
        case _:
            return f"by {command.by}"
