"""Random and drawn histories, applied to the real ledger and to the naive one (tests/support/ledger_naive.py).

``run(steps)`` decodes small integers into proposals (so that hypothesis can shrink them), applies them to both
ledgers and raises AssertionError at the first difference in answers, events, descriptions or counts.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from dedup.ids import Ids
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
    DeleteSchedule,
    Done,
    Effects,
    Event,
    Fact,
    Fire,
    Freed,
    Gone,
    Heartbeat,
    Hold,
    Join,
    Joined,
    Launched,
    Leave,
    Outcome,
    PauseSchedule,
    Proposal,
    PutSchedule,
    Rejected,
    Renewed,
    Resolved,
    Result,
    Revive,
    Rule,
    ScheduleChanged,
    SessionClosed,
    SessionOpened,
    Settle,
    Settlement,
    Stale,
    Suspected,
    Testified,
    Testify,
    Testimony,
    Timetable,
    Verdict,
)
from raft.ledger import Ledger, LedgerSettings
from tests.support.ledger_naive import KEYS, NODES, NaiveLedger, One

Step = tuple[int, int, int, int, int]

KINDS = 27
"""How many kinds of step there are; some commands are more than one, and so more frequent."""

SETTINGS = LedgerSettings(closed_retention_ms=20_000_000, keyed_retention_ms=10**12, tokens_per_proposer=8)


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
        match kind % KINDS:
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
            case 26:
                return Hold(ids, d % 3 * 400)
            case 20 | 21 | 22 | 23 | 24 | 25:
                return self.about_schedules(kind % KINDS, a, b, c, d)
            case _:
                return Revive(ids, "me")

    def about_schedules(self, kind: int, a: int, b: int, c: int, d: int) -> Command:
        name = ("s1", "s2")[a % 2]
        known = self.model.schedules.get(name)
        last = max([0, *(at for at, _ in known.decided)]) if known else 0
        owner = known.owner if known and d % 7 else ("code", "hand")[b % 2]
        match kind:
            case 20:
                timetable = Timetable(f"{c % 2} * * * *", ("", "UTC")[d % 2], "h", "q", bytes((48 + b % 2,)))
                return PutSchedule(name, timetable, owner, "me", last + c % 50 + 1)
            case 21:
                return DeleteSchedule(name, owner) if c % 3 == 0 else Launched(name, max(1, last))
            case 22:
                return PauseSchedule(name, c % 3 == 0, "me", last + b % 50 + 1)
        revision = (known.revision if known else 1) - (d % 9 == 8)
        return Fire(name, revision, max(1, last + b % 60 - 10), c % 4 != 0, c % 3)

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
        case Joined() | Renewed() | Gone() | Allocated() | Stale():
            return answer
    return getattr(answer, "now_ms", None)


def told_by_model(answer: Any) -> Any:
    return None if isinstance(answer, Done) else answer


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
            case ScheduleChanged(name):
                yield "schedule", name


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
    compare_schedules(ledger, model)


def compare_schedules(ledger: Ledger, model: NaiveLedger) -> None:
    assert {key: firing.timetable for key, firing in ledger.firings.items()} == model.firings
    assert ledger.schedules.keys() == model.schedules.keys()
    for name, planned in model.schedules.items():
        told = ledger.schedules[name]
        assert (told.timetable, told.owner, told.revision) == (
            planned.timetable,
            planned.owner,
            planned.revision,
        )
        assert (told.paused, told.since_ms, told.missed) == (
            planned.paused,
            planned.since_ms,
            planned.missed,
        )
        assert told.fired_ms == max([0, *(at for at, _ in planned.decided)])
        assert told.fired == sum(runs for _, runs in planned.decided)


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
        assert [expanded(answer) for answer in effects.answers] == list(map(told_by_model, expected)), (
            index,
            commands,
        )
        assert Counter(expanded_events(effects.events)) == Counter(model.events), (index, commands)
        model.events.clear()
        if told is not None:
            told.update(repr((effects.answers, effects.events)).encode())
        for answer in effects.answers:
            decoder.learn(answer, index)
        entries = [(index, payload, effects)]
        if step[2] % 7 == 0:  # whoever missed the answers asks again
            index += 1
            again = ledger.apply(index, payload)
            assert again == Effects(index, effects.proposal, effects.answers, (), True)
            entries.append((index, payload, again))
        compare(ledger, model)
        ledger.check_invariants()
        if twin:
            for at, sent, expected_effects in entries:
                assert other.apply(at, sent) == expected_effects
            if step[1] % 5 == 0:
                other.restore(ledger.snapshot() if step[2] % 2 else other.snapshot())
                other.check_invariants()
            assert other.digest() == ledger.digest()
    return ledger


def random_steps(seed: int, count: int = 80) -> list[Step]:
    draw = random.Random(seed)
    return [
        (
            draw.randrange(KINDS),
            draw.randrange(120),
            draw.randrange(120),
            draw.randrange(120),
            draw.randrange(120),
        )
        for _ in range(count)
    ]
