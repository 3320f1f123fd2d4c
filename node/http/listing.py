"""GET /v1/tasks: find tasks. Where they are found depends on the state that is asked for.

    waiting, delayed, running   the store of delayed tasks in due order (all of them, or those that are due), and
                                the log from the committed positions on; with the ledger's word on each id
    suspect                     the ledger
    dead                        what lies aside, with the ledger's word
    cancelled                   the ledger's decisions, as this node recorded them
    executed, or no state       every node's work history, newest first

A page is bounded in what is looked at, not only in what is found: a page may be short, or empty, and still
have a ``next``. Only ``next`` being null says that there is no more.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Iterator
from itertools import islice
from operator import itemgetter
from typing import Any

import msgspec
from aiohttp import web

from dedup.ids import TaskId, id_text
from node.facade import NodeFacade
from node.http import kept
from node.http.peers import ask_all
from node.http.steer import after_id, suspects_page
from node.http.tasks import state_of
from node.http.wire import ApiError, query_flag, query_int, query_text, reply, when
from node.records import Attempt, Cursor, Ending, Page, TaskFilter
from oncekeeper.envelope import TaskBatch, decode_task, parse_time
from oncekeeper.errors import InvalidTask
from oncekeeper.log.port import Aside, Fetched, TaskLog
from raft.commands import Outcome

LIMIT_MAX = 1000
LIMIT_DEFAULT = 50
AFTER_CHARS_MAX = 4000  # a place for each node
LOOKED_AT_MAX = 20_000  # tasks of the log in one page
READ_BYTES_MAX = 4 << 20
FOR_EVER_MS = 1 << 47
STATES = ("waiting", "delayed", "running", "suspect", "executed", "dead", "cancelled")


class Wanted(msgspec.Struct, frozen=True):
    state: str
    queue: str
    handler: str
    error: str
    since_ms: int
    until_ms: int
    limit: int
    after: str
    due_before_ms: int

    def fits(self, queue: str, handler: str) -> bool:
        return (not self.queue or queue == self.queue) and (not self.handler or handler == self.handler)

    def fits_time(self, at_ms: int) -> bool:
        return at_ms >= self.since_ms and (not self.until_ms or at_ms < self.until_ms)


async def get_tasks(node: NodeFacade, request: web.Request) -> web.Response:
    wanted = _wanted(request)
    if query_flag(request, "local"):
        return reply(await asyncio.to_thread(_search, node, wanted, wanted.after))
    silent: dict[str, str] = {}
    if wanted.state in ("waiting", "delayed", "running"):
        rows, following = await _of_store_and_log(node, wanted)
    elif wanted.state == "suspect":
        rows, following = _of_suspects(node, wanted)
    elif wanted.state == "dead":
        rows, following = await _of_aside(node, wanted)
    elif wanted.state == "cancelled":
        rows, following = await _of_cancelled(node, wanted)
    else:
        rows, following, silent = await _of_history(node, request, wanted)
    return reply({"tasks": rows, "next": following, "unreachable": sorted(silent)})


def _wanted(request: web.Request) -> Wanted:
    state = query_text(request, "state")
    if state and state not in STATES:
        raise ApiError(400, f"state: must be one of {', '.join(STATES)}, not {state[:40]!r}", "state")
    times = {}
    for name in ("since", "until", "due_before"):
        try:
            times[name] = parse_time(query_text(request, name) or None, name)
        except InvalidTask as error:
            raise ApiError(400, str(error), name) from None
    return Wanted(
        state,
        query_text(request, "queue"),
        query_text(request, "handler"),
        query_text(request, "error"),
        times["since"],
        times["until"],
        query_int(request, "limit", LIMIT_DEFAULT, 1, LIMIT_MAX),
        query_text(request, "after", AFTER_CHARS_MAX),
        times["due_before"],
    )


def _row(task_id: TaskId, state: str, **more: Any) -> dict[str, Any]:
    """Every row has every field, whatever it was found by."""
    blank = dict.fromkeys(
        ("queue", "handler", "attempt", "node", "due", "submitted", "started", "ended", "error")
    )
    return {"id": id_text(task_id), "state": state, **blank, **more}


# --- from the log -------------------------------------------------------------------------------------------


async def _of_store_and_log(node: NodeFacade, wanted: Wanted) -> tuple[list[dict[str, Any]], str | None]:
    """First what the store keeps; then, in no order, what has not been passed yet."""
    if wanted.after and not wanted.after.startswith(kept.CURSOR):
        return await _of_log_alone(node, wanted)
    rows, following = await _of_store(node, wanted)
    if following is not None:
        return rows, following
    if len(rows) == wanted.limit:
        return rows, "0.0"
    rest = msgspec.structs.replace(wanted, after="", limit=wanted.limit - len(rows))
    more, following = await _of_log_alone(node, rest)
    return rows + more, following


async def _of_log_alone(node: NodeFacade, wanted: Wanted) -> tuple[list[dict[str, Any]], str | None]:
    """Without what the store keeps: its position may not be passed yet."""
    rows, following = await _of_log(node, wanted)
    doubtful = [row["id"] for row in rows if row["due"] or wanted.state == "delayed"]
    known = await node.with_log(lambda log: kept.those_kept(log, doubtful)) if doubtful else set()
    return [row for row in rows if row["id"] not in known], following


async def _of_store(node: NodeFacade, wanted: Wanted) -> tuple[list[dict[str, Any]], str | None]:
    begin = kept.parse_cursor(wanted.after)
    now_ms = time.time_ns() // 1_000_000
    until_ms = (wanted.due_before_ms or FOR_EVER_MS) if wanted.state == "delayed" else now_ms
    rows_max = wanted.limit + 1
    found, following = await node.with_log(lambda log: kept.page(log, until_ms, begin.after, rows_max))
    rows: list[dict[str, Any]] = []
    cursor = begin
    for row, item in found:
        if isinstance(item, Fetched) and wanted.fits(item.batch.queue, item.batch.handler):
            batch = msgspec.structs.replace(item.batch, due_ms=row.due_ms)
            for at, task_id, state in _states(node, batch):
                if state != wanted.state or at < cursor.skip or not wanted.fits_time(batch.submitted_ms):
                    continue
                if len(rows) == wanted.limit:
                    return rows, str(cursor._replace(skip=at))
                rows.append(_waiting_row(task_id, state, batch))
        cursor = kept.Cursor(row, 0)
    return rows, str(kept.Cursor(following, 0)) if following is not None else None


def _waiting_row(task_id: TaskId, state: str, batch: TaskBatch) -> dict[str, Any]:
    due, submitted = when(batch.due_ms), when(batch.submitted_ms)
    return _row(task_id, state, queue=batch.queue, handler=batch.handler, due=due, submitted=submitted)


async def _of_log(node: NodeFacade, wanted: Wanted) -> tuple[list[dict[str, Any]], str | None]:
    start = _log_cursor(wanted.after)
    found, end = await node.with_log(lambda log: _read_on(log, start))
    rows: list[dict[str, Any]] = []
    for fetched in found:
        batch = fetched.batch
        if not wanted.fits(batch.queue, batch.handler) or not wanted.fits_time(batch.submitted_ms):
            continue
        if wanted.due_before_ms and not 0 < batch.due_ms <= wanted.due_before_ms:
            continue
        for at, task_id, state in _states(node, batch):
            if state == wanted.state:
                if len(rows) == wanted.limit:
                    return rows, f"{fetched.partition}.{fetched.base + at}"
                rows.append(_waiting_row(task_id, state, batch))
    return rows, end


def _log_cursor(after: str) -> tuple[int, int]:
    """The first partition and offset to look at."""
    if not after:
        return 0, 0
    try:
        place = Cursor.parse(after)
    except ValueError as error:
        raise ApiError(400, str(error), "after") from None
    return place.row, place.place


def _read_on(log: TaskLog, start: tuple[int, int]) -> tuple[list[Fetched], str | None]:
    """Runs in the log's thread. What is not passed yet, from ``start`` on, and where to go on."""
    found: list[Fetched] = []
    looked = 0
    committed = log.committed()
    for partition, end in sorted(log.ends().items()):
        offset = max(committed.get(partition, 0), start[1] if partition == start[0] else 0)
        if partition < start[0]:
            continue
        while offset < end:
            if looked >= LOOKED_AT_MAX:
                return found, f"{partition}.{offset}"
            items = log.read(partition, offset, LOOKED_AT_MAX - looked, READ_BYTES_MAX)
            if not items:
                break
            for item in items:
                if isinstance(item, Fetched):
                    found.append(item)
                looked += item.end - item.base
                offset = item.end
    return found, None


