"""Changing what will happen: cancel, retry, rule on suspects, pause and resume queues.

Each is one ledger command, so it either happened everywhere or not at all; 504 says that nobody knows yet,
and asking again is safe for each of them.

Why a retry is more than its command. A dead or cancelled task's place in the log was passed, and a revived
task that stands nowhere is lost. Appending again first and reviving second loses it too: an owner may read
the new place in between, see "dead", and pass it. So the ledger comes first, and what makes that safe is a
durable intent: the message lies *aside* before the task is revived (a dead letter does already; a cancelled
task is put there now), and the sweeper (node/sweeper.py) appends again whatever lies aside and may run:

    put aside -> Revive -> [sweeper] append again -> drop from aside

A crash after the first step leaves a copy of a task that is still dead: it is ignored. A crash after the
second leaves a task that may run and lies aside: the next sweep appends it. A crash after the third appends
it twice: one claim wins. A ruling "not executed" on a suspect that was put aside is the same chain, from its
second step.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from dedup.ids import TaskId, id_text, ids_of, parse_id
from node.facade import NodeFacade, OutcomeUnknown
from node.http import kept
from node.http.status import fresh
from node.http.tasks import state_of
from node.http.wire import (
    REASON_CHARS_MAX,
    ApiError,
    parse,
    path_id,
    query_int,
    query_text,
    reply,
    text,
)
from oncekeeper.envelope import TaskBatch, check_options, decode_task, encode_task
from oncekeeper.errors import InvalidTask, LogUnusable
from oncekeeper.log.port import Aside, TaskLog, UnknownAppend, Unsent
from raft.commands import (
    Answer,
    Answered,
    Cancel,
    Command,
    Outcome,
    PutQueue,
    Rejected,
    Revive,
    Rule,
    Span,
    Verdict,
)

PROPOSE_MS = 5000
SUSPECTS_MAX = 1000  # of one page
RULED_MAX = 10_000  # of one call
PAGE_DEFAULT = 100
NAMED_AT_ONCE = 20  # messages looked up in one go: the node's own work waits for the log's thread meanwhile


async def decide(node: NodeFacade, command: Command, what: str) -> Answer:
    """Propose one command. An unknown outcome becomes 504 here, because asking again is safe."""
    try:
        (answer,) = await node.propose((command,), PROPOSE_MS)
    except OutcomeUnknown as error:
        raise ApiError(
            504, f"{what} may or may not have happened; ask again, it is safe: {error}", None, unknown=True
        ) from error
    if isinstance(answer, Rejected):
        raise ApiError(400, answer.reason, answer.reason.partition(":")[0].split(" ")[0] or None)
    return answer


def spans_of(answer: Answer) -> tuple[Span, ...]:
    if not isinstance(answer, Answered):
        raise ApiError(503, f"the ledger answered {type(answer).__name__}", None, unknown=True)
    return answer.spans


class Who(msgspec.Struct, forbid_unknown_fields=True):
    by: str = ""

    def name(self) -> str:
        return text(self.by, "by") or "http"


def _state(node: NodeFacade, task_id: TaskId) -> str:
    return state_of(node.ledger.describe(task_id), node.ledger.now_ms, in_log=True)


# --- cancel and retry ---------------------------------------------------------------------------------------

_TOO_LATE = {
    "running": "it is running, or about to, and can no longer be stopped",
    "suspect": "its holder was lost and it may have run: rule on the suspect instead",
    "executed": "it is executed already",
    "dead": "it failed for good already; nothing of it will run",
    "cancelled": "it is cancelled; nothing of it will run",
}


async def post_cancel(node: NodeFacade, request: web.Request) -> web.Response:
    task_id = path_id(request)
    who = await parse(request, Who)
    answer = await decide(node, Cancel(ids_of([task_id]), who.name()), "the cancellation")
    outcome = spans_of(answer)[0].outcome
    if outcome is not Outcome.SETTLED:
        raise too_late(state_by(node, task_id, outcome), task_id, "cancel")
    try:
        # The ledger forgets some day that it was cancelled; a task that is due in a year must be gone by then.
        await node.with_log(lambda log: kept.forget(log, task_id))
    except (Unsent, UnknownAppend, LogUnusable) as error:
        raise ApiError(
            504,
            f"it is cancelled, and still kept for its due time; ask again, it is safe: {error}",
            None,
            unknown=True,
        ) from error
    return reply({"id": id_text(task_id), "outcome": "cancelled", "state": "cancelled"})


def state_by(node: NodeFacade, task_id: TaskId, outcome: Outcome) -> str:
    """The state that an answer of the ledger tells of; 404 for an id that nobody has."""
    if outcome is Outcome.UNALLOCATED:
        raise ApiError(404, f"no task {id_text(task_id)} is known", "id")
    if outcome in (Outcome.DEAD, Outcome.EXECUTED, Outcome.CANCELLED):
        return outcome.name.lower()
    state = _state(node, task_id)
    return (
        state if state in _TOO_LATE else "running"
    )  # it was when the ledger answered; it has moved on since


def too_late(state: str, task_id: TaskId, verb: str) -> ApiError:
    return ApiError(
        409,
        f"too late to {verb}: {_TOO_LATE[state]}",
        None,
        outcome="too late",
        state=state,
        id=id_text(task_id),
    )


async def post_retry(node: NodeFacade, request: web.Request) -> web.Response:
    task_id = path_id(request)
    by = (await parse(request, Who)).name()
    await fresh(node)
    state = node.ledger.describe(task_id).state
    if state not in ("dead", "cancelled"):
        raise _no_retry(node, task_id)
    # The command below decides whether it may; this makes sure of its message first.
    await node.with_log(lambda log: _lay_aside(log, task_id))
    answer = await decide(node, Revive(ids_of([task_id]), by), "the retry")
    if spans_of(answer)[0].outcome is not Outcome.SETTLED:
        raise _no_retry(node, task_id)
    return reply({"id": id_text(task_id), "outcome": "revived", "state": _state(node, task_id)})


def _no_retry(node: NodeFacade, task_id: TaskId) -> ApiError:
    standing = node.ledger.describe(task_id)
    state = state_of(standing, node.ledger.now_ms, in_log=True)
    if standing.state == "unallocated":
        return ApiError(404, f"no task {id_text(task_id)} is known", "id")
    words = {
        "executed": "it is executed, for good",
        "suspect": "it is a suspect: rule on it instead",
        "running": "it is running, or about to",
    }
    why = words.get(state, "it waits to run already")
    return ApiError(
        409, f"nothing to retry: {why}", None, outcome="not dead", state=state, id=id_text(task_id)
    )


def _lay_aside(log: TaskLog, task_id: TaskId) -> None:
    """Runs in the log's thread:

    the durable intent of a retry. ApiError where the message is gone or unusable.
    """
    unusable = ""
    for task in log.find_aside(ids_of([task_id])):
        if task.kind == "dead":
            try:
                decode_task(task.message)
            except InvalidTask as error:
                unusable = str(error)
            else:
                return
    places = log.find(task_id)
    if places:
        message = encode_task(places[-1].batch)
        log.put_aside([Aside("dead", task_id, message, "brought back by hand", time.time_ns() // 1_000_000)])
        return
    outcome = "undecodable" if unusable else "gone"
    why = f"its message cannot be decoded ({unusable})" if unusable else "its message is no longer kept"
    raise ApiError(409, f"{why}: submit a new task", "id", outcome=outcome)


# --- suspects -----------------------------------------------------------------------------------------------


async def get_suspects(node: NodeFacade, request: web.Request) -> web.Response:
    limit = query_int(request, "limit", PAGE_DEFAULT, 1, SUSPECTS_MAX)
    after = after_id(query_text(request, "after"))
    is_fresh = await fresh(node)
    rows, following = suspects_page(node, limit, after)
    for at in range(0, len(rows), NAMED_AT_ONCE):
        some = [parse_id(row["id"]) for row in rows[at : at + NAMED_AT_ONCE]]
        named = await node.with_log(lambda log, some=some: _messages(log, some))  # type: ignore[misc]
        for row, task_id in zip(rows[at : at + NAMED_AT_ONCE], some, strict=True):
            batch, reason = named.get(task_id, (None, None))
            row["handler"] = batch.handler if batch is not None else None
            row["queue"] = batch.queue if batch is not None else None
            row["reason"] = row["reason"] or reason
    counts = node.ledger.counts()
    return reply(
        {
            "suspects": rows,
            "next": following,
            "total": counts.suspect,
            "held": counts.held,
            "stale": not is_fresh,
        }
    )


def _messages(log: TaskLog, ids: list[TaskId]) -> dict[TaskId, tuple[TaskBatch | None, str | None]]:
    """Runs in the log's thread. Each task's message, and why it lies aside if it does."""
    found: dict[TaskId, tuple[TaskBatch | None, str | None]] = {}
    for task in log.find_aside(ids_of(ids)):
        if task.kind == "suspect":
            try:
                found[task.id] = (decode_task(task.message), task.reason)
            except InvalidTask:
                found[task.id] = (None, task.reason)  # the suspect itself is still worth showing
    for task_id in ids:
        if task_id not in found and (places := log.find(task_id)):
            found[task_id] = (places[-1].batch, None)
    return found


def suspects_page(
    node: NodeFacade, limit: int, after: TaskId | None
) -> tuple[list[dict[str, Any]], str | None]:
    rows: list[dict[str, Any]] = []
    for run in node.ledger.suspects(after, limit + 1):
        suspect = run.suspect
        for task_id in run.ids:
            rows.append(
                {
                    "id": id_text(task_id),
                    "fence": suspect.fence,
                    "node": suspect.node,
                    "incarnation": suspect.incarnation,
                    "attempt": suspect.attempt,
                    "why": suspect.why,
                    "since_ms_ago": max(0, node.ledger.now_ms - suspect.since_ms),
                    "testified_started": len(suspect.testified),
                    "held": bool(suspect.held_by),
                    "held_by": suspect.held_by or None,
                    "reason": suspect.held_reason or None,
                }
            )
    following = rows[limit - 1]["id"] if len(rows) > limit else None
    return rows[:limit], following


def after_id(given: str) -> TaskId | None:
    if not given:
        return None
    try:
        return parse_id(given)
    except ValueError as error:
        raise ApiError(400, f"after: {error}", "after") from None


class Ruling(msgspec.Struct, forbid_unknown_fields=True):
    ids: list[str]
    verdict: str
    by: str = ""
    reason: str = ""


_VERDICTS = {"executed": Verdict.EXECUTED, "not_executed": Verdict.NOT_EXECUTED}


async def post_rule(node: NodeFacade, request: web.Request) -> web.Response:
    ruling = await parse(request, Ruling)
    verdict = _VERDICTS.get(ruling.verdict)
    if verdict is None:
        raise ApiError(
            400, f"verdict: must be executed or not_executed, not {ruling.verdict[:40]!r}", "verdict"
        )
    if not 1 <= len(ruling.ids) <= RULED_MAX:
        raise ApiError(400, f"ids: must be 1 to {RULED_MAX}, not {len(ruling.ids)}", "ids")
    ids: list[TaskId] = []
    for at, given in enumerate(ruling.ids):
        try:
            ids.append(parse_id(given))
        except ValueError as error:
            raise ApiError(400, f"ids[{at}]: {str(error)[:300]}", f"ids[{at}]") from None
    ids = list(dict.fromkeys(ids))
    who = text(ruling.by, "by") or "http"
    by = who if who.startswith("human:") else f"human:{who}"
    batch = ids_of(ids)
    command = Rule(batch, verdict, by, text(ruling.reason, "reason", REASON_CHARS_MAX))
    answer = await decide(node, command, "the ruling")
    outcomes: dict[TaskId, str] = {}
    ordered = iter(batch)
    for span in spans_of(answer):
        for _ in range(span.count):
            outcomes[next(ordered)] = _RULED.get(span.outcome, "no suspect")
    words = [{"id": id_text(task_id), "outcome": outcomes[task_id]} for task_id in ids]
    ruled = sum(word["outcome"] == "ruled" for word in words)
    if not ruled:
        raise ApiError(409, f"none of the {len(words)} is a suspect", "ids", outcomes=words)
    return reply({"ruled": ruled, "outcomes": words})


_RULED = {
    Outcome.SETTLED: "ruled",
    Outcome.EXECUTED: "executed already",
    Outcome.HELD: "running",
    Outcome.CANCELLED: "cancelled",
    Outcome.DEAD: "dead",
    Outcome.UNALLOCATED: "unknown",
}


# --- queues and handlers ------------------------------------------------------------------------------------


async def get_queues(node: NodeFacade, request: web.Request) -> web.Response:
    """Queues that handlers name or that were ever paused; any other name is a queue too."""
    await fresh(node)
    names = {"default", *(info.queue for info in node.handlers.values()), *node.ledger.queues}
    rows = []
    for name in sorted(names):
        setting = node.ledger.queues.get(name)
        handlers = sorted(info.name for info in node.handlers.values() if info.queue == name)
        rows.append(
            {
                "queue": name,
                "paused": setting is not None and setting.paused,
                "by": setting.by if setting is not None else None,
                "since_ms_ago": max(0, node.ledger.now_ms - setting.since_ms)
                if setting is not None
                else None,
                "handlers": handlers,
            }
        )
    return reply({"queues": rows})


async def post_pause(node: NodeFacade, request: web.Request) -> web.Response:
    return await _put_queue(node, request, paused=True)


async def post_resume(node: NodeFacade, request: web.Request) -> web.Response:
    return await _put_queue(node, request, paused=False)


async def _put_queue(node: NodeFacade, request: web.Request, *, paused: bool) -> web.Response:
    queue = request.match_info["queue"]
    try:
        check_options("any", queue, 0, None)
    except InvalidTask as error:
        raise ApiError(400, str(error), error.field) from None
    by = (await parse(request, Who)).name()
    await decide(node, PutQueue(queue, paused, by), "the change")
    return reply({"queue": queue, "paused": paused})


async def get_handlers(node: NodeFacade, request: web.Request) -> web.Response:
    rows = []
    for name, info in sorted(node.handlers.items()):
        fields = {field: getattr(info, field) for field in info.__struct_fields__}
        learned = node.ledger.classes.get(name)
        fields["learned"] = {"kind": learned.kind, "length": learned.length} if learned is not None else None
        rows.append(fields)
    return reply({"app": node.identity.app, "handlers": rows})
