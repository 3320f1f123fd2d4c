"""Delayed tasks over HTTP: rescheduled exactly, forgotten when they are cancelled, listed in due order.

A reschedule must not be overtaken by the old due time: by then the message may lie in a node's hands, waiting for
its turn. So:

1. ``Hold``: nobody is granted the task for HOLD_MS. Its answer says whether it had started; that is the truth.
2. The row in the log's store is moved, durably: from now on that is when it is due, whoever asks.
3. Every node with a live session forgets what it fetched before, and says so once the ledger has answered all that
   it had asked for. A node that does not answer holds things up until its lease is over.
4. The hold is taken back; the answer says once more that it had not started.

A crash before the second step leaves a task that is HOLD_MS late at most, and after it, one that is rescheduled.
All of it may be repeated.
"""

from __future__ import annotations

import asyncio
import time

import msgspec
from aiohttp import web

from dedup.ids import TaskId, id_text, ids_of
from node.facade import NodeFacade, PeerUnreachable
from node.http.status import fresh
from node.http.steer import decide, spans_of, state_by, too_late
from node.http.tasks import state_of
from node.http.wire import ApiError, parse, path_id, reply, text, when
from oncekeeper import dues
from oncekeeper.envelope import ENQUEUED, parse_time
from oncekeeper.errors import InvalidTask
from oncekeeper.log.delayed import DelayStore, Place, delays_of
from oncekeeper.log.port import TaskLog
from raft.commands import Hold, Outcome

HOLD_MS = 20_000
ASK_S = 14.0  # below HOLD_MS, and above a session's timeout
ASK_PEER_MS = 1_500
ASK_PAUSE_S = 0.1
FIND_S = 4.0
"""How long a task may need to come to the store: one that is due soon waits in memory, and comes when held."""
FIND_PAUSE_S = 0.05
PARTITIONS_MAX = 4096


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
    now_ms = time.time_ns() // 1_000_000
    if due_ms > now_ms + dues.DUE_MS_MAX:
        raise ApiError(400, f"due: {dues.DUE_RULE}", "due")
    await reschedule(node, task_id, due_ms)
    state = "delayed" if due_ms > now_ms else "waiting"
    return reply({"id": id_text(task_id), "outcome": "rescheduled", "state": state, "due": when(due_ms)})


async def post_changed(node: NodeFacade, request: web.Request) -> web.Response:
    changed = await parse(request, Changed)
    if len(changed.partitions) > PARTITIONS_MAX:
        raise ApiError(400, f"partitions: at most {PARTITIONS_MAX}", "partitions")
    clear = await node.delays_changed(frozenset(changed.partitions), ASK_PEER_MS - 300)
    return reply({"clear": clear})


async def reschedule(node: NodeFacade, task_id: TaskId, due_ms: int) -> None:
    """Let it be due at another time. ApiError says why not, or that nobody knows."""
    ids = ids_of([task_id])
    await fresh(node)
    if not await node.with_log(lambda log: _may_wait(log, task_id)):
        standing = node.ledger.describe(task_id)
        if standing.state == "unallocated" or (
            standing.state == "new" and not await _is_known(node, task_id)
        ):
            raise ApiError(404, f"no task {id_text(task_id)} is known", "id")
        if standing.state != "waiting":
            raise _refused(node, task_id)
    outcome = spans_of(await decide(node, Hold(ids, HOLD_MS), "the reschedule"))[0].outcome
    if outcome is not Outcome.SETTLED:
        raise _too_late(node, task_id, outcome)
    until = asyncio.get_running_loop().time() + FIND_S
    while not (partitions := await node.with_log(lambda log: _move(log, task_id, due_ms))):
        if asyncio.get_running_loop().time() > until:
            await decide(node, Hold(ids, 0), "the reschedule")
            raise _refused(node, task_id)
        await asyncio.sleep(FIND_PAUSE_S)
    silent = await _all_told(node, partitions)
    if silent:
        raise ApiError(
            504,
            f"no answer from {', '.join(sorted(silent))}, which may start it at its old time; ask again",
            None,
            unknown=True,
        )
    outcome = spans_of(await decide(node, Hold(ids, 0), "the reschedule"))[0].outcome
    if outcome is not Outcome.SETTLED:
        raise _too_late(node, task_id, outcome)


def _refused(node: NodeFacade, task_id: TaskId) -> ApiError:
    state = state_of(node.ledger.describe(task_id), node.ledger.now_ms, in_log=True)
    if state in ("waiting", "delayed"):
        why = "it waits in its queue and for no time, or is about to start"
        return ApiError(
            409, f"cannot reschedule: {why}", None, outcome="not delayed", state=state, id=id_text(task_id)
        )
    return too_late(state, task_id, "reschedule")


def _too_late(node: NodeFacade, task_id: TaskId, outcome: Outcome) -> ApiError:
    return too_late(state_by(node, task_id, outcome), task_id, "reschedule")


async def _is_known(node: NodeFacade, task_id: TaskId) -> bool:
    return await node.with_log(lambda log: bool(log.find(task_id)))


def _may_wait(log: TaskLog, task_id: TaskId) -> bool:
    """Whether it waits in the store, or was submitted with a due time and may come there."""
    delays = delays_of(log)
    if delays is None:
        raise ApiError(
            409, "the task log of this cluster cannot reschedule: cancel the task, and submit another", None
        )
    if delays.find(task_id):
        return True
    return any(place.batch.due_ms and place.batch.then != ENQUEUED for place in log.find(task_id))


def _store(log: TaskLog) -> DelayStore:
    delays = delays_of(log)
    assert delays is not None
    return delays


def _move(log: TaskLog, task_id: TaskId, due_ms: int) -> frozenset[int]:
    """Its partitions; none if it is not there."""
    delays = _store(log)
    rows = delays.find(task_id)
    if not rows or not delays.move([Place(row.partition, row.offset) for row in rows], due_ms):
        return frozenset()
    return frozenset(row.partition for row in rows)


async def _all_told(node: NodeFacade, partitions: frozenset[int]) -> set[str]:
    """Who has a live session, and did not say in time that it has forgotten what it knew of these partitions."""
    told: set[str] = set()
    until = asyncio.get_running_loop().time() + ASK_S
    while True:
        live = {session.node for session in node.ledger.sessions.values() if session.consumes}
        missing = sorted(live - told)
        if not missing or asyncio.get_running_loop().time() > until:
            return set(missing)
        answers = await asyncio.gather(*(_tell(node, name, partitions) for name in missing))
        told.update(name for name, clear in zip(missing, answers, strict=True) if clear)
        if len(told) < len(live):
            await asyncio.sleep(ASK_PAUSE_S)


async def _tell(node: NodeFacade, name: str, partitions: frozenset[int]) -> bool:
    if name == node.identity.node:
        return await node.delays_changed(partitions, ASK_PEER_MS)
    try:
        answer = await node.ask_peer(
            name,
            "POST",
            "/v1/delays/changed",
            {"partitions": sorted(partitions)},
            timeout_ms=ASK_PEER_MS,
        )
    except PeerUnreachable:
        return False
    return answer.status == 200 and bool(answer.body.get("clear"))
