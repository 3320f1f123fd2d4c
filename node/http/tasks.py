"""One task, from every side: what it is, how it stands, what happened, what came of it.

A task's facts are spread over the log, the ledger, and every node's history. They are gathered here once, for
the view, the story (node/why.py) and the result alike.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from aiohttp import web

from dedup.ids import TaskId, id_text, ids_of
from node import why
from node.facade import NodeFacade
from node.http import kept
from node.http.peers import ask_all
from node.http.status import fresh
from node.http.wire import ApiError, path_id, query_flag, query_int, reply, when
from node.records import Attempt, Ending, EventKind, RecordedEvent
from oncekeeper.envelope import TaskBatch, decode_task
from oncekeeper.errors import InvalidTask
from oncekeeper.log.port import Aside, Located, TaskLog
from raft.ledger import TaskState

WAIT_MS_MAX = 60_000
# An executed task's history may reach its node's records a moment after the ledger here knows of it.
RESULT_PAUSES_MS = (50, 50, 100, 200, 400, 600, 600)


class History(msgspec.Struct, frozen=True):
    """What one node remembers of one task; passes between nodes as JSON."""

    attempts: tuple[Attempt, ...] = ()
    events: tuple[RecordedEvent, ...] = ()


class Gathered(msgspec.Struct, frozen=True):
    facts: why.Facts
    batch: TaskBatch | None  # the message, as a single task
    standing: TaskState


def state_of(standing: TaskState, now_ms: int, in_log: bool) -> str:
    """The word that people are told; "unknown" where there is no such task."""
    match standing.state:
        case "claimed":
            return "running"
        case "waiting":
            return "delayed" if standing.due_ms > now_ms else "waiting"
        case "new" | "unallocated":
            return "waiting" if in_log else "unknown"
        case other:
            return other


def local_history(node: NodeFacade, task_id: TaskId) -> History:
    """Blocks on the disk: call it in a thread."""
    return History(tuple(node.records.attempts(task_id)), tuple(node.records.events(task_id)))


async def gather(node: NodeFacade, task_id: TaskId) -> Gathered:
    """Raises ApiError 404 where nobody knows the id."""
    is_fresh = await fresh(node)
    history, (answers, silent), (places, aside, committed, kept_ms) = await asyncio.gather(
        asyncio.to_thread(local_history, node, task_id),
        ask_all(node, f"/v1/tasks/{id_text(task_id)}?local=1"),
        node.with_log(lambda log: _in_log(log, task_id)),
    )
    histories = [history]
    for name, body in answers.items():
        try:
            histories.append(msgspec.convert(body, History))
        except msgspec.ValidationError as error:
            silent[name] = f"its history cannot be read: {error}"
    attempts, events = _united(histories)
    # The ledger last: what it says now is never older than what the others said.
    now_ms = node.ledger.now_ms
    standing = node.ledger.describe(task_id)
    batch = places[0].batch if places else _message_of(aside)
    state = state_of(standing, now_ms, batch is not None)
    due_ms = kept_ms or (batch.due_ms if batch is not None else 0)
    if state == "waiting" and standing.state in ("new", "waiting") and due_ms > _wall_ms():
        state = "delayed"
    if state == "unknown" and not attempts and not events and not aside:
        raise ApiError(404, f"no task {id_text(task_id)} is known", "id")
    handler = batch.handler if batch is not None else ""
    info = node.handlers.get(handler)
    facts = why.Facts(
        id=task_id,
        state=state,
        standing=standing,
        due_in_ms=_due_in_ms(state, standing, now_ms, due_ms),
        handler=handler,
        queue=batch.queue if batch is not None else "",
        key=batch.keys[0] if batch is not None and batch.keys else "",
        submitted_ms=batch.submitted_ms if batch is not None else 0,
        submitted_by=batch.submitted_by if batch is not None else "",
        due_ms=due_ms,
        places=tuple(
            why.Place(place.partition, place.offset, place.offset < committed.get(place.partition, 0))
            for place in places
        ),
        aside=aside[0].kind if aside else "",
        aside_reason=aside[0].reason if aside else "",
        attempts=attempts,
        events=events,
        unreachable=tuple(sorted(silent)),
        on_doubt=info.on_doubt if info is not None else "",
        queue_paused=batch is not None and node.ledger.paused(batch.queue),
        stale=not is_fresh,
    )
    return Gathered(facts, batch, standing)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


def _due_in_ms(state: str, standing: TaskState, now_ms: int, due_ms: int) -> int:
    """Until it may run: by the ledger's word on a retry, and by the time that it waits for."""
    if state != "delayed":
        return 0
    retry_ms = standing.due_ms - now_ms if standing.state == "waiting" else 0
    return max(0, retry_ms, due_ms - _wall_ms() if due_ms else 0)


