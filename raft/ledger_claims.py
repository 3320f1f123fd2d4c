"""Claim and Settle: how an id comes under a fence, and how its holder closes it.

    new, waiting  --Claim-->    claimed
    claimed       --DONE-->     executed
    claimed       --RETRY-->    waiting (next attempt, from now + delay)
    claimed       --RELEASED--> waiting (same attempt)
    claimed       --DEAD-->     dead
    claimed       --DOUBT-->    suspect

The fence of a claim is the index of its log entry, and one entry never grants an id twice (what the same entry
freed is EARLY), so the fences of an id strictly grow. A settle acts on exactly the claim whose fence and session
it names. If that claim has become a suspect meanwhile, what the settle says is testimony (raft/ledger_suspects.py).
"""

from __future__ import annotations

from dedup.claims import Dead, OpenClaim, Waiting, cut, repeats, single_parts
from dedup.ids import Ids
from dedup.suspects import Suspect
from raft.commands import (
    Answered,
    Claim,
    Fact,
    Freed,
    Outcome,
    Result,
    Settle,
    Settlement,
    Span,
    Suspected,
    Testified,
)
from raft.ledger_state import LedgerCorrupt, LedgerState, TaskValue, check_number, put, reject
from raft.ledger_suspects import Word, standing, take_word

_WORDS = {
    Result.DONE: Word(Fact.FINISHED),
    Result.DOUBT: Word(Fact.STARTED),
    Result.RELEASED: Word(Fact.NEVER_STARTED),
    Result.DEAD: Word(Fact.FAILED, dead=True),
}


def claim(state: LedgerState, command: Claim) -> Answered:
    ids = command.ids
    total = state.check_ids("ids", ids)
    check_number("attempt", command.attempt, 0, 2**31)
    spans: list[Span] = []
    if command.session not in state.sessions:
        if total:
            put(spans, total, Outcome.LAPSED)
        return Answered(tuple(spans))
    state.check_room("ids", ids)
    held = state.open[command.session]
    if held.count + total > state.settings.session_claims_max:
        reject(
            f"ids: session {command.session} has {held.count} open claims; with {total} more it would pass "
            f"session_claims_max={state.settings.session_claims_max}: settle first"
        )
    for part in single_parts(ids) if repeats(ids) else (ids,):
        _claim_part(state, command, part, spans)
    return Answered(tuple(spans))


def _claim_part(state: LedgerState, command: Claim, ids: Ids, spans: list[Span]) -> None:
    fence = state.index
    for part, count, value in cut(ids, state.states.spans(ids)):
        if value is None:
            for fresh, number, outcome in state.unknown(part):
                if outcome is not Outcome.NEW:
                    put(spans, number, outcome)
                elif command.attempt > 1:
                    put(spans, number, Outcome.STALE, 0, 1)
                else:
                    state.move(fresh, number, None, OpenClaim(fence, command.session, 1))
                    put(spans, number, Outcome.GRANTED, fence, 1)
            continue
        outcome, shown, detail = _claimable(state, command, value)
        if outcome is Outcome.GRANTED and isinstance(value, Waiting):
            state.move(part, count, value, OpenClaim(fence, command.session, value.attempt))
            shown = fence
        put(spans, count, outcome, shown, detail)


def _claimable(state: LedgerState, command: Claim, value: TaskValue) -> tuple[Outcome, int, int]:
    """What a Claim says of an id with this value: outcome, fence, detail."""
    if isinstance(value, OpenClaim):
        if value.session != command.session:
            return Outcome.HELD, 0, value.session
        if command.attempt not in (0, value.attempt):
            return Outcome.STALE, 0, value.attempt
        return Outcome.GRANTED, value.fence, value.attempt
    if isinstance(value, Waiting):
        if command.attempt not in (0, value.attempt):
            return Outcome.STALE, 0, value.attempt
        if value.due_ms > state.now_ms:
            return Outcome.EARLY, 0, value.due_ms - state.now_ms
        if value.fence >= state.index:
            # Freed by this very log entry: granted again here, its fence would not grow.
            return Outcome.EARLY, 0, 1
        return Outcome.GRANTED, 0, value.attempt
    return standing(value)


