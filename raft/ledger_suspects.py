"""Suspects: how a claim becomes one, what evidence counts, and what closes it.

    claimed --its session closes--> suspect
    suspect --testimony: finished--> executed        suspect --ruling: executed-->     executed
            --testimony: never started--> waiting            --ruling: not executed--> waiting (next attempt)
            --testimony: failed--> waiting (next)            --ruling: held-->         suspect, for a human
            --testimony: started--> suspect

Only the claim's own node can testify, of the claim's incarnation or a later one, and each incarnation once: the
first word stands. A late settle of the lost session counts as the testimony of its incarnation. Nothing else than
testimony and rulings frees a suspect, so nothing reruns on a mere timeout.
"""

from __future__ import annotations

from typing import NamedTuple

from dedup.claims import Cancelled, Dead, OpenClaim, Waiting, cut, merged, repeats, single_parts
from dedup.ids import Ids
from dedup.suspects import Suspect
from raft.commands import (
    Answered,
    Fact,
    Freed,
    Outcome,
    Resolved,
    Rule,
    Span,
    Suspected,
    Testified,
    Testify,
    Verdict,
)
from raft.ledger_state import (
    LedgerCorrupt,
    LedgerState,
    Session,
    TaskValue,
    check_name,
    check_number,
    check_text,
    put,
    reject,
)

TESTIMONY = "testimony"  # what ``Resolved.by`` says when no ruling closed the suspect


class Word(NamedTuple):
    """What a witness says, and what follows if it says that the attempt failed."""

    fact: Fact
    delay_ms: int = 0
    dead: bool = False


def standing(value: TaskValue) -> tuple[Outcome, int, int]:
    """What stands under an id, for who cannot act on it: outcome, fence, detail."""
    if isinstance(value, OpenClaim):
        return Outcome.HELD, 0, value.session
    if isinstance(value, Suspect):
        return Outcome.SUSPECT, value.fence, 0
    if isinstance(value, Dead):
        return Outcome.DEAD, 0, 0
    if isinstance(value, Cancelled):
        return Outcome.CANCELLED, 0, 0
    return Outcome.NEW, 0, 0


def suspect_claims(state: LedgerState, session: Session, why: str) -> None:
    """All open claims of a session that is being closed become suspects."""
    for ids, claim in open_claims(state, session.session):
        suspect = Suspect(
            fence=claim.fence,
            session=session.session,
            node=session.node,
            incarnation=session.incarnation,
            attempt=claim.attempt,
            why=why,
            since_ms=state.now_ms,
        )
        state.move(ids, len(ids), claim, suspect)
        state.events.append(Suspected(ids, claim.fence, session.node, session.incarnation, why))
    left = state.open.pop(session.session).count
    if left:
        raise LedgerCorrupt(f"session {session.session} was closed with {left} claims that no map holds")


def open_claims(state: LedgerState, session: int) -> list[tuple[Ids, OpenClaim]]:
    """What a session holds: by fence and attempt ascending, each batch in canonical order."""
    held = state.open.get(session)
    if held is None:
        return []
    listing: list[tuple[Ids, OpenClaim]] = []
    for fence in held.numbers():
        found: dict[OpenClaim, list[Ids]] = {}
        for part, _, value in state.under(held, fence):
            if isinstance(value, OpenClaim):
                found.setdefault(value, []).append(part)
        for claim in sorted(found, key=lambda each: each.attempt):
            listing.append((merged(found[claim]), claim))
    return listing


def testify(state: LedgerState, command: Testify) -> Answered:
    check_name("node", command.node)
    check_number("incarnation", command.incarnation, 0, 2**63 - 1)
    total = sum(state.check_ids("testimonies.ids", testimony.ids) for testimony in command.testimonies)
    if total > state.settings.command_ids_max:
        reject(f"testimonies: {total} ids are too many: command_ids_max={state.settings.command_ids_max}")
    spans: list[Span] = []
    for testimony in command.testimonies:
        word = Word(testimony.fact)
        ids = testimony.ids
        for part in single_parts(ids) if repeats(ids) else (ids,):
            _testify_part(state, command, testimony.fence, word, part, spans)
    return Answered(tuple(spans))


