"""The story of one task, told in sentences from what is known of it (pure).

The facts come from four places that may disagree for a moment: the log (where it stands), the ledger (what
holds now), each node's work history (what ran there) and each node's list of what the ledger decided.
Sentences come in the order of time; within the ledger's decisions, in the order of the Raft log, which is the
true one. Nothing is invented: where a fact is missing the sentence says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from dedup.ids import TaskId, id_text
from node.records_model import Attempt, Ending, EventKind, RecordedEvent
from oncekeeper.envelope import time_text
from raft.ledger import TaskState


class Place(msgspec.Struct, frozen=True):
    """Where the task stands in the log, and whether the committed position has passed it."""

    partition: int
    offset: int
    passed: bool


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known. Times are epoch milliseconds; 0 is unknown."""

    id: TaskId
    state: str  # what people are told
    standing: TaskState  # in the ledger
    due_in_ms: int = 0  # "delayed"
    handler: str = ""
    queue: str = ""
    key: str = ""
    submitted_ms: int = 0
    submitted_by: str = ""
    due_ms: int = 0
    places: tuple[Place, ...] = ()
    aside: str = ""  # "dead" or "suspect": it lies aside, for this reason:
    aside_reason: str = ""
    attempts: tuple[Attempt, ...] = ()
    events: tuple[RecordedEvent, ...] = ()
    unreachable: tuple[str, ...] = ()  # nodes whose history is missing here
    on_doubt: str = ""  # the handler's policy, where it is known
    queue_paused: bool = False
    stale: bool = False  # the ledger could not be asked for its latest


_SUSPECTED = {
    "lapsed": "its session lapsed (the node was lost, or cut off from the majority)",
    "replaced": "it was started anew before it had settled the task",
    "left": "it left the cluster before it had settled the task",
    "doubt": "its worker process died, or was killed, in the middle of the task",
}
_FREED = {
    "retry": "The last attempt failed.",
    "released": "Its last holder gave it back before it started.",
    "testimony": "Its last holder's word settled the doubt.",
    "ruled": "The ruling lets it run again.",
    "revived": "It was brought back by hand.",
}


def story(facts: Facts) -> list[str]:
    """Sentences in the order in which things happened; the last ones say how it stands now."""
    told = [*_submission(facts), *_history(facts), *_now(facts)]
    if facts.unreachable:
        missing = _and(facts.unreachable)
        told.append(f"No answer came from {missing}, so what only {missing} knew is missing here.")
    if facts.stale:
        told.append("The ledger had no quorum to ask; this is what the node that answered knew last.")
    return told


# --- how it came --------------------------------------------------------------------------------------------


def _submission(facts: Facts) -> Iterable[str]:
    name = f"Task {id_text(facts.id)}"
    if not facts.handler:
        if facts.attempts:
            first = facts.attempts[0]
            yield f"{name} is a task of {first.handler} in queue {first.queue}; its message is no longer kept."
        else:
            yield f"{name}: its message is not in the log, and no history of it is kept."
        return
    key = f", under the key {facts.key!r}," if facts.key else ""
    by = f" by {facts.submitted_by}" if facts.submitted_by else ""
    at = (
        f" at {_time(facts.submitted_ms)}"
        if facts.submitted_ms
        else " at a time that its message does not tell"
    )
    yield f"{name} was submitted to {facts.handler} in queue {facts.queue}{key}{at}{by}."
    if facts.due_ms:
        yield f"It was not to start before {_time(facts.due_ms)}."
    if facts.places:
        spots = _and([f"partition {place.partition} at offset {place.offset}" for place in facts.places])
        passed = all(place.passed for place in facts.places)
        times = (
            "" if len(facts.places) == 1 else f" {_times(len(facts.places))}, which one claim makes harmless"
        )
        verb = "has passed" if passed else "has not passed"
        it = "it" if len(facts.places) == 1 else "all of them"
        yield f"It stands in the log{times}: {spots}; the committed position {verb} {it}."
    elif facts.aside:
        yield "Its place in the log is gone; its message lies aside."


# --- what happened ------------------------------------------------------------------------------------------


def _history(facts: Facts) -> Iterable[str]:
    """Attempts and decisions, merged: a decision about a fence comes after the attempt of that fence."""
    events = sorted(facts.events, key=lambda event: (event.index, event.number))
    attempts = sorted(facts.attempts, key=lambda attempt: (attempt.fence, attempt.ended_ms))
    told: set[int] = set()
    for event in events:
        # A fence is the index of its claim: what was claimed before this decision happened before it.
        while attempts and attempts[0].fence <= event.index:
            attempt = attempts.pop(0)
            told.add(attempt.fence)
            yield from _attempt(attempt)
        yield from _event(event, told)
    for attempt in attempts:
        yield from _attempt(attempt)


def _attempt(a: Attempt) -> Iterable[str]:
    claimed = f" at {_time(a.claimed_ms)}" if a.claimed_ms else ""
    yield f"Node {a.node} claimed it{claimed} with fence {a.fence}, for attempt {a.attempt}."
    if a.ending is Ending.RELEASED:
        yield "It never started there: the claim was given back, and the attempt does not count."
        return
    started = (
        f"It started at {_time(a.started_ms)}" if a.started_ms else "When it started is not recorded; it"
    )
    took = f", after {_span(a.ended_ms - a.started_ms)}" if a.started_ms and a.ended_ms else ""
    joint = " and" if a.started_ms else ""
    match a.ending:
        case Ending.DONE:
            yield f"{started}{joint} finished{took}."
        case Ending.RETRY:
            yield f"{started}{joint} failed{took}: {_line(a.error)}. Another attempt was allowed."
        case Ending.DEAD:
            yield f"{started}{joint} failed for good{took}: {_line(a.error)}. It became a dead letter."
        case Ending.DOUBT:
            when = took or (f" at {_time(a.ended_ms)}" if a.ended_ms else "")
            yield f"{started}{joint} was lost{when}: {_line(a.error)}. Whether it took effect was in doubt."
        case Ending.LAPSED:
            yield f"{started}{joint} ended{took}, but the node's session had lapsed: what it said is testimony."


