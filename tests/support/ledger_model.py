"""A second ledger, written for obviousness: one dict entry an id, one step an id. It judges the real one.

``run(steps)`` decodes small integers into proposals (so that hypothesis can shrink them), applies them to both
ledgers and raises AssertionError at the first difference in answers, events, descriptions or counts.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from dedup.ids import Ids, TaskId
from raft.codec import encode_proposal
from raft.commands import (
    Advance,
    Allocated,
    AllocateIds,
    Answer,
    Answered,
    Cancel,
    Claim,
    Command,
    Deleted,
    Event,
    Fact,
    Freed,
    Gone,
    Heartbeat,
    Join,
    Joined,
    Leave,
    Outcome,
    Proposal,
    Rejected,
    Renewed,
    Resolved,
    Result,
    Revive,
    Rule,
    SessionClosed,
    SessionOpened,
    Settle,
    Settlement,
    Suspected,
    Testified,
    Testify,
    Testimony,
    Verdict,
)
from raft.ledger import Ledger, LedgerSettings

Said = tuple[Outcome, int, int]
Step = tuple[int, int, int, int, int]

KEYS = tuple(bytes((number,)) * 16 for number in range(1, 5))
NODES = ("n1", "n2", "n3")
SETTINGS = LedgerSettings(closed_retention_ms=20_000_000, keyed_retention_ms=10**12, tokens_per_proposer=8)


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
            case Revive():
                return [self.revive(each) for each in command.ids]
        raise AssertionError(command)

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


class Decoder:
    """Turns five small integers into a command that has something to do with the state."""

    def __init__(self, model: NaiveLedger) -> None:
        self.model = model
        self.seen = [0, 1]  # sessions and fences that once were, and two that never were
        self.fences = [0, 1]

    def ids(self, a: int, b: int) -> Ids:
        at = a % (self.model.next_id + (b % 3)) + 1
        runs = ((at, b % 5 + 1),) if a % 7 else ()
        if b % 6 == 5:
            runs = (*runs, (max(1, at - 2), 3))
        keys = KEYS[a % 4 : a % 4 + b % 3] if b % 4 == 0 else ()
        return Ids(runs, keys * (2 if b % 11 == 10 else 1))

    def fence(self, ids: Ids, c: int) -> int:
        """Mostly the one that stands under the first of the ids."""
        one = next((self.model.ids[each] for each in ids if each in self.model.ids), None)
        return one.fence if one and c % 5 else self.fences[c % len(self.fences)]

    def session(self, ids: Ids, c: int) -> int:
        one = next((self.model.ids[each] for each in ids if each in self.model.ids), None)
        if one and one.session and c % 4:
            return one.session
        live = sorted(self.model.sessions)
        return live[c % len(live)] if live and c % 9 else self.seen[c % len(self.seen)]

    def command(self, step: Step) -> Command:
        kind, a, b, c, d = step
        ids = self.ids(a, b)
        match kind % 20:
            case 0 | 16:
                node = NODES[a % 3]
                return Join(
                    node, self.model.highest.get(node, 1) + (0, 1, 0, -1, 0)[b % 5], 1000 + c % 3 * 1000
                )
            case 1:
                return Heartbeat(self.session(ids, c))
            case 2:
                return Leave(self.session(ids, c))
            case 3 | 4:
                return Advance("t1" if d % 9 else "t2", b * 60)
            case 5:
                return AllocateIds(a % 6 + 1)
            case 6 | 7 | 8 | 17 | 18:
                return Claim(self.session(Ids(), c), ids, d % 3 if d % 4 == 0 else 0)
            case 9 | 10 | 19:
                result = Result(d % 5 + 1)
                settlement = Settlement(self.fence(ids, c), ids, result, a % 3 * 700)
                other = self.ids(b, a)
                more = Settlement(self.fence(other, d), other, Result(c % 5 + 1))
                return Settle(self.session(ids, c), (settlement, more) if d % 3 == 0 else (settlement,))
            case 11 | 12:
                one = next((self.model.ids[each] for each in ids if each in self.model.ids), None)
                node = one.node if one and one.node and c % 6 else NODES[c % 3]
                incarnation = max(0, (one.incarnation if one else 1) + d % 4 - 1)
                return Testify(node, incarnation, (Testimony(self.fence(ids, c), ids, Fact(b % 4 + 1)),))
            case 13:
                return Rule(
                    ids, Verdict(c % 3 + 1), f"check{d % 2}", "why", self.fence(ids, a) if d % 2 else 0
                )
            case 14:
                return Cancel(ids, "me")
            case _:
                return Revive(ids, "me")

    def learn(self, answer: Answer, fence: int) -> None:
        if isinstance(answer, Joined):
            self.seen.append(answer.session)
        if isinstance(answer, Answered) and any(span.outcome is Outcome.GRANTED for span in answer.spans):
            self.fences.append(fence)


def expanded(answer: Answer) -> Any:
    """An answer of the real ledger as the model would say it."""
    match answer:
        case Answered(spans):
            for left, right in pairwise(spans):
                same = (left.outcome, left.fence, left.detail) == (right.outcome, right.fence, right.detail)
                assert not same, f"neighbouring spans say the same: {spans}"
            return [(span.outcome, span.fence, span.detail) for span in spans for _ in range(span.count)]
        case Rejected():
            return "rejected"
        case Joined() | Renewed() | Gone() | Allocated():
            return answer
    return getattr(answer, "now_ms", None)


def expanded_events(events: Iterable[Event]) -> Iterator[tuple[Any, ...]]:
    for event in events:
        match event:
            case SessionOpened(session, node, incarnation):
                yield "opened", session, node, incarnation
            case SessionClosed(session, node, incarnation, why):
                yield "closed", session, node, incarnation, why
            case Suspected(ids, fence, node, incarnation, why):
                yield from (("suspected", each, fence, node, incarnation, why) for each in ids)
            case Testified(ids, fence, node, fact):
                yield from (("testified", each, fence, node, fact) for each in ids)
            case Resolved(ids, fence, verdict, by, _):
                yield from (("resolved", each, fence, verdict, by) for each in ids)
            case Freed(ids):
                yield from (("freed", each) for each in ids)
            case Deleted(ids, by):
                yield from (("deleted", each, by) for each in ids)


def compare(ledger: Ledger, model: NaiveLedger) -> None:
    """Every id looks the same to both."""
    for each in model.pool():
        told = ledger.describe(each)
        one = model.ids.get(each)
        if one is None:
            assert told.state == model.stands(each)[0].name.lower(), (each, told)
            continue
        seen = One(
            told.state,
            told.fence,
            told.attempt,
            told.session,
            told.node if told.state == "suspect" else "",
            told.incarnation if told.state == "suspect" else 0,
            told.due_ms,
            told.why,
            told.testified,
            told.held_by,
            told.held_reason,
        )
        assert seen == one, (each, seen, one)
    number = Counter(one.state for one in model.ids.values())
    counts = ledger.counts()
    assert (counts.claimed, counts.suspect, counts.retrying) == (
        number["claimed"],
        number["suspect"],
        number["waiting"],
    )
    assert (counts.dead, counts.cancelled, counts.executed) == (
        number["dead"],
        number["cancelled"],
        len(model.executed),
    )
    assert counts.held == sum(bool(one.held_by) for one in model.ids.values())
    assert {number: lease.node for number, lease in model.sessions.items()} == {
        number: session.node for number, session in ledger.sessions.items()
    }
    assert ledger.now_ms == model.now_ms


def history(seed: int) -> str:
    """What a random history came to: the digest of its ledger, and one of all that was answered and told."""
    told = hashlib.blake2b(digest_size=16)
    ledger = run(random_steps(seed, 200), told=told)
    return f"{ledger.digest().hex()} {told.hexdigest()}"


def run(steps: Iterable[Step], *, twin: bool = False, told: hashlib.blake2b | None = None) -> Ledger:
    """Apply the steps to both ledgers; AssertionError or LedgerCorrupt at the first difference.

    With ``twin`` a third one is restored from a snapshot now and then, and must agree in bytes.
    """
    ledger, model = Ledger(5, SETTINGS), NaiveLedger()
    other = Ledger(5, SETTINGS)
    decoder = Decoder(model)
    prelude = [AllocateIds(9), Join("n1", 1, 3000), Join("n2", 1, 2000)]
    pending = list(steps)
    index = 0
    while prelude or pending:
        index += 1
        if prelude:
            commands: list[Command] = [prelude.pop(0)]
            expected = [model.apply(index, commands[0])]
            step = (0, 0, 0, 0, 0)
        else:
            step = pending.pop(0)
            commands = [decoder.command(step)]
            expected = [model.apply(index, commands[0])]
            while step[4] % 3 == 2 and pending:  # several commands in one entry, often about the same ids
                before, step = step, pending.pop(0)
                if step[3] % 2:
                    kind = (6, 6, 9, 9, 13, 15, 14, 2)[step[0] % 8]
                    step = (kind, before[1], before[2], step[3], step[4])
                commands.append(decoder.command(step))
                expected.append(model.apply(index, commands[-1]))
        payload = encode_proposal(Proposal(9, index, tuple(commands)))
        effects = ledger.apply(index, payload)
        assert [expanded(answer) for answer in effects.answers] == expected, (index, commands)
        assert Counter(expanded_events(effects.events)) == Counter(model.events), (index, commands)
        model.events.clear()
        if told is not None:
            told.update(repr((effects.answers, effects.events)).encode())
        for answer in effects.answers:
            decoder.learn(answer, index)
        compare(ledger, model)
        ledger.check_invariants()
        if twin:
            assert other.apply(index, payload) == effects
            if step[1] % 5 == 0:
                other.restore(ledger.snapshot() if step[2] % 2 else other.snapshot())
                other.check_invariants()
            assert other.digest() == ledger.digest()
    return ledger


def random_steps(seed: int, count: int = 80) -> list[Step]:
    draw = random.Random(seed)
    return [
        (
            draw.randrange(20),
            draw.randrange(120),
            draw.randrange(120),
            draw.randrange(120),
            draw.randrange(120),
        )
        for _ in range(count)
    ]
