"""What may be asked of a ledger: pure reads of the state at its applied index."""

from __future__ import annotations

import msgspec

from dedup.claims import Dead, OpenClaim, Waiting, cut
from dedup.ids import Ids, TaskId
from dedup.suspects import Suspect, SuspectRun, ordered
from raft.commands import Outcome, Span
from raft.ledger_state import LedgerState, put
from raft.ledger_suspects import standing


class TaskState(msgspec.Struct, frozen=True):
    """What the ledger knows of one id. Times are ledger time; fields that a state does not have are 0 or empty."""

    state: str
    """new, unallocated, claimed, suspect, waiting, executed, dead, cancelled."""
    fence: int = 0
    """Of the last claim; an executed id does not keep it."""
    session: int = 0
    node: str = ""
    incarnation: int = 0
    attempt: int = 0
    """The one that is claimed, suspect or dead; of new and waiting the next one."""
    due_ms: int = 0
    since_ms: int = 0
    why: str = ""
    """How it came there: of a suspect lapsed, replaced, left, doubt; of waiting retry, released, testimony, ruled,
    revived, held."""
    by: str = ""
    """Who cancelled it."""
    testified: tuple[int, ...] = ()
    """The incarnations of ``node`` that testified "started"."""
    held_by: str = ""
    held_reason: str = ""


def describe(state: LedgerState, task_id: TaskId) -> TaskState:
    value = state.states.get(task_id)
    if value is None:
        ids = Ids((), (task_id,)) if isinstance(task_id, bytes) else Ids(((task_id, 1),))
        ((_, _, outcome),) = state.unknown(ids)
        return TaskState(outcome.name.lower(), attempt=1 if outcome is Outcome.NEW else 0)
    if isinstance(value, OpenClaim):
        holder = state.sessions[value.session]
        return TaskState(
            "claimed", value.fence, value.session, holder.node, holder.incarnation, value.attempt
        )
    if isinstance(value, Suspect):
        return TaskState(
            "suspect",
            value.fence,
            value.session,
            value.node,
            value.incarnation,
            value.attempt,
            since_ms=value.since_ms,
            why=value.why,
            testified=value.testified,
            held_by=value.held_by,
            held_reason=value.held_reason,
        )
    if isinstance(value, Waiting):
        return TaskState(
            "waiting",
            value.fence,
            attempt=value.attempt,
            due_ms=value.due_ms,
            since_ms=value.at_ms,
            why=value.how,
        )
    if isinstance(value, Dead):
        return TaskState("dead", value.fence, attempt=value.attempt, since_ms=value.at_ms)
    return TaskState("cancelled", value.fence, since_ms=value.at_ms, by=value.by)


def classify(state: LedgerState, ids: Ids) -> tuple[Span, ...]:
    """What a Claim by a stranger would say, NEW for what it would be granted."""
    spans: list[Span] = []
    for part, count, value in cut(ids, state.states.spans(ids)):
        if value is None:
            for _, number, outcome in state.unknown(part):
                put(spans, number, outcome)
        elif isinstance(value, Waiting) and value.due_ms > state.now_ms:
            put(spans, count, Outcome.EARLY, 0, value.due_ms - state.now_ms)
        else:
            put(spans, count, *standing(value))
    return tuple(spans)


def suspicions(state: LedgerState, ids: Ids) -> list[tuple[int, Suspect | None]]:
    """Run-length over the order of the ids: the suspect that stands there, None where none does."""
    found: list[tuple[int, Suspect | None]] = []
    for count, value in state.states.spans(ids):
        found.append((count, value if isinstance(value, Suspect) else None))
    return found


def all_suspects(state: LedgerState) -> list[SuspectRun]:
    """Every suspect in canonical order."""
    return ordered(entry for node in sorted(state.suspects) for entry in _left_by(state, node))


def suspects_of(state: LedgerState, node: str) -> tuple[SuspectRun, ...]:
    """The suspects that this node left, in canonical order."""
    return tuple(ordered(iter(_left_by(state, node))))


def _left_by(state: LedgerState, node: str) -> list[tuple[Ids, Suspect]]:
    held = state.suspects.get(node)
    if held is None:
        return []
    return [
        (part, value)
        for fence in held.numbers()
        for part, _, value in state.under(held, fence)
        if isinstance(value, Suspect)
    ]
