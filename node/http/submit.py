"""Taking tasks over HTTP: everything is checked before anything is stored, and all of a call is stored or none.

The order: parse and validate each message; the handler and, in a worker, the body's types; then ids; then one
durable append. An id that was handed out and not used is lost for good, which harms nothing.

What an error says about the tasks: 4xx and 503, surely none was stored; 504 with ``"unknown": true``, they
may have been, and ``ids`` tells under which ids: sending them again with those ids is safe.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import msgspec
from aiohttp import web

from dedup.ids import TaskId, id_text, ids_of
from node.facade import NodeFacade, OutcomeUnknown, Unavailable
from node.http.status import fresh
from node.http.wire import ApiError, parse, read_body, reply
from oncekeeper.dues import DUE_MS_MAX, DUE_RULE
from oncekeeper.envelope import ENQUEUED, THENS, UNDECODABLE, Message, batches_of, explain, validate_message
from oncekeeper.errors import InvalidTask
from oncekeeper.log.port import UnknownAppend, Unsent
from raft.commands import Allocated, AllocateIds, Outcome, Rejected

NDJSON = "application/x-ndjson"
TASKS_MAX = 20_000  # of one call; the loop, which Raft shares, is held up some microseconds for each
PARSED_HERE_BYTES = 64 * 1024  # more is parsed in a thread, so that the loop gets its turns
BLOCK_IDS = 4096
PROPOSE_MS = 5000
IDS_MAX = 1_048_576

# The ledger's word on these is final, and their message is in the log already, or no longer needed.
_DECIDED = (Outcome.EXECUTED, Outcome.HELD, Outcome.SUSPECT, Outcome.CANCELLED, Outcome.DEAD)


class IdBlocks:
    """Ids from blocks that the ledger allocated, so that most submissions need no consensus of their own."""

    def __init__(self, node: NodeFacade) -> None:
        self._node = node
        self._lock = asyncio.Lock()
        self._next = 0
        self._end = 0

    async def take(self, count: int) -> int:
        """The first of ``count`` neighbours. Raises Unavailable: without an answer nothing was handed out."""
        async with self._lock:
            if self._end - self._next < count:
                block = await allocate(self._node, max(count, BLOCK_IDS))
                if block.start == self._end:
                    self._end += block.count
                else:
                    self._next, self._end = block.start, block.start + block.count
            start = self._next
            self._next += count
            return start


async def allocate(node: NodeFacade, count: int) -> Allocated:
    try:
        (answer,) = await node.propose((AllocateIds(count),), PROPOSE_MS)
    except OutcomeUnknown as error:
        # A range may have been allocated; nobody will use it. Nothing else can have happened.
        raise Unavailable(f"no ids could be allocated: {error}") from error
    if isinstance(answer, Rejected):
        raise ApiError(400, answer.reason, "count")
    if not isinstance(answer, Allocated):
        raise Unavailable(f"the ledger answered {type(answer).__name__} to AllocateIds")
    return answer


class WantedIds(msgspec.Struct, forbid_unknown_fields=True):
    count: int


async def post_ids(node: NodeFacade, request: web.Request) -> web.Response:
    wanted = await parse(request, WantedIds)
    if not 1 <= wanted.count <= IDS_MAX:
        raise ApiError(400, f"count: must be from 1 to {IDS_MAX}, not {wanted.count}", "count")
    block = await allocate(node, wanted.count)
    return reply({"start": block.start, "count": block.count})


class Submission:
    """POST /v1/tasks."""

    def __init__(self, node: NodeFacade) -> None:
        self._node = node
        self._ids = IdBlocks(node)

    async def post(self, node: NodeFacade, request: web.Request) -> web.Response:
        raw = await read_body(request)
        queues = {name: info.queue for name, info in self._node.handlers.items()}
        if len(raw) > PARSED_HERE_BYTES:
            messages, bulk = await asyncio.to_thread(_messages, request, raw, queues)
        else:
            messages, bulk = _messages(request, raw, queues)
        now_ms = time.time_ns() // 1_000_000
        past = sum(0 < message.due_ms <= now_ms for message in messages)
        ids, duplicates = await self.take(messages, bulk)
        return reply({"ids": ids, "duplicates": duplicates} | ({"past": past} if past else {}))

    async def take(self, messages: list[Message], bulk: bool) -> tuple[list[str], int]:
        """Check and store messages; their ids, and how many were known. ApiError as above."""
        await self.check(messages, bulk)
        await self._check_ids(messages, bulk)
        messages = await self._with_ids(messages)
        fresh_ones, duplicates = self._without_known(messages)
        await self._append(fresh_ones, messages)
        return [_id_text(message) for message in messages], duplicates

    async def check(self, messages: Sequence[Message], bulk: bool) -> None:
        """Whether the application has their handlers, and these take their bodies."""
        self._check_handlers(messages, bulk)
        await self._check_bodies(messages, bulk)

    # --- checks --------------------------------------------------------------------------------------------

    def _check_handlers(self, messages: Sequence[Message], bulk: bool) -> None:
        known = self._node.handlers
        if not known and not self._node.identity.app:
            return  # this node runs no application; the one that reads the task knows
        if not known:
            raise Unavailable("this node's workers have not told yet which handlers the application has")
        for at, message in enumerate(messages):
            if message.handler not in known:
                names = ", ".join(sorted(known)[:50])
                raise _bad(
                    at,
                    bulk,
                    "handler",
                    f"{message.handler!r} is not registered; the application has: {names}",
                )

    async def _check_bodies(self, messages: Sequence[Message], bulk: bool) -> None:
        places: dict[str, list[int]] = {}
        for at, message in enumerate(messages):
            if message.handler in self._node.handlers:
                places.setdefault(message.handler, []).append(at)
        for handler, ats in places.items():
            wrong = await self._node.validate(handler, [messages[at].body for at in ats])
            if wrong is not None:
                raise _bad(ats[wrong[0]], bulk, "body", wrong[1])

    async def _check_ids(self, messages: Sequence[Message], bulk: bool) -> None:
        given = [(at, message.id) for at, message in enumerate(messages) if isinstance(message.id, int)]
        if not given:
            return
        if self._unallocated([number for _, number in given]) is not None:
            await fresh(self._node)  # allocated a moment ago through another node?
        number = self._unallocated([number for _, number in given])
        if number is not None:
            at = next(place for place, other in given if other == number)
            raise _bad(
                at, bulk, "id", f"{number} is outside every allocated range: leave it out, or POST /v1/ids"
            )

    def _unallocated(self, numbers: list[int]) -> int | None:
        at = 0
        for span in self._node.ledger.classify(ids_of(list(numbers))):
            if span.outcome is Outcome.UNALLOCATED:
                return numbers[at]
            at += span.count
        return None

    # --- ids -----------------------------------------------------------------------------------------------

    async def _with_ids(self, messages: list[Message]) -> list[Message]:
        """Neighbours for those without an id, so that they rest and travel as runs; and when they came."""
        missing = sum(message.id is None for message in messages)
        next_id = await self._ids.take(missing) if missing else 0
        now_ms = time.time_ns() // 1_000_000
        ready: list[Message] = []
        for message in messages:
            task_id = message.id
            if task_id is None:
                task_id, next_id = next_id, next_id + 1
            ready.append(
                msgspec.structs.replace(message, id=task_id, submitted_ms=message.submitted_ms or now_ms)
            )
        return ready

    def _without_known(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """Leave out what came twice in this call, and what the ledger has decided. Counts what was known."""
        ids: list[TaskId] = []
        first: dict[TaskId, Message] = {}
        for message in messages:
            if message.id is not None and message.id not in first:
                first[message.id] = message
                ids.append(message.id)
        known = len(messages) - len(ids)
        batch = ids_of(ids)
        ordered = list(batch)
        fresh_ones: list[Message] = []
        at = 0
        for span in self._node.ledger.classify(batch):
            if span.outcome is not Outcome.NEW:
                known += span.count
            if span.outcome not in _DECIDED:
                fresh_ones += [first[task_id] for task_id in ordered[at : at + span.count]]
            at += span.count
        return fresh_ones, known

    async def _append(self, messages: Sequence[Message], all_messages: Sequence[Message]) -> None:
        if not messages:
            return
        try:
            await self._node.append(batches_of(messages))
        except Unsent as error:
            raise ApiError(503, f"nothing was stored: {error}", None, unknown=False) from error
        except UnknownAppend as error:
            ids = [_id_text(message) for message in all_messages]
            raise ApiError(
                504,
                f"may or may not be stored; send it again with these ids: {error}",
                None,
                unknown=True,
                ids=ids,
            ) from error


def _id_text(message: Message) -> str:
    return id_text(message.id) if message.id is not None else ""


def _bad(at: int, bulk: bool, field: str, rule: str) -> ApiError:
    """The field of one task, or of one among many."""
    where = f"tasks[{at}].{field}" if bulk else field
    return ApiError(400, f"{where}: {rule}", where)


def _messages(request: web.Request, raw: bytes, queues: Mapping[str, str]) -> tuple[list[Message], bool]:
    parts, bulk = _parts(request.content_type, raw)
    if not parts:
        raise ApiError(400, "tasks: there is none", "tasks")
    if len(parts) > TASKS_MAX:
        raise ApiError(413, f"tasks: {len(parts)} are too many for one call: at most {TASKS_MAX}", "tasks")
    agent = request.headers.get("User-Agent", "")[:80]
    sender = f"HTTP from {request.remote or 'somewhere'}" + (
        f" ({agent})" if agent.isprintable() and agent else ""
    )
    messages: list[Message] = []
    now_ms = time.time_ns() // 1_000_000
    for at, part in enumerate(parts):
        try:
            message = validate_message(part, queues)
        except InvalidTask as error:
            raise _bad(at, bulk, error.field, error.rule) from None
        if message.due_ms > now_ms + DUE_MS_MAX:
            raise _bad(at, bulk, "due", DUE_RULE)
        if message.then == ENQUEUED:
            raise _bad(at, bulk, "then", f"must be one of {', '.join(THENS)}, not {ENQUEUED!r}")
        if message.attempt != 1:
            raise _bad(at, bulk, "attempt", f"must be 1 for a new task, not {message.attempt}")
        messages.append(
            message if message.submitted_by else msgspec.structs.replace(message, submitted_by=sender)
        )
    return messages, bulk


def _parts(content_type: str, raw: bytes) -> tuple[list[bytes | msgspec.Raw], bool]:
    """The messages of a request, still encoded, and whether it was a bulk one."""
    if content_type == NDJSON:
        return [line for line in raw.split(b"\n") if line.strip()], True
    try:
        whole = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        if "tasks" not in whole:
            return [raw], False
        if len(whole) > 1:
            extra = next(name for name in whole if name != "tasks")
            raise ApiError(400, f"{extra}: unknown field beside tasks", extra)
        return list(msgspec.json.decode(whole["tasks"], type=list[msgspec.Raw])), True
    except UNDECODABLE as error:
        field, rule = explain(error, "body")
        raise ApiError(400, f"{field}: {rule}", field) from None