def _event(event: RecordedEvent, told: set[int]) -> Iterable[str]:
    at = f" at {_time(event.at_ms)}" if event.at_ms else ""
    match event.kind:
        case EventKind.SUSPECTED:
            if event.fence not in told:
                told.add(event.fence)
                yield f"Node {event.node} claimed it with fence {event.fence}, and left no record of that attempt."
            why = _SUSPECTED.get(event.what, event.what)
            yield f"The claim of node {event.node} (fence {event.fence}) was lost{at}: {why}. It became a suspect."
        case EventKind.TESTIFIED:
            yield _testimony(event, at)
        case EventKind.RESOLVED:
            yield _ruling(event, at)
        case EventKind.CANCELLED:
            yield f"It was cancelled{at}{_by(event.by)}, before it started."
        case EventKind.REVIVED:
            yield f"It was allowed to run again{at}{_by(event.by)}, from attempt 1."


def _testimony(event: RecordedEvent, at: str) -> str:
    saw = {
        "never started": "that it had never started there",
        "started": "that it had started there, and not how it ended",
        "finished": "that it had finished there",
        "failed": "that it had failed there",
    }.get(event.what, event.what)
    return f"Node {event.node} testified{at} about fence {event.fence} from its work journal: {saw}."


def _ruling(event: RecordedEvent, at: str) -> str:
    why = f" ({_line(event.reason)})" if event.reason else ""
    by = {
        "testimony": "That testimony",
        "check": "The handler's check",
        "policy:rerun": "The handler's policy on doubt, rerun,",
        "policy:skip": "The handler's policy on doubt, skip,",
        "policy:hold": "The handler's policy on doubt, hold,",
    }.get(event.by, f"{event.by or 'Somebody'}")
    if event.by.startswith("human:"):
        by = event.by.removeprefix("human:") + ", a human,"
    match event.what:
        case "executed":
            return f"{by} settled the doubt{at}: it counts as executed{why}."
        case "not executed":
            return f"{by} settled the doubt{at}: it had not taken effect{why}, so it may run again."
        case _:
            return f"{by} left it for a human to decide{at}{why}."


# --- how it stands now --------------------------------------------------------------------------------------


def _now(facts: Facts) -> Iterable[str]:
    now = facts.standing
    paused = f" Queue {facts.queue} is paused, so nothing of it starts." if facts.queue_paused else ""
    match facts.state:
        case "executed":
            yield "It is executed, for good: however often it is delivered, it will not run again."
        case "running":
            where = f"node {now.node}" if now.node else "a node"
            yield f"It is running now, or about to: {where} holds it with fence {now.fence}, attempt {now.attempt}."
        case "suspect":
            yield from _suspect(facts)
        case "dead":
            reason = f" ({_line(facts.aside_reason)})" if facts.aside == "dead" and facts.aside_reason else ""
            yield f"It is a dead letter{reason} after attempt {now.attempt}: only a manual retry runs it again."
        case "cancelled":
            yield f"It is cancelled{_by(now.by)}: it will never start, unless it is retried by hand."
        case "delayed":
            due = f", due in {_span(facts.due_in_ms)}" if facts.due_in_ms else ""
            freed = _FREED.get(now.why, "It is not due yet.")
            yield f"{freed} It waits for attempt {now.attempt or 1}{due}.{paused}"
        case "waiting":
            freed = _FREED.get(now.why, "")
            ready = "It waits for a node to claim it."
            if facts.aside and all(place.passed for place in facts.places):
                ready = "It is being put back into the log, to be claimed from there."
            yield f"{freed} {ready}{paused}".strip()
        case _:
            yield "The ledger has never heard of it, and it is not in the log."


def _suspect(facts: Facts) -> Iterable[str]:
    now = facts.standing
    if now.held_by:
        why = f" ({_line(now.held_reason)})" if now.held_reason else ""
        yield f"It is a suspect, held for a human{why}: it waits for `oncekeeper suspect rule {id_text(facts.id)}`."
        return
    asked = (
        f"node {now.node} has testified that it had started"
        if now.testified
        else f"node {now.node} has not testified yet"
    )
    next_step = {
        "check": "the handler's check decides next",
        "rerun": "the handler's policy is to run it again",
        "skip": "the handler's policy is never to run it again",
        "hold": "the handler's policy is to ask a human",
    }.get(facts.on_doubt, "the handler's policy decides next")
    yield f"It is a suspect: {asked}, and {next_step}. Until then it neither runs nor counts as done."


# --- words --------------------------------------------------------------------------------------------------


def _time(epoch_ms: int) -> str:
    text = time_text(epoch_ms)
    return text.replace("T", " ").replace("Z", " UTC") if text else "an unknown time"


def _span(milliseconds: int) -> str:
    if milliseconds < 1000:
        return f"{max(0, milliseconds)} ms"
    seconds = milliseconds / 1000
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def _line(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else "no reason was recorded"
    return first[:300].rstrip(".")


def _by(who: str) -> str:
    return f" by {who.removeprefix('human:')}" if who else ""


def _times(count: int) -> str:
    return {2: "twice"}.get(count, f"{count} times")


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
