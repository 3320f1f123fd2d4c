"""What the ledger knows beside claims: id ranges, cancellations, queues, handler classes."""

from __future__ import annotations

import msgspec

from dedup.claims import Cancelled, Dead, OpenClaim, Waiting, cut, repeats, single_parts
from dedup.ids import RANGE_ID_MAX, Ids
from dedup.suspects import Suspect
from raft.commands import (
    Allocated,
    AllocateIds,
    Answered,
    Cancel,
    Deleted,
    Done,
    Freed,
    Hold,
    Outcome,
    PutClass,
    PutQueue,
    QueueChanged,
    Revive,
    Span,
)
from raft.ledger_state import (
    HandlerClass,
    LedgerState,
    QueueSetting,
    check_name,
    check_number,
    check_text,
    put,
    reject,
)

KINDS = ("cpu", "io")
HOLD_MS_MAX = 60_000
LENGTHS = ("short", "long")


def allocate_ids(state: LedgerState, command: AllocateIds) -> Allocated:
    check_number("count", command.count, 1, state.settings.range_ids_max)
    start = state.next_id
    if start + command.count - 1 > RANGE_ID_MAX:
        reject(f"count={command.count} must fit into the {RANGE_ID_MAX - start + 1} range ids that are left")
    state.next_id = start + command.count
    return Allocated(start, command.count)


def cancel(state: LedgerState, command: Cancel) -> Answered:
    """What was never started (or waits for a retry) never will be."""
    state.check_ids("ids", command.ids)
    check_text("by", command.by)
    state.check_room("ids", command.ids)
    spans: list[Span] = []
    for single in single_parts(command.ids) if repeats(command.ids) else (command.ids,):
        _cancel_part(state, single, Cancelled(0, command.by, state.now_ms), spans)
    return Answered(tuple(spans))


def _cancel_part(state: LedgerState, ids: Ids, cancelled: Cancelled, spans: list[Span]) -> None:
    for part, count, value in cut(ids, state.states.spans(ids)):
        if value is None:
            for fresh, number, outcome in state.unknown(part):
                if outcome is Outcome.NEW:
                    state.move(fresh, number, None, cancelled)
                    state.events.append(Deleted(fresh, cancelled.by))
                    outcome = Outcome.SETTLED
                put(spans, number, outcome)
        elif isinstance(value, Waiting):
            state.move(part, count, value, Cancelled(value.fence, cancelled.by, cancelled.at_ms))
            state.events.append(Deleted(part, cancelled.by))
            put(spans, count, Outcome.SETTLED)
        elif isinstance(value, Cancelled):
            put(spans, count, Outcome.SETTLED)
        elif isinstance(value, Dead):
            put(spans, count, Outcome.DEAD)
        else:
            put(spans, count, Outcome.BUSY)


def revive(state: LedgerState, command: Revive) -> Answered:
    """What is dead or cancelled may run again, from attempt 1."""
    state.check_ids("ids", command.ids)
    check_text("by", command.by)
    now = state.now_ms
    spans: list[Span] = []
    for single in single_parts(command.ids) if repeats(command.ids) else (command.ids,):
        for part, count, value in cut(single, state.states.spans(single)):
            if value is None:
                for _, number, outcome in state.unknown(part):
                    put(spans, number, outcome)
            elif isinstance(value, Dead | Cancelled):
                state.move(part, count, value, Waiting(value.fence, 1, now, "revived", now))
                state.events.append(Freed(part))
                put(spans, count, Outcome.SETTLED)
            elif isinstance(value, OpenClaim | Suspect):
                put(spans, count, Outcome.BUSY)
            else:
                # A repeat finds its own work done; any other wait for an attempt is left as it is.
                put(spans, count, Outcome.SETTLED if value.how == "revived" else Outcome.NEW)
    return Answered(tuple(spans))


def hold(state: LedgerState, command: Hold) -> Answered:
    """What has not started, or waits for a retry, waits a little longer; or no longer."""
    state.check_ids("ids", command.ids)
    check_number("hold_ms", command.hold_ms, 0, HOLD_MS_MAX)
    state.check_room("ids", command.ids)
    until_ms = state.now_ms + command.hold_ms
    spans: list[Span] = []
    for single in single_parts(command.ids) if repeats(command.ids) else (command.ids,):
        for part, count, value in cut(single, state.states.spans(single)):
            if value is None:
                for fresh, number, outcome in state.unknown(part):
                    if outcome is Outcome.NEW:
                        outcome = Outcome.SETTLED
                        if command.hold_ms:
                            state.move(fresh, number, None, Waiting(0, 1, until_ms, "held", state.now_ms))
                    put(spans, number, outcome)
            elif isinstance(value, OpenClaim | Suspect):
                put(spans, count, Outcome.BUSY)
            elif isinstance(value, Dead | Cancelled):
                put(spans, count, Outcome.DEAD if isinstance(value, Dead) else Outcome.CANCELLED)
            else:
                due_ms = max(value.due_ms, until_ms) if command.hold_ms else min(value.due_ms, until_ms)
                if due_ms != value.due_ms:
                    state.move(part, count, value, msgspec.structs.replace(value, due_ms=due_ms))
                    if not command.hold_ms:
                        state.events.append(Freed(part))
                put(spans, count, Outcome.SETTLED)
    return Answered(tuple(spans))


def put_queue(state: LedgerState, command: PutQueue) -> Done:
    check_name("queue", command.queue)
    check_text("by", command.by)
    known = state.queues.get(command.queue)
    if known is None and len(state.queues) >= state.settings.queues_max:
        reject(f"queue: {len(state.queues)} queues are known, as many as queues_max allows")
    if known is None or known.paused != command.paused:
        state.queues[command.queue] = QueueSetting(command.paused, command.by, state.now_ms)
        if command.paused or known is not None:
            state.events.append(QueueChanged(command.queue, command.paused))
    return Done()


def put_class(state: LedgerState, command: PutClass) -> Done:
    check_name("handler", command.handler)
    if command.kind not in KINDS:
        reject(f"kind must be one of {', '.join(KINDS)}")
    if command.length not in LENGTHS:
        reject(f"length must be one of {', '.join(LENGTHS)}")
    if command.handler not in state.classes and len(state.classes) >= state.settings.classes_max:
        reject(f"handler: {len(state.classes)} classes are known, as many as classes_max allows")
    state.classes[command.handler] = HandlerClass(command.kind, command.length)
    return Done()
