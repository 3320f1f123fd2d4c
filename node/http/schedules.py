"""Schedules over HTTP: what there is, put by hand, paused, deleted, and fired once more right now.

A change is one ledger command, as those of node/http/steer.py are. Firing by hand has nothing to do with the
schedule's times: it submits the same task once more, under an id of its own. Whoever gives that id may ask again.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from dedup.ids import TaskId, parse_id
from node.facade import NodeFacade
from node.http.status import fresh
from node.http.steer import Who, decide
from node.http.submit import Submission
from node.http.wire import ApiError, parse, query_text, reply, text, when
from node.schedules import next_firing_ms
from oncekeeper import schedules
from oncekeeper.envelope import Message, check_body, check_options
from oncekeeper.errors import InvalidSchedule, InvalidTask
from raft.commands import Command, DeleteSchedule, PauseSchedule, PutSchedule, Timetable
from raft.ledger_state import Schedule

BY_HAND = "hand"


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    schedule: str
    handler: str
    body: msgspec.Raw = msgspec.Raw(b"{}")
    tz: str = ""
    queue: str | None = None
    ttr_ms: int = 0
    catch_up: str = "latest"
    by: str = ""


class Firing(msgspec.Struct, forbid_unknown_fields=True):
    id: str | None = None
    by: str = ""


def row(name: str, known: Schedule) -> dict[str, Any]:
    timetable = known.timetable
    coming, error = None, None
    try:
        coming = next_firing_ms(known, schedules.parse(timetable.when, timetable.zone))
    except InvalidSchedule as wrong:
        error = str(wrong)
    return {
        "name": name,
        "schedule": timetable.when,
        "tz": timetable.zone or None,
        "handler": timetable.handler,
        "queue": timetable.queue,
        "body": msgspec.Raw(timetable.body),
        "ttr_ms": timetable.ttr_ms,
        "catch_up": timetable.catch_up,
        "owner": known.owner,
        "by": known.by or None,
        "paused": known.paused,
        "revision": known.revision,
        "last": when(known.fired_ms),
        "next": when(coming or 0),
        "fired": known.fired,
        "missed": known.missed,
        "error": error,
    }


async def get_schedules(node: NodeFacade, request: web.Request) -> web.Response:
    is_fresh = await fresh(node)
    rows = [row(name, known) for name, known in sorted(node.ledger.schedules.items())]
    return reply({"schedules": rows, "stale": not is_fresh})


async def get_schedule(node: NodeFacade, request: web.Request) -> web.Response:
    await fresh(node)
    name = _name(request)
    return reply(row(name, _known(node, name)))


async def put_schedule(node: NodeFacade, request: web.Request) -> web.Response:
    name = _name(request)
    wanted = await parse(request, Wanted)
    timetable = await _timetable(node, wanted)
    by = text(wanted.by, "by") or "http"
    await change(node, name, PutSchedule(name, timetable, BY_HAND, by, clock_ms()))
    return reply(row(name, _known(node, name)))


async def delete_schedule(node: NodeFacade, request: web.Request) -> web.Response:
    name = _name(request)
    by = query_text(request, "by") or "http"
    await fresh(node)
    _known(node, name)
    await change(node, name, DeleteSchedule(name, BY_HAND, by))
    return reply({"name": name, "deleted": True})


async def pause_schedule(node: NodeFacade, request: web.Request) -> web.Response:
    return await _pause(node, request, paused=True)


async def resume_schedule(node: NodeFacade, request: web.Request) -> web.Response:
    return await _pause(node, request, paused=False)


class FireNow:
    """POST /v1/schedules/{name}/fire."""

    def __init__(self, submission: Submission) -> None:
        self._submission = submission

    async def post(self, node: NodeFacade, request: web.Request) -> web.Response:
        name = _name(request)
        asked = await parse(request, Firing)
        by = text(asked.by, "by") or "http"
        task_id = None
        if asked.id is not None:
            try:
                task_id = parse_id(asked.id)
            except ValueError as error:
                raise ApiError(400, str(error)[:300], "id") from None
        await fresh(node)
        message = by_hand(name, _known(node, name).timetable, task_id, by)
        ids, _ = await self._submission.take([message], bulk=False)
        return reply({"name": name, "id": ids[0]})


def by_hand(name: str, timetable: Timetable, task_id: TaskId | None, by: str) -> Message:
    """The task that the schedule fires, once more."""
    return Message(
        handler=timetable.handler,
        body=timetable.body,
        id=task_id,
        queue=timetable.queue,
        ttr_ms=timetable.ttr_ms,
        submitted_by=f"schedule {name}, fired by {by}",
    )


async def _pause(node: NodeFacade, request: web.Request, *, paused: bool) -> web.Response:
    name = _name(request)
    by = (await parse(request, Who)).name()
    await fresh(node)
    _known(node, name)
    await change(node, name, PauseSchedule(name, paused, by, clock_ms()))
    return reply(row(name, _known(node, name)))


async def change(node: NodeFacade, name: str, command: Command) -> None:
    """One command of the ledger. ApiError says why not, or that nobody knows."""
    known = node.ledger.schedules.get(name)
    if known is not None and known.owner != BY_HAND and not isinstance(command, PauseSchedule):
        raise _coded(name)
    try:
        await decide(node, command, "the change")
    except ApiError as error:
        if error.status != 400:
            raise
        now = node.ledger.schedules.get(name)
        if now is not None and now.owner != BY_HAND:
            raise _coded(name) from None
        raise


def _coded(name: str) -> ApiError:
    return ApiError(
        409,
        f"schedule {name} is declared by the application: change it there (@app.task(schedule=…)), or pause it",
        "name",
        outcome="declared in code",
    )


async def _timetable(node: NodeFacade, wanted: Wanted) -> Timetable:
    try:
        line, zone, catch_up = schedules.check(wanted.schedule, wanted.tz, wanted.catch_up)
    except InvalidSchedule as error:
        raise ApiError(400, str(error), error.field) from None
    info = node.handlers.get(wanted.handler)
    queue = wanted.queue if wanted.queue is not None else info.queue if info is not None else "default"
    body = bytes(wanted.body)
    try:
        check_options(wanted.handler, queue, wanted.ttr_ms, None)
        check_body(body)
    except InvalidTask as error:
        raise ApiError(400, str(error), error.field) from None
    message = Message(handler=wanted.handler, body=body, queue=queue, ttr_ms=wanted.ttr_ms)
    # Now, and not at three in the morning when it fires first.
    await Submission(node).check([message], bulk=False)
    return Timetable(line, zone, wanted.handler, queue, body, wanted.ttr_ms, catch_up)


def _known(node: NodeFacade, name: str) -> Schedule:
    known = node.ledger.schedules.get(name)
    if known is None:
        raise ApiError(404, f"there is no schedule {name}", "name")
    return known


def _name(request: web.Request) -> str:
    name = request.match_info["name"]
    try:
        check_options(name, "default", 0, None)
    except InvalidTask as error:
        raise ApiError(400, f"name: {error.rule}", "name") from None
    return name


def clock_ms() -> int:
    return time.time_ns() // 1_000_000