def _in_log(log: TaskLog, task_id: TaskId) -> tuple[list[Located], list[Aside], dict[int, int], int]:
    aside = log.find_aside(ids_of([task_id]))
    return log.find(task_id), aside, log.committed(), kept.present_due(log, task_id)


def _message_of(aside: list[Aside]) -> TaskBatch | None:
    for task in aside:
        try:
            return decode_task(task.message)
        except InvalidTask:
            continue  # it lies aside because it cannot be decoded; its reason is told instead
    return None


def _united(histories: list[History]) -> tuple[tuple[Attempt, ...], tuple[RecordedEvent, ...]]:
    """Every node records the ledger's decisions; each is wanted once, by its place in the Raft log."""
    attempts = {(a.fence, a.attempt, a.node, a.ended_ms): a for h in histories for a in h.attempts}
    events: dict[tuple[int, int], RecordedEvent] = {}
    for event in (e for h in histories for e in h.events):
        place = (event.index, event.number)
        known = events.get(place)
        # The earliest time is the nearest to when it was decided: a node that was down applies it later.
        if known is None or event.at_ms < known.at_ms:
            events[place] = event
    return tuple(attempts[key] for key in sorted(attempts)), tuple(events[key] for key in sorted(events))


# --- views --------------------------------------------------------------------------------------------------


async def get_task(node: NodeFacade, request: web.Request) -> web.Response:
    task_id = path_id(request)
    if query_flag(request, "local"):
        return reply(await asyncio.to_thread(local_history, node, task_id))
    return reply(view(await gather(node, task_id)))


async def get_why(node: NodeFacade, request: web.Request) -> web.Response:
    found = await gather(node, path_id(request))
    return reply({**view(found), "story": why.story(found.facts)})


def view(found: Gathered) -> dict[str, Any]:
    facts, batch, standing = found.facts, found.batch, found.standing
    return {
        "id": id_text(facts.id),
        "state": facts.state,
        "queue": facts.queue or None,
        "handler": facts.handler or None,
        "key": facts.key or None,
        "body": msgspec.Raw(batch.bodies[0]) if batch is not None else None,
        "ttr_ms": batch.ttr_ms if batch is not None else None,
        "traceparent": (batch.traceparent or None) if batch is not None else None,
        "due": when(facts.due_ms),
        "submitted": when(facts.submitted_ms),
        "submitted_by": facts.submitted_by or None,
        "attempt": standing.attempt or None,
        "fence": standing.fence or None,
        "node": standing.node or None,
        "due_in_ms": facts.due_in_ms,
        "held": bool(standing.held_by),
        "log": [msgspec.to_builtins(place) for place in facts.places],
        "aside": {"kind": facts.aside, "reason": facts.aside_reason} if facts.aside else None,
        "attempts": [attempt_view(attempt) for attempt in facts.attempts],
        "events": [event_view(event) for event in facts.events],
        "unreachable": list(facts.unreachable),
        "stale": facts.stale,
    }


def attempt_view(attempt: Attempt) -> dict[str, Any]:
    return {
        "attempt": attempt.attempt,
        "fence": attempt.fence,
        "node": attempt.node,
        "claimed": when(attempt.claimed_ms),
        "started": when(attempt.started_ms),
        "ended": when(attempt.ended_ms),
        "ending": attempt.ending.name.lower(),
        "result": msgspec.Raw(attempt.results[0]) if attempt.results else None,
        "error": attempt.error or None,
        "trace": attempt.trace or None,
    }


def event_view(event: RecordedEvent) -> dict[str, Any]:
    return {
        "index": event.index,
        "kind": event.kind.name.lower(),
        "at": when(event.at_ms),
        "fence": event.fence or None,
        "node": event.node or None,
        "what": event.what or None,
        "by": event.by or None,
        "reason": event.reason or None,
    }