def settle(state: LedgerState, command: Settle) -> Answered:
    total = 0
    for settlement in command.settlements:
        total += state.check_ids("settlements.ids", settlement.ids)
        if settlement.delay_ms:
            check_number("settlements.delay_ms", settlement.delay_ms, 0, state.settings.retry_delay_ms_max)
    if total > state.settings.command_ids_max:
        reject(f"settlements: {total} ids are too many: command_ids_max={state.settings.command_ids_max}")
    spans: list[Span] = []
    for settlement in command.settlements:
        ids = settlement.ids
        for part in single_parts(ids) if repeats(ids) else (ids,):
            _settle_part(state, command.session, settlement, part, spans)
    return Answered(tuple(spans))


def _settle_part(
    state: LedgerState, session: int, settlement: Settlement, ids: Ids, spans: list[Span]
) -> None:
    for part, count, value in cut(ids, state.states.spans(ids)):
        if value is None:
            for _, number, outcome in state.unknown(part):
                # NEW: no claim is open under any fence, so this one cannot be.
                put(spans, number, Outcome.FENCED if outcome is Outcome.NEW else outcome)
        elif value.fence != settlement.fence:
            put(spans, count, Outcome.FENCED)
        elif isinstance(value, OpenClaim):
            if value.session != session:
                put(spans, count, Outcome.FENCED)
            else:
                _close(state, settlement, part, count, value)
                put(spans, count, Outcome.SETTLED)
        elif isinstance(value, Suspect):
            put(spans, count, _settle_late(state, session, settlement, part, count, value))
        else:
            put(spans, count, Outcome.SETTLED if _repeated(settlement, value) else Outcome.FENCED)


def _close(state: LedgerState, settlement: Settlement, ids: Ids, count: int, claim: OpenClaim) -> None:
    result = settlement.result
    if result is Result.DONE:
        state.execute(ids, count, claim)
        return
    if result is Result.DOUBT:
        _doubt(state, ids, count, claim)
        return
    now = state.now_ms
    if result is Result.DEAD:
        state.move(ids, count, claim, Dead(claim.fence, claim.attempt, now))
        return
    if result is Result.RETRY:
        waiting = Waiting(claim.fence, claim.attempt + 1, now + settlement.delay_ms, "retry", now)
    else:
        waiting = Waiting(claim.fence, claim.attempt, now, "released", now)
    state.move(ids, count, claim, waiting)
    state.events.append(Freed(ids))


def _doubt(state: LedgerState, ids: Ids, count: int, claim: OpenClaim) -> None:
    session = state.sessions.get(claim.session)
    if session is None:
        raise LedgerCorrupt(f"fence {claim.fence} is claimed by session {claim.session}, which is not live")
    suspect = Suspect(
        fence=claim.fence,
        session=session.session,
        node=session.node,
        incarnation=session.incarnation,
        attempt=claim.attempt,
        why="doubt",
        since_ms=state.now_ms,
        testified=(session.incarnation,),
    )
    state.move(ids, count, claim, suspect)
    state.events.append(Suspected(ids, claim.fence, session.node, session.incarnation, "doubt"))
    state.events.append(Testified(ids, claim.fence, session.node, Fact.STARTED))


def _settle_late(
    state: LedgerState, session: int, settlement: Settlement, ids: Ids, count: int, suspect: Suspect
) -> Outcome:
    if suspect.session != session:
        return Outcome.FENCED
    word = _WORDS.get(settlement.result) or Word(Fact.FAILED, delay_ms=settlement.delay_ms)
    taken = take_word(state, ids, count, suspect, suspect.incarnation, word)
    if not taken:
        return Outcome.FENCED
    return Outcome.SETTLED if session in state.sessions else Outcome.LAPSED


def _repeated(settlement: Settlement, value: TaskValue) -> bool:
    """Whether this settlement (of the same fence) is what gave the id its value."""
    if isinstance(value, Dead):
        return settlement.result is Result.DEAD
    if isinstance(value, Waiting):
        return (settlement.result is Result.RETRY and value.how == "retry") or (
            settlement.result is Result.RELEASED and value.how == "released"
        )
    return False