_WORDS = {
    Outcome.NEW: "waiting",
    Outcome.UNALLOCATED: "waiting",  # the ledger here may be behind the log
    Outcome.EARLY: "delayed",
    Outcome.HELD: "running",
}


def _states(node: NodeFacade, batch: TaskBatch) -> Iterator[tuple[int, TaskId, str]]:
    """Run by run: most neighbours stand alike."""
    not_due = batch.due_ms > time.time_ns() // 1_000_000
    ids = iter(batch.ids)
    at = 0
    for span in node.ledger.classify(batch.ids):
        state = _WORDS.get(span.outcome, "")
        if state == "waiting" and not_due:
            state = "delayed"
        for _ in range(span.count):
            yield at, next(ids), state
            at += 1


# --- from the ledger, and from aside -----------------------------------------------------------------------


def _of_suspects(node: NodeFacade, wanted: Wanted) -> tuple[list[dict[str, Any]], str | None]:
    found, following = suspects_page(node, wanted.limit, after_id(wanted.after))
    rows = []
    for one in found:
        reason = one["reason"] or f"the claim of node {one['node']} was lost: {one['why']}"
        blank = _row(0, "suspect", attempt=one["attempt"], node=one["node"], error=reason)
        rows.append(blank | {"id": one["id"]})
    return rows, following


