"""Delayed tasks over HTTP: rescheduled exactly (node/rescheduling.py says how), by whichever node is asked."""

from __future__ import annotations

import time

import msgspec
from aiohttp import web

from dedup.ids import TaskId, id_text
from node.facade import NodeFacade, OutcomeUnknown, PeerUnreachable, Unavailable
from node.http.status import fresh
from node.http.steer import state_by, too_late
from node.http.tasks import state_of
from node.http.wire import ApiError, parse, path_id, reply, text, when
from node.rescheduling import (
    NoStore,
    NoSuchTask,
    NotDelayed,
    Overdue,
    Rescheduled,
    Rescheduling,
    TooLate,
    Untold,
)
from oncekeeper import dues
from oncekeeper.envelope import parse_time
from oncekeeper.errors import InvalidTask
from oncekeeper.log.port import UnknownAppend, Unsent

ASK_PEER_MS = 1_500
PARTITIONS_MAX = 4096
MAY_BE = "it may or may not be rescheduled; ask again, it is safe"
Refused = NoSuchTask | NotDelayed | NoStore | TooLate


class Reschedule(msgspec.Struct, forbid_unknown_fields=True):
    due: str
    by: str = ""


class Changed(msgspec.Struct, forbid_unknown_fields=True):
    partitions: list[int]


async def post_reschedule(node: NodeFacade, request: web.Request) -> web.Response:
    task_id = path_id(request)
    wanted = await parse(request, Reschedule)
    text(wanted.by, "by")
    try:
        due_ms = parse_time(wanted.due, "due")
    except InvalidTask as error:
        raise ApiError(400, str(error), "due") from None
    now_ms = _now_ms()
    if due_ms > now_ms + dues.DUE_MS_MAX:
        raise ApiError(400, f"due: {dues.DUE_RULE}", "due")
    await fresh(node)
    result = await _reschedule(node, task_id, due_ms)
    if not isinstance(result, Rescheduled):
        raise _refusal(node, task_id, result)
    state = "delayed" if due_ms > now_ms else "waiting"
    return reply({"id": id_text(task_id), "outcome": "rescheduled", "state": state, "due": when(due_ms)})


async def post_changed(node: NodeFacade, request: web.Request) -> web.Response:
    changed = await parse(request, Changed)
    if len(changed.partitions) > PARTITIONS_MAX:
        raise ApiError(400, f"partitions: at most {PARTITIONS_MAX}", "partitions")
    clear = await node.delays_changed(frozenset(changed.partitions), ASK_PEER_MS - 300)
    return reply({"clear": clear})


async def _reschedule(node: NodeFacade, task_id: TaskId, due_ms: int) -> Rescheduled | Refused:
    """OutcomeUnknown: it may be; asking again is safe."""

    async def tell(name: str, partitions: frozenset[int]) -> bool:
        if name == node.identity.node:
            return await node.delays_changed(partitions, ASK_PEER_MS)
        body = {"partitions": sorted(partitions)}
        try:
            answer = await node.ask_peer(name, "POST", "/v1/delays/changed", body, timeout_ms=ASK_PEER_MS)
        except PeerUnreachable:
            return False
        return answer.status == 200 and bool(answer.body.get("clear"))

    steps = Rescheduling(
        node.ledger,
        propose=node.propose,
        barrier=node.barrier,
        with_log=node.with_log,
        tell=tell,
        wall_ms=_now_ms,
    )
    try:
        result = await steps.reschedule(task_id, due_ms)
    except Unsent as error:
        raise Unavailable(str(error)) from error
    except UnknownAppend as error:
        raise OutcomeUnknown(f"{MAY_BE}: {error}") from error
    match result:
        case Untold(nodes):
            names = ", ".join(sorted(nodes))
            raise OutcomeUnknown(f"{MAY_BE}: no answer from {names}, which may start it at its old time")
        case Overdue():
            raise OutcomeUnknown(f"{MAY_BE}: it took so long that it may have started at its old time")
        case _:
            return result


def _refusal(node: NodeFacade, task_id: TaskId, refused: Refused) -> ApiError:
    match refused:
        case NoSuchTask():
            return ApiError(404, f"no task {id_text(task_id)} is known", "id")
        case NoStore():
            why = "the task log of this cluster cannot reschedule: cancel the task, and submit another"
            return ApiError(409, why, None)
        case TooLate(outcome):
            return too_late(state_by(node, task_id, outcome), task_id, "reschedule")
        case NotDelayed():
            return _not_delayed(node, task_id)


def _not_delayed(node: NodeFacade, task_id: TaskId) -> ApiError:
    state = state_of(node.ledger.describe(task_id), node.ledger.now_ms, in_log=True)
    if state not in ("waiting", "delayed"):
        return too_late(state, task_id, "reschedule")
    why = "it waits for its turn in its queue, and for no time"
    return ApiError(
        409, f"cannot reschedule: {why}", None, outcome="not delayed", state=state, id=id_text(task_id)
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
