"""A second ledger, written for obviousness: one dict entry an id, one step an id. It judges the real one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dedup.ids import TaskId
from raft.commands import (
    Advance,
    Allocated,
    AllocateIds,
    Cancel,
    Claim,
    Command,
    DeleteSchedule,
    Done,
    Fact,
    Fire,
    Gone,
    Heartbeat,
    Hold,
    Join,
    Joined,
    Launched,
    Leave,
    Outcome,
    PauseSchedule,
    PutSchedule,
    Renewed,
    Result,
    Revive,
    Rule,
    Settle,
    Settlement,
    Stale,
    Testify,
    Testimony,
    Timetable,
    Verdict,
)

Said = tuple[Outcome, int, int]

KEYS = tuple(bytes((number,)) * 16 for number in range(1, 5))
NODES = ("n1", "n2", "n3")


@dataclass(frozen=True)
class One:
    """The state of one id that is neither new nor executed."""

    state: str
    fence: int
    attempt: int = 0
    session: int = 0
    node: str = ""
    incarnation: int = 0
    due_ms: int = 0
    how: str = ""
    testified: tuple[int, ...] = ()
    held_by: str = ""
    reason: str = ""


@dataclass
class Lease:
    node: str
    incarnation: int
    timeout_ms: int
    expires_ms: int


@dataclass
class Planned:
    """A schedule, with every time it ever decided on."""

    timetable: Timetable
    owner: str
    revision: int
    since_ms: int
    paused: bool = False
    decided: list[tuple[int, bool]] = field(default_factory=list)
    missed: int = 0


@dataclass
class NaiveLedger:
    index: int = 0
    now_ms: int = 0
    timekeeper: str = ""
    next_id: int = 1
    last_session: int = 0
    sessions: dict[int, Lease] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)
    ids: dict[TaskId, One] = field(default_factory=dict)
    executed: set[TaskId] = field(default_factory=set)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    schedules: dict[str, Planned] = field(default_factory=dict)
    firings: dict[tuple[str, int], Timetable] = field(default_factory=dict)

    def apply(self, index: int, command: Command) -> Any:
        self.index = index
        match command:
            case Join():
                return self.join(command)
            case Heartbeat(session):
                if session not in self.sessions:
                    return Gone(session)
                self.sessions[session].expires_ms = self.now_ms + self.sessions[session].timeout_ms
                return Renewed(self.now_ms)
            case Leave(session):
                if session not in self.sessions:
                    return Gone(session)
                self.close(session, "left")
                return None
            case Advance():
                if command.timekeeper != self.timekeeper:
                    known, self.timekeeper = self.timekeeper, command.timekeeper
                    if known:
                        return self.now_ms
                self.now_ms += min(command.elapsed_ms, 1000)
                for session in sorted(self.sessions):
                    if self.sessions[session].expires_ms <= self.now_ms:
                        self.close(session, "lapsed")
                return self.now_ms
            case AllocateIds(count):
                start, self.next_id = self.next_id, self.next_id + count
                return Allocated(start, count)
            case Claim():
                return [self.claim(command, each) for each in command.ids]
            case Settle():
                return [
                    self.settle(command.session, settlement, each)
                    for settlement in command.settlements
                    for each in settlement.ids
                ]
            case Testify():
                return [
                    self.testify(command, testimony, each)
                    for testimony in command.testimonies
                    for each in testimony.ids
                ]
            case Rule():
                return [self.rule(command, each) for each in command.ids]
            case Cancel():
                return [self.cancel(command, each) for each in command.ids]
            case Hold():
                return [self.hold(command, each) for each in command.ids]
            case Revive():
                return [self.revive(each) for each in command.ids]
            case PutSchedule() | DeleteSchedule() | PauseSchedule() | Fire() | Launched():
                return self.schedule(command)
        raise AssertionError(command)

    def schedule(self, command: Command) -> Any:
        known = self.schedules.get(getattr(command, "name", ""))
        match command:
            case PutSchedule(name, timetable, owner, _, now_ms):
                if known is None:
                    self.schedules[name] = Planned(timetable, owner, self.index, now_ms)
                elif known.owner != owner:
                    return "rejected"
                elif known.timetable == timetable:
                    return Done()
                else:
                    if known.timetable.when != timetable.when or known.timetable.zone != timetable.zone:
                        known.since_ms = max(known.since_ms, now_ms)
                    known.timetable, known.revision = timetable, self.index
            case DeleteSchedule(name, owner):
                if known is None:
                    return Done()
                if known.owner != owner:
                    return "rejected"
                del self.schedules[name]
            case PauseSchedule(name, paused, _, now_ms):
                if known is None:
                    return "rejected"
                if known.paused == paused:
                    return Done()
                known.paused = paused
                if not paused:
                    known.since_ms = max(known.since_ms, now_ms)
            case Fire(name, revision, at_ms, runs, missed):
                if known is None or known.paused or known.revision != revision or at_ms <= known.since_ms:
                    return Stale()
                if any(at_ms <= earlier for earlier, _ in known.decided):
                    return Stale()
                known.decided.append((at_ms, runs))
                known.missed += missed
                if runs:
                    self.firings[name, at_ms] = known.timetable
            case Launched(name, at_ms):
                self.firings.pop((name, at_ms), None)
                return Done()
            case _:
                raise AssertionError(command)
        self.events.append(("schedule", name))
        return Done()

    def join(self, command: Join) -> Any:
        node, incarnation = command.node, command.incarnation
        if incarnation < self.highest.get(node, 0):
            return "rejected"
        lease = Lease(node, incarnation, command.timeout_ms, self.now_ms + command.timeout_ms)
        for session, live in list(self.sessions.items()):
            if live.node == node and live.incarnation == incarnation:
                self.sessions[session] = lease
                return Joined(session, self.now_ms)
            if live.node == node:
                self.close(session, "replaced")
        self.highest[node] = incarnation
        self.last_session = max(self.index, self.last_session + 1)
        self.sessions[self.last_session] = lease
        self.events.append(("opened", self.last_session, node, incarnation))
        return Joined(self.last_session, self.now_ms)

    def close(self, session: int, why: str) -> None:
        lease = self.sessions.pop(session)
        self.events.append(("closed", session, lease.node, lease.incarnation, why))
        for each, one in self.ids.items():
            if one.state == "claimed" and one.session == session:
                self.suspect(each, one, lease, why)

    def suspect(self, each: TaskId, one: One, lease: Lease, why: str) -> None:
        self.ids[each] = One(
            "suspect", one.fence, one.attempt, one.session, lease.node, lease.incarnation, how=why
        )
        self.events.append(("suspected", each, one.fence, lease.node, lease.incarnation, why))

    def stands(self, each: TaskId) -> Said:
        if each in self.executed:
            return Outcome.EXECUTED, 0, 0
        if isinstance(each, int) and each >= self.next_id:
            return Outcome.UNALLOCATED, 0, 0
        one = self.ids.get(each)
        if one is None or one.state == "waiting":
            return Outcome.NEW, 0, 0
        if one.state == "claimed":
            return Outcome.HELD, 0, one.session
        if one.state == "suspect":
            return Outcome.SUSPECT, one.fence, 0
        return (Outcome.DEAD if one.state == "dead" else Outcome.CANCELLED), 0, 0

    def claim(self, command: Claim, each: TaskId) -> Said:
        if command.session not in self.sessions:
            return Outcome.LAPSED, 0, 0
        one = self.ids.get(each)
        stands = self.stands(each)
        mine = one is not None and one.state == "claimed" and one.session == command.session
        if stands[0] is not Outcome.NEW and not mine:
            return stands
        attempt = one.attempt if one else 1
        if command.attempt not in (0, attempt):
            return Outcome.STALE, 0, attempt
        if one and mine:
            return Outcome.GRANTED, one.fence, attempt
        if one and one.due_ms > self.now_ms:
            return Outcome.EARLY, 0, one.due_ms - self.now_ms
        if one and one.fence == self.index:
            return Outcome.EARLY, 0, 1
        self.ids[each] = One("claimed", self.index, attempt, command.session)
        return Outcome.GRANTED, self.index, attempt

    def wait(self, each: TaskId, one: One, attempt: int, due_ms: int, how: str) -> None:
        self.ids[each] = One("waiting", one.fence, attempt, due_ms=due_ms, how=how)
        self.events.append(("freed", each))

    def finish(self, each: TaskId) -> None:
        del self.ids[each]
        assert each not in self.executed
        self.executed.add(each)

    def settle(self, session: int, settlement: Settlement, each: TaskId) -> Said:
        one = self.ids.get(each)
        result = settlement.result
        if one is None:
            stands = self.stands(each)
            return (Outcome.FENCED, 0, 0) if stands[0] is Outcome.NEW else stands
        if one.fence != settlement.fence:
            return Outcome.FENCED, 0, 0
        if one.state in ("claimed", "suspect") and one.session != session:
            return Outcome.FENCED, 0, 0
        due_ms = self.now_ms + settlement.delay_ms
        if one.state == "claimed":
            if result is Result.DONE:
                self.finish(each)
            elif result is Result.RETRY:
                self.wait(each, one, one.attempt + 1, due_ms, "retry")
            elif result is Result.RELEASED:
                self.wait(each, one, one.attempt, self.now_ms, "released")
            elif result is Result.DEAD:
                self.ids[each] = One("dead", one.fence, one.attempt)
            else:
                lease = self.sessions[session]
                self.suspect(each, one, lease, "doubt")
                self.ids[each] = replace(self.ids[each], testified=(lease.incarnation,))
                self.events.append(("testified", each, one.fence, lease.node, Fact.STARTED))
            return Outcome.SETTLED, 0, 0
        if one.state == "suspect":
            fact = {
                Result.DONE: Fact.FINISHED,
                Result.RETRY: Fact.FAILED,
                Result.DEAD: Fact.FAILED,
                Result.DOUBT: Fact.STARTED,
                Result.RELEASED: Fact.NEVER_STARTED,
            }[result]
            if not self.hear(each, one, one.incarnation, fact, settlement):
                return Outcome.FENCED, 0, 0
            return (Outcome.SETTLED if session in self.sessions else Outcome.LAPSED), 0, 0
        same = (one.state, one.how, result) in (
            ("dead", "", Result.DEAD),
            ("waiting", "retry", Result.RETRY),
            ("waiting", "released", Result.RELEASED),
        )
        return (Outcome.SETTLED if same else Outcome.FENCED), 0, 0

    def hear(
        self, each: TaskId, one: One, incarnation: int, fact: Fact, settlement: Settlement | None = None
    ) -> bool:
        if incarnation in one.testified:
            return fact is Fact.STARTED
        if fact is Fact.NEVER_STARTED and one.testified:
            return False
        self.events.append(("testified", each, one.fence, one.node, fact))
        if fact is Fact.STARTED:
            if len(one.testified) < 8:
                self.ids[each] = replace(one, testified=(*one.testified, incarnation))
            return True
        verdict = Verdict.EXECUTED if fact is Fact.FINISHED else Verdict.NOT_EXECUTED
        self.events.append(("resolved", each, one.fence, verdict, "testimony"))
        if fact is Fact.FINISHED:
            self.finish(each)
        elif settlement and settlement.result is Result.DEAD:
            self.ids[each] = One("dead", one.fence, one.attempt)
        elif fact is Fact.NEVER_STARTED:
            self.wait(each, one, one.attempt, self.now_ms, "testimony")
        else:
            delay_ms = settlement.delay_ms if settlement else 0
            self.wait(each, one, one.attempt + 1, self.now_ms + delay_ms, "testimony")
        return True

    def testify(self, command: Testify, testimony: Testimony, each: TaskId) -> Said:
        one = self.ids.get(each)
        if one is None or one.state != "suspect":
            return self.stands(each)
        own = one.fence == testimony.fence and one.node == command.node
        if not own or command.incarnation < one.incarnation:
            return Outcome.FENCED, 0, 0
        heard = self.hear(each, one, command.incarnation, testimony.fact)
        return (Outcome.SETTLED if heard else Outcome.FENCED), 0, 0

    def rule(self, command: Rule, each: TaskId) -> Said:
        one = self.ids.get(each)
        if one is None or one.state != "suspect":
            return self.stands(each)
        if command.fence and command.fence != one.fence:
            return Outcome.FENCED, 0, 0
        if command.verdict is Verdict.HELD:
            held = replace(one, held_by=command.by, reason=command.reason)
            if held == one:
                return Outcome.SETTLED, 0, 0
            self.ids[each] = held
        self.events.append(("resolved", each, one.fence, command.verdict, command.by))
        if command.verdict is Verdict.EXECUTED:
            self.finish(each)
        elif command.verdict is Verdict.NOT_EXECUTED:
            self.wait(each, one, one.attempt + 1, self.now_ms, "ruled")
        return Outcome.SETTLED, 0, 0

    def cancel(self, command: Cancel, each: TaskId) -> Said:
        one = self.ids.get(each)
        stands = self.stands(each)
        if stands[0] in (Outcome.HELD, Outcome.SUSPECT):
            return Outcome.BUSY, 0, 0
        if stands[0] is Outcome.CANCELLED:
            return Outcome.SETTLED, 0, 0
        if stands[0] is not Outcome.NEW:
            return stands
        self.ids[each] = One("cancelled", one.fence if one else 0)
        self.events.append(("deleted", each, command.by))
        return Outcome.SETTLED, 0, 0

    def hold(self, command: Hold, each: TaskId) -> Said:
        stands = self.stands(each)
        if stands[0] in (Outcome.HELD, Outcome.SUSPECT):
            return Outcome.BUSY, 0, 0
        if stands[0] is not Outcome.NEW:
            return stands
        one = self.ids.get(each)
        until_ms = self.now_ms + command.hold_ms
        if one is None and command.hold_ms:
            self.ids[each] = One("waiting", 0, 1, due_ms=until_ms, how="held")
        elif one is not None and command.hold_ms:
            self.ids[each] = replace(one, due_ms=max(one.due_ms, until_ms))
        elif one is not None and one.due_ms > until_ms:
            self.ids[each] = replace(one, due_ms=until_ms)
            self.events.append(("freed", each))
        return Outcome.SETTLED, 0, 0

    def revive(self, each: TaskId) -> Said:
        one = self.ids.get(each)
        stands = self.stands(each)
        if one and one.state in ("dead", "cancelled"):
            self.wait(each, one, 1, self.now_ms, "revived")
            return Outcome.SETTLED, 0, 0
        if stands[0] in (Outcome.HELD, Outcome.SUSPECT):
            return Outcome.BUSY, 0, 0
        if one and one.how == "revived":
            return Outcome.SETTLED, 0, 0
        return stands

    def pool(self) -> list[TaskId]:
        return [*range(1, self.next_id + 2), *KEYS]