def _testify_part(
    state: LedgerState, command: Testify, fence: int, word: Word, ids: Ids, spans: list[Span]
) -> None:
    for part, count, value in cut(ids, state.states.spans(ids)):
        if value is None:
            for _, number, outcome in state.unknown(part):
                put(spans, number, outcome)
        elif not isinstance(value, Suspect):
            put(spans, count, *standing(value))
        elif value.fence != fence or value.node != command.node or command.incarnation < value.incarnation:
            put(spans, count, Outcome.FENCED)
        else:
            taken = take_word(state, part, count, value, command.incarnation, word)
            put(spans, count, Outcome.SETTLED if taken else Outcome.FENCED)


def take_word(
    state: LedgerState, ids: Ids, count: int, suspect: Suspect, incarnation: int, word: Word
) -> bool:
    """Take what this incarnation of the suspect's node says; False if it has said something else before."""
    if incarnation in suspect.testified:
        return word.fact is Fact.STARTED
    if word.fact is Fact.NEVER_STARTED and suspect.testified:
        # It was seen to start: a later life that found no trace of it has lost the trace, not the start.
        return False
    state.events.append(Testified(ids, suspect.fence, suspect.node, word.fact))
    if word.fact is Fact.STARTED:
        state.amend(ids, count, suspect, suspect.started_by(incarnation))
        return True
    reason = f"{suspect.node}: {word.fact.name.lower().replace('_', ' ')}"
    if word.fact is Fact.FINISHED:
        state.execute(ids, count, suspect)
        state.events.append(Resolved(ids, suspect.fence, Verdict.EXECUTED, TESTIMONY, reason))
        return True
    state.events.append(Resolved(ids, suspect.fence, Verdict.NOT_EXECUTED, TESTIMONY, reason))
    if word.dead:
        state.move(ids, count, suspect, Dead(suspect.fence, suspect.attempt, state.now_ms))
        return True
    attempt = suspect.attempt + (word.fact is Fact.FAILED)
    due_ms = state.now_ms + word.delay_ms
    state.move(ids, count, suspect, Waiting(suspect.fence, attempt, due_ms, TESTIMONY, state.now_ms))
    state.events.append(Freed(ids))
    return True


def rule(state: LedgerState, command: Rule) -> Answered:
    state.check_ids("ids", command.ids)
    check_name("by", command.by)
    check_text("reason", command.reason)
    check_number("fence", command.fence, 0, 2**63 - 1)
    spans: list[Span] = []
    for single in single_parts(command.ids) if repeats(command.ids) else (command.ids,):
        for part, count, value in cut(single, state.states.spans(single)):
            if value is None:
                for _, number, outcome in state.unknown(part):
                    put(spans, number, outcome)
            elif not isinstance(value, Suspect):
                put(spans, count, *standing(value))
            elif command.fence not in (0, value.fence):
                put(spans, count, Outcome.FENCED)
            else:
                _rule_suspect(state, command, part, count, value)
                put(spans, count, Outcome.SETTLED)
    return Answered(tuple(spans))


def _rule_suspect(state: LedgerState, command: Rule, ids: Ids, count: int, suspect: Suspect) -> None:
    if command.verdict is Verdict.HELD:
        held = suspect.held_for(command.by, command.reason)
        if held == suspect:
            return  # said before: nothing new to tell
        state.amend(ids, count, suspect, held)
    state.events.append(Resolved(ids, suspect.fence, command.verdict, command.by, command.reason))
    if command.verdict is Verdict.EXECUTED:
        state.execute(ids, count, suspect)
    elif command.verdict is Verdict.NOT_EXECUTED:
        now = state.now_ms
        # Another attempt, although no handler reported the lost one: attempts then tell the story of the starts.
        state.move(ids, count, suspect, Waiting(suspect.fence, suspect.attempt + 1, now, "ruled", now))
        state.events.append(Freed(ids))
