"""The one table of routes: what is served, and what the OpenAPI document says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import web

from node.facade import NodeFacade
from node.http import delays, listing, partitions, schedules, status, steer, submit, tasks

Handler = Callable[[NodeFacade, web.Request], Awaitable[web.Response]]
Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
STATE: Schema = {"type": "string", "enum": list(listing.STATES)}
ANY: Schema = {}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def many(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def thing(optional: tuple[str, ...] = (), /, **fields: Schema) -> Schema:
    needed = [name for name in fields if name not in optional]
    return {"type": "object", "properties": fields, "required": needed} if fields else {"type": "object"}


ROW = thing(
    id=TEXT,
    state=STATE,
    queue=maybe(TEXT),
    handler=maybe(TEXT),
    attempt=maybe(NUMBER),
    node=maybe(TEXT),
    due=maybe(TEXT),
    submitted=maybe(TEXT),
    started=maybe(TEXT),
    ended=maybe(TEXT),
    error=maybe(TEXT),
)
ATTEMPT = thing(
    attempt=NUMBER,
    fence=NUMBER,
    node=TEXT,
    claimed=maybe(TEXT),
    started=maybe(TEXT),
    ended=maybe(TEXT),
    ending={"type": "string", "enum": ["done", "retry", "dead", "doubt", "released", "lapsed"]},
    result=ANY,
    error=maybe(TEXT),
    trace=maybe(TEXT),
)
EVENT = thing(
    index=NUMBER,
    kind={"type": "string", "enum": ["suspected", "testified", "resolved", "cancelled", "revived"]},
    at=maybe(TEXT),
    fence=maybe(NUMBER),
    node=maybe(TEXT),
    what=maybe(TEXT),
    by=maybe(TEXT),
    reason=maybe(TEXT),
)
TASK_FIELDS: dict[str, Schema] = {
    "id": TEXT,
    "state": STATE,
    "queue": maybe(TEXT),
    "handler": maybe(TEXT),
    "key": maybe(TEXT),
    "body": ANY,
    "ttr_ms": maybe(NUMBER),
    "traceparent": maybe(TEXT),
    "due": maybe(TEXT),
    "submitted": maybe(TEXT),
    "submitted_by": maybe(TEXT),
    "attempt": maybe(NUMBER),
    "fence": maybe(NUMBER),
    "node": maybe(TEXT),
    "due_in_ms": NUMBER,
    "held": FLAG,
    "log": many(thing(partition=NUMBER, offset=NUMBER, passed=FLAG)),
    "aside": maybe(thing(kind=TEXT, reason=TEXT)),
    "attempts": many(ATTEMPT),
    "events": many(EVENT),
    "unreachable": many(TEXT),
    "stale": FLAG,
}
MESSAGE = thing(
    (
        "id",
        "key",
        "queue",
        "ttr_ms",
        "due",
        "then",
        "traceparent",
        "submitted",
        "submitted_by",
        "v",
        "attempt",
    ),
    handler=TEXT,
    body={"type": "object"},
    id=maybe(TEXT),
    key=maybe(TEXT),
    queue=TEXT,
    ttr_ms=NUMBER,
    due=maybe(TEXT),
    then={"enum": ["run", "enqueue", None]},
    traceparent=maybe(TEXT),
    submitted=maybe(TEXT),
    submitted_by=maybe(TEXT),
    v=NUMBER,
    attempt=NUMBER,
)
NODE = thing(
    (
        "error",
        "pid",
        "role",
        "term",
        "http",
        "raft",
        "takes_work",
        "partitions",
        "applied_index",
        "ledger_index",
        "ledger_digest",
    ),
    node=TEXT,
    up=FLAG,
    http=maybe(TEXT),
    raft=TEXT,
    pid=NUMBER,
    role=TEXT,
    term=NUMBER,
    applied_index=NUMBER,
    takes_work=FLAG,
    partitions=many(NUMBER),
    ledger_index=NUMBER,
    ledger_digest=TEXT,
    error=TEXT,
)
SCHEDULE = thing(
    name=TEXT,
    schedule=TEXT,
    tz=maybe(TEXT),
    handler=TEXT,
    queue=TEXT,
    body={"type": "object"},
    ttr_ms=NUMBER,
    catch_up={"type": "string", "enum": ["none", "latest", "all"]},
    owner={"type": "string", "enum": ["code", "hand"]},
    by=maybe(TEXT),
    paused=FLAG,
    revision=NUMBER,
    last=maybe(TEXT),
    next=maybe(TEXT),
    fired=NUMBER,
    missed=NUMBER,
    error=maybe(TEXT),
)
WHO = thing(("by",), by={**TEXT, "description": "who does it, for the task's story"})


class Param(NamedTuple):
    name: str
    schema: Schema
    about: str


class Route(NamedTuple):
    method: str
    path: str
    handler: str  # a name in ``handlers()``
    summary: str
    about: str
    answer: Schema
    params: tuple[Param, ...] = ()
    body: Schema | None = None
    errors: tuple[int, ...] = ()
    open: bool = False  # no token is asked for


LOCAL = Param(
    "local", {"type": "integer", "enum": [0, 1]}, "1: this node's own word only, as its peers ask for it"
)
DIGEST = Param(
    "digest",
    {"type": "integer", "enum": [0, 1]},
    "1: also `ledger_digest`, equal on all nodes of equal `ledger_index`; costs time in the ledger's size",
)
AFTER = Param("after", TEXT, "the `next` of the page before")
CHANGE = (400, 409, 503, 504)

ROUTES: tuple[Route, ...] = (
    Route("GET", "/v1/health", "health", "Whether the node lives", "For probes. Needs no token.",
          thing(ok=FLAG, takes_work=FLAG), open=True),
    Route("GET", "/v1/openapi.json", "openapi", "This document", "", thing()),
    Route("GET", "/v1/node", "node", "This node",
          "Its identity, the public part of its configuration, and its state.", NODE, (DIGEST,)),
    Route("GET", "/v1/nodes", "nodes", "All nodes",
          "One row a node of the cluster; a node that did not answer has `up: false` and the `error`. `sessions` is"
          " what the ledger holds of each live node.",
          thing(nodes=many(NODE), sessions=thing(), unreachable=many(TEXT))),
    Route("GET", "/v1/status", "status", "Tasks by state",
          "Sums over all partitions, each by its owner's report. A partition that nobody reports counts all that"
          " is not committed as waiting. `idle` is true only if nothing was waiting, delayed or running at one"
          " moment after the call came, and every partition was accounted for; suspects may remain. `held` of"
          " the suspects wait for a human. `fresh` is false without a quorum.",
          thing(tasks=thing(**dict.fromkeys(listing.STATES, NUMBER)), held=NUMBER, idle=FLAG, fresh=FLAG,
                applied_index=NUMBER, nodes=many(NODE), partitions=many(thing()), unreachable=many(TEXT),
                paused_queues=many(TEXT)), (LOCAL,)),
    Route("POST", "/v1/ids", "ids", "Allocate a range of ids",
          "For clients that write to the log themselves. `start` to `start + count - 1` are the caller's alone.",
          thing(start=NUMBER, count=NUMBER), body=thing(count=NUMBER), errors=(400, 503)),
    Route("POST", "/v1/tasks", "submit", "Submit tasks",
          'One message, or `{"tasks": [...]}`, or one message a line as application/x-ndjson. All of a call is'
          " stored durably before the answer, or nothing of it. `duplicates` counts ids that the ledger knew, or"
          " that came twice in the call; they are answered too, and not run again. A 503 says that surely nothing"
          " was stored; a 504 has `unknown: true` and `ids`: send the same again with these ids."
          " `past` counts tasks whose `due` is past: they run now.",
          thing(("past",), ids=many(TEXT), duplicates=NUMBER, past=NUMBER),
          body={"anyOf": [MESSAGE, thing(tasks=many(MESSAGE))]}, errors=(400, 413, 503, 504)),
    Route("GET", "/v1/tasks", "list", "Find tasks",
          "Newest first for executed ones and without a state. A page may be short or empty and have a `next`.",
          thing(tasks=many(ROW), next=maybe(TEXT), unreachable=many(TEXT)),
          (Param("state", STATE, "only tasks that are in this state now"),
           Param("queue", TEXT, "only this queue"), Param("handler", TEXT, "only this handler"),
           Param("error", TEXT, "only attempts whose error contains this text"),
           Param("since", TEXT, "ended (not yet run: submitted) at or after this ISO 8601 time"),
           Param("until", TEXT, "and before this one"),
           Param("due_before", TEXT, "delayed ones that are due up to this ISO 8601 time, in due order"),
           Param("limit", NUMBER, f"1 to {listing.LIMIT_MAX}; {listing.LIMIT_DEFAULT} if not given"),
           AFTER, LOCAL), errors=(400,)),
    Route("GET", "/v1/tasks/{id}", "task", "One task", "Message, state, places in the log, attempts, decisions.",
          thing(**TASK_FIELDS), (LOCAL,), errors=(400, 404)),
    Route("GET", "/v1/tasks/{id}/why", "why", "The story of one task",
          "The same, and `story`: sentences in the order of time.",
          thing(**TASK_FIELDS, story=many(TEXT)), errors=(400, 404)),
    Route("GET", "/v1/tasks/{id}/result", "result", "What came of a task",
          "`done` says that it ended (executed, dead or cancelled). `known` says that `result` is what the handler"
          " returned; an executed task without a known result was settled by evidence, or its history is lost"
          " (`note`). `error` is why it is dead.",
          thing(("note", "unreachable"), id=TEXT, state=STATE, done=FLAG, known=FLAG, result=ANY,
                error=maybe(TEXT), note=TEXT, unreachable=many(TEXT)),
          (Param("wait_ms", NUMBER, f"wait so long for it to end: 0 to {tasks.WAIT_MS_MAX}"),), errors=(400, 404)),
    Route("POST", "/v1/tasks/{id}/cancel", "cancel", "Delete a task before it starts",
          "200: it will never start. 409: too late, and `state` says what it is.",
          thing(id=TEXT, outcome=TEXT, state=STATE), body=WHO, errors=(404, *CHANGE)),
    Route("POST", "/v1/tasks/{id}/reschedule", "reschedule", "Let a delayed task run at another time",
          "`due` is an ISO 8601 time within a year; past: now. 200: it runs by that time alone. 409: it has started"
          " or ended (`state`), or waits for no time. 504: unknown; asking again is safe.",
          thing(id=TEXT, outcome=TEXT, state=STATE, due=TEXT),
          body=thing(("by",), due=TEXT, by=TEXT), errors=(404, *CHANGE)),
    Route("POST", "/v1/delays/changed", "delays_changed", "Between nodes: delayed tasks were moved",
          "Forget what is known of these partitions' delayed tasks; `clear`: nothing of it is in a claim.",
          thing(clear=FLAG), body=thing(partitions=many(NUMBER)), errors=(400,)),
    Route("POST", "/v1/tasks/{id}/retry", "retry", "Run a dead or cancelled task again",
          "From attempt 1. 409: it is neither, or its message is gone (`outcome`).",
          thing(id=TEXT, outcome=TEXT, state=STATE), body=WHO, errors=(404, *CHANGE)),
    Route("GET", "/v1/suspects", "suspects", "Tasks in doubt", "In the order of their ids.",
          thing(suspects=many(thing(id=TEXT, held=FLAG)), next=maybe(TEXT), total=NUMBER, held=NUMBER, stale=FLAG),
          (Param("limit", NUMBER, f"1 to {steer.SUSPECTS_MAX}"), AFTER),
          errors=(400,)),
    Route("POST", "/v1/suspects/rule", "rule", "Rule on suspects",
          "`executed`: it took effect and never runs again. `not_executed`: it runs again. One `outcome` an id:"
          " ruled, executed already, running, cancelled, dead, unknown, no suspect. 409: none was a suspect.",
          thing(ruled=NUMBER, outcomes=many(thing(id=TEXT, outcome=TEXT))),
          body=thing(("by", "reason"), ids=many(TEXT), by=TEXT, reason=TEXT,
                     verdict={"type": "string", "enum": ["executed", "not_executed"]}), errors=CHANGE),
    Route("GET", "/v1/queues", "queues", "Queues", "Those that a handler names, and those that were ever paused.",
          thing(queues=many(thing(queue=TEXT, paused=FLAG, by=maybe(TEXT), handlers=many(TEXT))))),
    Route("POST", "/v1/queues/{queue}/pause", "pause", "Start nothing more of a queue", "What runs goes on.",
          thing(queue=TEXT, paused=FLAG), body=WHO, errors=CHANGE),
    Route("POST", "/v1/queues/{queue}/resume", "resume", "Let a queue go on", "",
          thing(queue=TEXT, paused=FLAG), body=WHO, errors=CHANGE),
    Route("POST", "/v1/partitions/skip", "skip", "Accept that a log deleted tasks unread",
          "Where the log's retention passed a position that was not committed, the partition waits, and its owner's"
          " `notes` say so. 409: the partition does not wait.",
          thing(partition=NUMBER, owner=TEXT, outcome=TEXT),
          (LOCAL,), body=thing(("by",), partition=NUMBER, by=TEXT), errors=CHANGE),
    Route("GET", "/v1/schedules", "schedules", "Schedules",
          "Those that the application declares (`owner`: code) and those that were put by hand. `next` is by this"
          " node's clock; `missed` firings were left out by `catch_up`; `error` says why one cannot fire here.",
          thing(schedules=many(SCHEDULE), stale=FLAG)),
    Route("GET", "/v1/schedules/{name}", "schedule", "One schedule", "", SCHEDULE, errors=(400, 404)),
    Route("PUT", "/v1/schedules/{name}", "put_schedule", "Make a schedule, or change it",
          "`schedule` is a cron line of five fields in the time zone `tz`, or an interval such as `every 10s`. It"
          " fires for times after now only. 409: the application's code declares one of this name.",
          SCHEDULE, body=thing(("tz", "body", "queue", "ttr_ms", "catch_up", "by"), schedule=TEXT, tz=TEXT,
                               handler=TEXT, body={"type": "object"}, queue=maybe(TEXT), ttr_ms=NUMBER,
                               catch_up={"type": "string", "enum": ["none", "latest", "all"]}, by=TEXT),
          errors=CHANGE),
    Route("DELETE", "/v1/schedules/{name}", "delete_schedule", "Delete a schedule",
          "What has fired still runs. 409: the application's code declares it.",
          thing(name=TEXT, deleted=FLAG), (Param("by", TEXT, "who does it"),), errors=(404, *CHANGE)),
    Route("POST", "/v1/schedules/{name}/pause", "pause_schedule", "Fire no more", "", SCHEDULE, body=WHO,
          errors=(404, *CHANGE)),
    Route("POST", "/v1/schedules/{name}/resume", "resume_schedule", "Fire again",
          "From now on: what was due during the pause was not missed, it was not wanted.", SCHEDULE, body=WHO,
          errors=(404, *CHANGE)),
    Route("POST", "/v1/schedules/{name}/fire", "fire_schedule", "Fire once more, now",
          "Submits the schedule's task, paused or not; its times are not touched. With an `id` of your own (POST"
          " /v1/ids), asking again is safe.",
          thing(name=TEXT, id=TEXT), body=thing(("id", "by"), id=maybe(TEXT), by=TEXT), errors=(404, *CHANGE)),
    Route("GET", "/v1/handlers", "handlers", "What the application registers", "",
          thing(app=TEXT, handlers=many(thing(name=TEXT, kind=TEXT, length=TEXT, on_doubt=TEXT, queue=TEXT)))),
)  # fmt: skip


def handlers(node: NodeFacade) -> dict[str, Handler]:
    submission = submit.Submission(node)
    return {
        "health": status.get_health,
        "node": status.get_node,
        "nodes": status.get_nodes,
        "status": status.get_status,
        "ids": submit.post_ids,
        "submit": submission.post,
        "list": listing.get_tasks,
        "task": tasks.get_task,
        "why": tasks.get_why,
        "result": tasks.get_result,
        "cancel": steer.post_cancel,
        "retry": steer.post_retry,
        "reschedule": delays.post_reschedule,
        "delays_changed": delays.post_changed,
        "suspects": steer.get_suspects,
        "rule": steer.post_rule,
        "queues": steer.get_queues,
        "pause": steer.post_pause,
        "resume": steer.post_resume,
        "skip": partitions.post_skip,
        "schedules": schedules.get_schedules,
        "schedule": schedules.get_schedule,
        "put_schedule": schedules.put_schedule,
        "delete_schedule": schedules.delete_schedule,
        "pause_schedule": schedules.pause_schedule,
        "resume_schedule": schedules.resume_schedule,
        "fire_schedule": schedules.FireNow(submission).post,
        "handlers": steer.get_handlers,
    }
