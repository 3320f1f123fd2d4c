"""Invariant 3: claim and settle of each id are linearizable.

Each node saw its own claims and settles as operations with a call and a return. They are linearizable if there is
one order of all of them that fits a sequential model and in which nobody takes effect before its call or after its
return (Herlihy and Wing, 1990). Searched as by Wing and Gong ("Testing and Verifying Concurrent Objects", 1993)
with the memo of Lowe ("Testing for linearizability", 2017): a set of operations done and the state it led to are
tried once. Knossos and Porcupine do the same; Porcupine's cut by key is ours by id (Herlihy and Wing's locality).

What no node asked for (a lapse, a ruling) is taken from the ledger's log as an operation that happened some time
before it was first seen. So are claims and settles of which no answer was recorded: their caller was killed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from chaos import history as h
from chaos.checkers.life import State
from chaos.history import History
from dedup.ids import TaskId, id_text
from raft.commands import Outcome, Result, Verdict

S = TypeVar("S", bound=Hashable)

NEVER = 1 << 63


@dataclass(frozen=True)
class Timed(Generic[S]):
    """``step`` gives the states that this operation, with the answer it got, may lead to from one; none: it does
    not fit there."""

    called: int
    returned: int  # NEVER: it may have happened at any time since, or not at all
    step: Callable[[S], Iterable[S]]
    name: str = ""


def linearizable(operations: Sequence[Timed[S]], start: S) -> list[str]:
    """Empty if there is such an order; else the names of the longest part that could be ordered."""
    must = sum(1 << at for at, each in enumerate(operations) if each.returned != NEVER)
    seen: set[tuple[int, S]] = set()
    stack: list[tuple[int, S]] = [(0, start)]
    best = 0
    while stack:
        done, state = stack.pop()
        if done & must == must:
            return []
        if done.bit_count() > best.bit_count():
            best = done
        left = [at for at in range(len(operations)) if not done >> at & 1]
        # Whatever returned first must be ordered before anything that was called later.
        horizon = min(operations[at].returned for at in left)
        for at in left:
            if operations[at].called > horizon:
                continue
            for after in operations[at].step(state):
                known = (done | 1 << at, after)
                if known not in seen:
                    seen.add(known)
                    stack.append(known)
    left_names = [each.name for at, each in enumerate(operations) if not best >> at & 1 and each.name]
    return left_names or ["(unnamed)"]


# --- the model of one id ------------------------------------------------------------------------------------------

Id = tuple[State, int, int]
"""State, the fence of its last claim, and whose claim that is (0 where nobody's is open)."""

FRESH: Id = (State.NEW, 0, 0)
CLOSED = {
    Outcome.EXECUTED: State.EXECUTED,
    Outcome.CANCELLED: State.CANCELLED,
    Outcome.DEAD: State.DEAD,
    Outcome.SUSPECT: State.SUSPECT,
}
SETTLED = {
    Result.DONE: State.EXECUTED,
    Result.RETRY: State.WAITING,
    Result.DEAD: State.DEAD,
    Result.DOUBT: State.SUSPECT,
    Result.RELEASED: State.WAITING,
}


def claim_step(session: int, outcome: Outcome, granted: int) -> Callable[[Id], Iterable[Id]]:
    def step(at: Id) -> Iterable[Id]:
        state, fence, holder = at
        if outcome is Outcome.GRANTED:
            if state in (State.NEW, State.WAITING) and granted > fence:
                yield State.CLAIMED, granted, session
            elif state is State.CLAIMED and (fence, holder) == (granted, session):
                yield at  # asked again by the same session
        elif outcome is Outcome.HELD:
            if state is State.CLAIMED and holder != session:
                yield at
        elif outcome in CLOSED:
            if state is CLOSED[outcome]:
                yield at
        elif outcome is Outcome.EARLY:
            if state is State.WAITING:
                yield at
        elif outcome is Outcome.UNALLOCATED:
            if state is State.NEW:
                yield at
        else:
            yield at  # LAPSED and STALE speak of the session and of attempts: not of this state

    return step


def settle_step(session: int, under: int, result: Result, outcome: Outcome) -> Callable[[Id], Iterable[Id]]:
    def step(at: Id) -> Iterable[Id]:
        state, fence, holder = at
        if outcome is Outcome.SETTLED:
            if fence != under:
                return
            if state is State.CLAIMED and holder == session:
                yield SETTLED[result], fence, 0
            elif state is not State.CLAIMED:
                yield at  # said again; or a live session's word on its own suspect: the ruling that follows tells
        elif outcome in CLOSED:
            if state is CLOSED[outcome]:
                yield at
        elif outcome is Outcome.FENCED:
            if fence != under or holder != session or state is not State.CLAIMED:
                yield at
        else:
            yield at

    return step


def decided_step(decision: h.Decision) -> Callable[[Id], Iterable[Id]]:
    def step(at: Id) -> Iterable[Id]:
        state, fence, _ = at
        match decision:
            case h.Claimed(session=session):
                yield from claim_step(session, Outcome.GRANTED, decision.fence)(at)
            case h.Settled(result=result):
                if fence == decision.fence:
                    yield (SETTLED[result], fence, 0) if state is State.CLAIMED else at
            case h.Suspected():
                # After a settle that said "in doubt" it is one already.
                if state in (State.CLAIMED, State.SUSPECT) and fence == decision.fence:
                    yield State.SUSPECT, fence, 0
            case h.Ruled(verdict=verdict):
                if state is State.SUSPECT and fence == decision.fence:
                    if verdict is Verdict.EXECUTED:
                        yield State.EXECUTED, fence, 0
                    elif verdict is Verdict.NOT_EXECUTED:
                        yield State.WAITING, fence, 0
                        yield State.DEAD, fence, 0  # it was the last try
                    else:
                        yield at
            case h.Cancelled():
                if state in (State.NEW, State.WAITING):
                    yield State.CANCELLED, fence, 0
            case h.Revived():
                if state in (State.DEAD, State.CANCELLED):
                    yield State.WAITING, fence, 0
            case h.Testified():
                yield at

    return step


def claims_and_settles_are_linearizable(history: History) -> list[str]:
    """3: for each id there is an order of the claims and settles, as the nodes saw them, that fits the model."""
    by_id: dict[TaskId, list[Timed[Id]]] = defaultdict(list)
    told: set[tuple[str, TaskId, int]] = set()
    for each in history.operations:
        if each.outcome is None:
            continue  # what it did, if anything, stands in the ledger's log
        step = (
            claim_step(each.session, each.outcome, each.fence)
            if each.kind == "CLAIM"
            else settle_step(each.session, each.fence, each.result or Result.DONE, each.outcome)
        )
        name = f"{each.kind} of session {each.session} under {each.fence}: {each.outcome.name}"
        by_id[each.id].append(Timed(each.called_ns, each.returned_ns, step, name))
        if each.outcome in (Outcome.GRANTED, Outcome.SETTLED, Outcome.LAPSED):
            told.add((each.kind, each.id, each.fence))
    if not by_id:
        return []
    for decision in history.decisions:
        kind = "CLAIM" if isinstance(decision, h.Claimed) else "SETTLE"
        if isinstance(decision, h.Claimed | h.Settled) and (kind, decision.id, decision.fence) in told:
            continue
        timed = Timed(0, decision.t_ns or NEVER, decided_step(decision), str(decision))
        by_id[decision.id].append(timed)
    wrong = []
    for task_id, operations in by_id.items():
        if left := linearizable(operations, FRESH):
            wrong.append(f"{id_text(task_id)}: no order fits; left over: {'; '.join(left[:3])}")
    return wrong