async def _of_aside(node: NodeFacade, wanted: Wanted) -> tuple[list[dict[str, Any]], str | None]:
    try:
        after = Cursor.parse(wanted.after).row if wanted.after else 0
    except ValueError as error:
        raise ApiError(400, str(error), "after") from None
    page = await node.with_log(lambda log: log.aside("dead", after, wanted.limit))
    rows = []
    for _, task in page:
        standing = node.ledger.describe(task.id)
        queue, handler = _names(task)
        if (
            standing.state == "dead"  # one that was revived lies aside until the sweeper has put it back
            and wanted.fits(queue, handler)
            and wanted.fits_time(task.at_ms)
            and wanted.error.casefold() in task.reason.casefold()
        ):
            rows.append(
                _row(
                    task.id,
                    "dead",
                    queue=queue or None,
                    handler=handler or None,
                    attempt=standing.attempt,
                    ended=when(task.at_ms),
                    error=task.reason,
                )
            )
    return rows, f"{page[-1][0]}.0" if len(page) == wanted.limit else None


def _names(task: Aside) -> tuple[str, str]:
    try:
        batch = decode_task(task.message)
    except InvalidTask:
        return "", ""  # it lies aside because it cannot be decoded
    return batch.queue, batch.handler


async def _of_cancelled(node: NodeFacade, wanted: Wanted) -> tuple[list[dict[str, Any]], str | None]:
    """The newest ones; there are no further pages."""
    events = await asyncio.to_thread(node.records.cancelled, LIMIT_MAX)
    rows: dict[str, dict[str, Any]] = {}
    for event in events:
        if not wanted.fits_time(event.at_ms):
            continue
        for task_id in event.ids:
            if len(rows) == wanted.limit:
                return list(rows.values()), None
            if node.ledger.describe(task_id).state == "cancelled":
                row = _row(task_id, "cancelled", ended=when(event.at_ms))
                rows.setdefault(row["id"], row)
    return list(rows.values()), None


# --- from every node's history -----------------------------------------------------------------------------


def _search(node: NodeFacade, wanted: Wanted, after: str) -> Page:
    """Blocks on the disk: call it in a thread."""
    endings = (Ending.DONE, Ending.LAPSED) if wanted.state == "executed" else ()
    looked_for = TaskFilter(
        endings, wanted.queue, wanted.handler, wanted.since_ms, wanted.until_ms, wanted.error
    )
    try:
        return node.records.search(looked_for, wanted.limit, after or None)
    except ValueError as error:
        raise ApiError(400, str(error), "after") from None


async def _of_history(
    node: NodeFacade, request: web.Request, wanted: Wanted
) -> tuple[list[dict[str, Any]], str | None, dict[str, str]]:
    """Every node's page, merged by time. The cursor is each node's own, so that nothing is passed over."""
    cursors = _cursors(wanted.after)
    me = node.identity.node
    pages = {me: await asyncio.to_thread(_search, node, wanted, cursors.get(me, ""))}
    answers, silent = await _ask_pages(node, request, cursors)
    for name, body in answers.items():
        try:
            pages[name] = msgspec.convert(body, Page)
        except msgspec.ValidationError as error:
            silent[name] = f"its history cannot be read: {error}"
    # Merged from the heads: of each node's page exactly a prefix is taken, so one cursor a node says it all.
    newest_first = heapq.merge(*(_entries(name, page) for name, page in pages.items()), key=itemgetter(0))
    merged = list(islice(newest_first, wanted.limit))
    rows: dict[str, dict[str, Any]] = {}
    for _, name, at in merged:
        attempt = pages[name].attempts[at]
        cursors[name] = pages[name].places[at]
        row = _attempt_row(node, attempt)
        if not wanted.state or row["state"] == wanted.state:
            rows.setdefault(row["id"], row)
    taken = len(merged)
    more = taken < sum(len(page.attempts) for page in pages.values()) or any(
        page.next for page in pages.values()
    )
    following = ",".join(f"{name}:{place}" for name, place in sorted(cursors.items())) if more else None
    return list(rows.values()), following, silent


def _entries(name: str, page: Page) -> list[tuple[int, str, int]]:
    return [(-attempt.ended_ms, name, at) for at, attempt in enumerate(page.attempts)]


def _attempt_row(node: NodeFacade, attempt: Attempt) -> dict[str, Any]:
    task_id = next(iter(attempt.ids))
    return _row(
        task_id,
        state_of(node.ledger.describe(task_id), node.ledger.now_ms, in_log=True),
        queue=attempt.queue,
        handler=attempt.handler,
        attempt=attempt.attempt,
        node=attempt.node,
        started=when(attempt.started_ms),
        ended=when(attempt.ended_ms),
        error=attempt.error or None,
    )


def _cursors(after: str) -> dict[str, str]:
    cursors: dict[str, str] = {}
    for part in after.split(",") if after else ():
        name, colon, place = part.partition(":")
        if not colon:
            raise ApiError(400, f"after={after[:40]!r} must be the 'next' of an earlier page", "after")
        cursors[name] = place
    return cursors


async def _ask_pages(
    node: NodeFacade, request: web.Request, cursors: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    query = {name: value for name, value in request.query.items() if name not in ("after", "local")}
    return await ask_all(
        node,
        lambda name: str(request.rel_url.with_query({**query, "local": "1", "after": cursors.get(name, "")})),
    )