# --- results ------------------------------------------------------------------------------------------------


async def get_result(node: NodeFacade, request: web.Request) -> web.Response:
    task_id = path_id(request)
    wait_ms = query_int(request, "wait_ms", 0, 0, WAIT_MS_MAX)
    standing = node.ledger.describe(task_id)
    if standing.state not in ("executed", "dead", "cancelled"):
        if standing.state in ("new", "unallocated"):
            await _must_exist(node, task_id)
        if wait_ms:
            await node.wait_settled(task_id, wait_ms)
        else:
            await fresh(node)
        standing = node.ledger.describe(task_id)
    state = state_of(standing, node.ledger.now_ms, in_log=True)
    answer = {
        "id": id_text(task_id),
        "state": state,
        "done": False,
        "known": False,
        "result": None,
        "error": None,
    }
    match state:
        case "executed":
            return reply(answer | {"done": True} | await _result(node, task_id))
        case "dead":
            return reply(answer | {"done": True, "error": await _last_error(node, task_id)})
        case "cancelled":
            return reply(answer | {"done": True, "error": "it was cancelled before it started"})
        case _:
            return reply(answer)


async def _must_exist(node: NodeFacade, task_id: TaskId) -> None:
    """An id of which the ledger knows nothing is a task only if it is in the log."""
    if await node.with_log(lambda log: bool(log.find(task_id)) or bool(log.find_aside(ids_of([task_id])))):
        return
    await fresh(node)
    if node.ledger.describe(task_id).state in ("new", "unallocated"):
        raise ApiError(404, f"no task {id_text(task_id)} is known", "id")


async def _result(node: NodeFacade, task_id: TaskId) -> dict[str, Any]:
    """Of the attempt that is known to have finished. Its own node remembers it; no other does."""
    silent: dict[str, str] = {}
    by_evidence = await asyncio.to_thread(_settled_by_evidence, node, task_id)
    for pause_ms in (*RESULT_PAUSES_MS, 0):
        attempts, silent = await _attempts(node, task_id)
        finished = [a for a in attempts if a.ending is Ending.DONE]
        # A session that lapsed in the end: its word was taken as testimony, and its result is the result.
        finished = finished or [a for a in attempts if a.ending is Ending.LAPSED and not a.error]
        if finished:
            last = finished[-1]
            if (
                last.error and not last.results
            ):  # done all the same; of DONE, an error says why no result was kept
                return {"known": False, "note": f"it took effect, and {last.error}", "unreachable": []}
            return {"known": True, "result": msgspec.Raw(last.results[0]) if last.results else None}
        if silent:
            break  # it may be theirs to tell, and each look costs their whole timeout: the caller asks again
        if by_evidence or not pause_ms:
            break  # nobody is going to tell
        await asyncio.sleep(pause_ms / 1000)
    missing = f" (no answer from {', '.join(sorted(silent))})" if silent else ""
    note = "it is executed, and no result is recorded: it was settled by evidence, or its history is lost"
    return {"known": False, "note": note + missing, "unreachable": sorted(silent)}


def _settled_by_evidence(node: NodeFacade, task_id: TaskId) -> bool:
    """Every node records the ledger's decisions, this one too. Blocks on the disk."""
    events = node.records.events(task_id)
    return any(event.kind is EventKind.RESOLVED and event.what == "executed" for event in events)


async def _last_error(node: NodeFacade, task_id: TaskId) -> str:
    attempts, _ = await _attempts(node, task_id)
    for attempt in reversed(attempts):
        if attempt.error:
            return attempt.error
    aside = await node.with_log(lambda log: log.find_aside(ids_of([task_id])))
    return aside[0].reason if aside else "no reason is recorded"


async def _attempts(node: NodeFacade, task_id: TaskId) -> tuple[tuple[Attempt, ...], dict[str, str]]:
    mine = await asyncio.to_thread(local_history, node, task_id)
    if any(attempt.ending is Ending.DONE for attempt in mine.attempts):
        return mine.attempts, {}
    answers, silent = await ask_all(node, f"/v1/tasks/{id_text(task_id)}?local=1")
    histories = [mine]
    for name, body in answers.items():
        try:
            histories.append(msgspec.convert(body, History))
        except msgspec.ValidationError as error:
            silent[name] = f"its history cannot be read: {error}"
    return _united(histories)[0], silent
