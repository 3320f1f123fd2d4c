"""The task message: what stands in the log, and what travels to a node.

One task is the documented JSON object (``task.schema.json``). Tasks that share everything but id and body
travel and rest as one ``TaskBatch``; its JSON is the same object with ``bodies`` in place of ``body``, and
``count`` (range ids from ``id`` on) or ``ids`` (keyed ids).

Bodies are never parsed here. Encoding joins them as they are, decoding slices them out (``msgspec.Raw``), so
that a task costs a fraction of a microsecond in either direction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache

import msgspec

from dedup.ids import Ids, TaskId, id_text, ids_of, keyed_id, parse_id
from oncekeeper.errors import InvalidTask

BODY_BYTES_MAX = 256 * 1024
KEY_TEXT_BYTES_MAX = 512
TTR_MS_MAX = 7 * 24 * 3600 * 1000
MESSAGE_VERSION = 1
THENS = ("run", "enqueue")
"""What happens when a task is due: it runs at once on the node that holds it, or takes its turn in its queue."""
ENQUEUED = "enqueued"
"""The mark of a task that was delayed and takes its turn now; nobody submits it."""
BATCH_TASKS_MAX = 2048
"""How many tasks a row of a log holds at most; the reach of a search by id depends on it."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_MS = 86_400_000
_TIME_MS_MAX = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // timedelta(milliseconds=1)
_EXPLAINED_CHARS = 300  # of what a sender sent; the rest of it helps nobody


class TaskBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Some tasks of one handler and one queue with the same options. ``bodies`` runs parallel to ``ids``."""

    queue: str
    handler: str
    ids: Ids  # either one run, or keys only
    bodies: tuple[bytes, ...]  # each one a JSON text (an object)
    ttr_ms: int = 0  # 0: the handler's own
    due_ms: int = 0  # epoch; 0: at once
    then: str = ""  # what happens when it is due, one of THENS; "": "run"; or ENQUEUED
    attempt: int = 1
    keys: tuple[str, ...] = ()  # the user's idempotency keys, parallel to ids.keys; () for range ids
    traceparent: str = ""
    submitted_ms: int = 0  # epoch
    submitted_by: str = ""  # "host:pid program", for people

    def __len__(self) -> int:
        return len(self.bodies)

    def part(self, at: int, count: int) -> TaskBatch:
        """The tasks at positions ``at .. at + count - 1``."""
        if at == 0 and count >= len(self.bodies):
            return self
        return msgspec.structs.replace(
            self,
            ids=self.ids.part(at, count),
            bodies=self.bodies[at : at + count],
            keys=self.keys[at : at + count],
        )


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One task as somebody sent it; valid, but it may still want an id."""

    handler: str
    body: bytes
    id: TaskId | None = None
    queue: str = "default"
    ttr_ms: int = 0
    due_ms: int = 0
    then: str = ""
    attempt: int = 1
    key: str = ""
    traceparent: str = ""
    submitted_ms: int = 0
    submitted_by: str = ""

    def options(self) -> tuple[object, ...]:
        """All but id, key and body: tasks that are alike in these make one batch."""
        return (
            self.queue,
            self.handler,
            self.ttr_ms,
            self.due_ms,
            self.then,
            self.attempt,
            self.traceparent,
            self.submitted_ms,
            self.submitted_by,
        )


class _Wire(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    handler: str
    body: msgspec.Raw
    v: int = MESSAGE_VERSION
    id: str | None = None
    queue: str | None = None
    due: str | None = None
    then: str | None = None
    ttr_ms: int = 0
    attempt: int = 1
    key: str | None = None
    traceparent: str | None = None
    submitted: str | None = None
    submitted_by: str | None = None


class _Header(msgspec.Struct, kw_only=True):
    """A batch without its bodies, in the order in which people read it."""

    v: int
    queue: str
    handler: str
    id: str | msgspec.UnsetType | None = msgspec.UNSET
    count: int | msgspec.UnsetType = msgspec.UNSET
    ids: list[str] | msgspec.UnsetType = msgspec.UNSET
    key: str | msgspec.UnsetType | None = msgspec.UNSET
    keys: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    due: str | None = None
    then: str | msgspec.UnsetType | None = msgspec.UNSET
    ttr_ms: int = 0
    attempt: int = 1
    traceparent: str | None = None
    submitted: str | None = None
    submitted_by: str | None = None


class _Row(_Header, kw_only=True):
    bodies: list[msgspec.Raw]


UNDECODABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""What decoding JSON raises: the second for brackets nested a thousand deep, the third for what is no UTF-8."""

_encode = msgspec.json.Encoder().encode
_decode_wire = msgspec.json.Decoder(_Wire).decode
_decode_row = msgspec.json.Decoder(_Row).decode

# --- times and errors ---------------------------------------------------------------------------------------


def time_text(epoch_ms: int) -> str | None:
    """ISO 8601 in UTC with milliseconds; None for 0, which means "not set"."""
    if epoch_ms == 0:
        return None
    days, ms = divmod(epoch_ms, _DAY_MS)
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"{_date_text(days)}T{minutes // 60:02}:{minutes % 60:02}:{seconds:02}.{ms:03}Z"


@lru_cache(maxsize=1024)
def _date_text(days: int) -> str:
    """A log writes two times with each batch, and most of them lie within some hundred days."""
    return (_EPOCH + timedelta(days=days)).date().isoformat()


def parse_time(text: str | None, field: str) -> int:
    """Milliseconds since the epoch; 0 for None."""
    if text is None:
        return 0
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidTask(
            field, f"must be an ISO 8601 time such as 2026-01-31T12:00:00Z, not {text!r}"
        ) from None
    if time.tzinfo is None:
        raise InvalidTask(field, f"must name its time zone (a Z at the end for UTC), not {text!r}")
    # In UTC; the last hours of 9999 in the west are the year 10000 there, which could not be written again.
    if not 0 < (epoch_ms := (time - _EPOCH) // timedelta(milliseconds=1)) <= _TIME_MS_MAX:
        raise InvalidTask(field, f"must lie after 1970 and before 10000, not {text!r}")
    return epoch_ms


_AT = re.compile(r"(?s)(.*?)(?: - at `(?:key in )?\$?(.*)`)?")
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`")


def explain(error: Exception, whole: str) -> tuple[str, str]:
    """A msgspec error as (field, rule); ``whole`` names the field when the error is about all of it."""
    said = str(error)
    match = _AT.fullmatch(said)
    text, path = (match[1], match[2] or "") if match else (said, "")
    if about := _FIELD.fullmatch(text):
        path += "." + about[2]
        text = "missing" if about[1].startswith("missing") else "unknown field"
    else:
        text = text[:1].lower() + text[1:].replace("`", "")
    return path.lstrip(".")[:_EXPLAINED_CHARS] or whole, text[:_EXPLAINED_CHARS]


# --- one task -----------------------------------------------------------------------------------------------


def validate_message(
    raw: bytes | msgspec.Raw, queues: Mapping[str, str] | None = None, queue_default: str = "default"
) -> Message:
    """The message in ``raw``, or InvalidTask naming the field and the rule. Never parses the body.

    ``queues``: each handler's own, for messages that name none; ``queue_default`` is for the others. It is filled
    in before the id is made of the key: the queue is a part of what a key names.
    """
    try:
        wire = _decode_wire(raw)
    except UNDECODABLE as error:
        raise InvalidTask(*explain(error, "message")) from None
    if wire.v != MESSAGE_VERSION:
        raise InvalidTask("v", f"this version understands {MESSAGE_VERSION}, not {wire.v}")
    body = bytes(wire.body)
    queue = wire.queue if wire.queue is not None else (queues or {}).get(wire.handler, queue_default)
    key, task_id = wire.key or "", None
    check_options(wire.handler, queue, wire.ttr_ms, key if wire.key is not None else None)
    check_body(body)
    if wire.attempt < 1:
        raise InvalidTask("attempt", f"must be 1 or more, not {wire.attempt}")
    if wire.id is not None:
        try:
            task_id = parse_id(wire.id)
        except ValueError as error:
            raise InvalidTask("id", str(error)) from None
    if wire.key is not None:
        expected = keyed_id(queue, wire.key)
        if task_id is not None and task_id != expected:
            raise InvalidTask(
                "id",
                f"{wire.id} disagrees with key={wire.key!r} of queue {queue!r}: that is {id_text(expected)}",
            )
        task_id = expected
    if wire.traceparent and not _TRACEPARENT.fullmatch(wire.traceparent):
        raise InvalidTask("traceparent", f"must be a W3C traceparent, not {wire.traceparent!r}")
    return Message(
        handler=wire.handler,
        body=body,
        id=task_id,
        queue=queue,
        ttr_ms=wire.ttr_ms,
        due_ms=parse_time(wire.due, "due"),
        then=check_then(wire.then),
        attempt=wire.attempt,
        key=key,
        traceparent=wire.traceparent or "",
        submitted_ms=parse_time(wire.submitted, "submitted"),
        submitted_by=wire.submitted_by or "",
    )


def check_options(handler: str, queue: str, ttr_ms: int, key: str | None) -> None:
    """What a submitter may choose, by the same rules on every way in."""
    if not _NAME.fullmatch(handler):
        raise InvalidTask("handler", f"must match {_NAME.pattern}, not {handler[:80]!r}")
    if not _NAME.fullmatch(queue):
        raise InvalidTask("queue", f"must match {_NAME.pattern}, not {queue[:80]!r}")
    if not 0 <= ttr_ms <= TTR_MS_MAX:
        raise InvalidTask("ttr_ms", f"must be from 0 (the handler's own) to {TTR_MS_MAX}, not {ttr_ms}")
    if key is not None and not 1 <= len(key.encode(errors="surrogatepass")) <= KEY_TEXT_BYTES_MAX:
        raise InvalidTask("key", f"must have 1 to {KEY_TEXT_BYTES_MAX} bytes, not {len(key.encode())}")


def check_then(then: object) -> str:
    """What happens when a task is due; InvalidTask for what is none of THENS. What is left out is ""."""
    if then is None or then is msgspec.UNSET:
        return ""
    if then not in THENS and then != ENQUEUED:
        raise InvalidTask("then", f"must be one of {', '.join(THENS)}, not {str(then)[:40]!r}")
    return str(then)


def check_body(body: bytes) -> None:
    """``body`` is a JSON text already; here it must be an object of bounded size."""
    if len(body) > BODY_BYTES_MAX:
        raise InvalidTask(
            "body", f"has {len(body)} bytes, the most is {BODY_BYTES_MAX}: pass a reference instead"
        )
    if body.lstrip()[:1] != b"{":
        raise InvalidTask("body", "must be a JSON object: the handler's arguments by name")
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as error:
            # Nobody has looked into it yet, and whoever does later (a worker, a browser) could not read it.
            raise InvalidTask("body", f"must be UTF-8: {error.reason} at byte {error.start}") from None


def encode_task(batch: TaskBatch) -> bytes:
    """The message of a batch of exactly one task."""
    if len(batch) != 1:
        raise ValueError(f"a task message holds 1 task, the batch has {len(batch)}")
    header = _header(batch)
    header.id = id_text(next(iter(batch.ids)))
    header.key = batch.keys[0] if batch.keys and batch.keys[0] else None
    return _encode(header)[:-1] + b',"body":' + batch.bodies[0] + b"}"


def decode_task(raw: bytes) -> TaskBatch:
    """The inverse of encode_task; InvalidTask for what is no message, or has no id."""
    return batch_of([validate_message(raw)])


def batch_of(messages: list[Message]) -> TaskBatch:
    """Messages that differ in id, key and body only, as one batch."""
    for message in messages:
        if message.id is None:
            raise InvalidTask("id", "missing")
    first = messages[0]
    return TaskBatch(
        queue=first.queue,
        handler=first.handler,
        ids=ids_of([message.id for message in messages if message.id is not None]),
        bodies=tuple(message.body for message in messages),
        ttr_ms=first.ttr_ms,
        due_ms=first.due_ms,
        then=first.then,
        attempt=first.attempt,
        keys=tuple(message.key for message in messages) if any(message.key for message in messages) else (),
        traceparent=first.traceparent,
        submitted_ms=first.submitted_ms,
        submitted_by=first.submitted_by,
    )


def batches_of(messages: Iterable[Message]) -> list[TaskBatch]:
    """Messages (each with an id) gathered into as few batches as their order allows."""
    batches: list[TaskBatch] = []
    group: list[Message] = []
    for message in messages:
        if group and not _neighbours(group[-1], message):
            batches.append(batch_of(group))
            group = []
        group.append(message)
    if group:
        batches.append(batch_of(group))
    return batches


def _neighbours(one: Message, next_one: Message) -> bool:
    """Whether both fit one batch: alike but for id, key and body, and both keyed or consecutive."""
    if isinstance(one.id, int) and isinstance(next_one.id, int):
        adjacent = one.id + 1 == next_one.id
    else:
        adjacent = isinstance(one.id, bytes) and isinstance(next_one.id, bytes)
    return adjacent and one.options() == next_one.options()


# --- batches ------------------------------------------------------------------------------------------------


def encode_header(batch: TaskBatch) -> bytes:
    """What the tasks of a batch have in common, as a JSON object."""
    return _encode(_header(batch))


def _header(batch: TaskBatch) -> _Header:
    return _Header(
        v=MESSAGE_VERSION,
        queue=batch.queue,
        handler=batch.handler,
        due=time_text(batch.due_ms),
        then=batch.then or msgspec.UNSET,
        ttr_ms=batch.ttr_ms,
        attempt=batch.attempt,
        traceparent=batch.traceparent or None,
        submitted=time_text(batch.submitted_ms),
        submitted_by=batch.submitted_by or None,
    )


def encode_batch(batch: TaskBatch) -> bytes:
    """A batch as one JSON object. ValueError for ids that are neither one run nor keys only."""
    header = _header(batch)
    runs, keys = batch.ids.runs, batch.ids.keys
    if len(batch.ids) != len(batch.bodies) or not batch.bodies:
        raise ValueError(f"a batch has a body for each id: {len(batch.ids)} ids, {len(batch.bodies)} bodies")
    if len(runs) == 1 and not keys:
        header.id, header.count = str(runs[0][0]), runs[0][1]
    elif keys and not runs:
        header.ids = ["k" + key.hex() for key in keys]
        if batch.keys:
            header.keys = batch.keys
    else:
        raise ValueError(
            f"a batch has either one run of ids or keys only: {len(runs)} runs, {len(keys)} keys"
        )
    return b'%b,"bodies":[%b]}' % (_encode(header)[:-1], b",".join(batch.bodies))


def decode_batch(raw: bytes) -> TaskBatch:
    """The inverse of encode_batch; InvalidTask for anything else. Unknown fields are passed over."""
    try:
        row = _decode_row(raw)
    except UNDECODABLE as error:
        raise InvalidTask(*explain(error, "message")) from None
    if row.v != MESSAGE_VERSION:
        raise InvalidTask("v", f"this version understands {MESSAGE_VERSION}, not {row.v}")
    keys = row.keys or ()
    try:
        if row.ids:
            ids = ids_of([parse_id(text) for text in row.ids])
        elif row.id and row.count and row.count >= 1:
            start = parse_id(row.id)
            if row.count > 1:
                parse_id(str(int(row.id) + row.count - 1))
            ids = Ids(((int(start), row.count),)) if isinstance(start, int) else Ids()
        else:
            ids = Ids()
    except ValueError as error:
        raise InvalidTask("id", str(error)) from None
    if not row.bodies or len(ids) != len(row.bodies) or (ids.runs and ids.keys):
        raise InvalidTask("bodies", f"{len(row.bodies)} bodies stand beside {len(ids)} ids")
    if keys and len(keys) != len(ids.keys):
        raise InvalidTask("keys", f"{len(keys)} keys stand beside {len(ids.keys)} keyed ids")
    return TaskBatch(
        queue=row.queue,
        handler=row.handler,
        ids=ids,
        bodies=tuple(map(bytes, row.bodies)),
        ttr_ms=row.ttr_ms,
        due_ms=parse_time(row.due, "due"),
        then=check_then(row.then),
        attempt=row.attempt,
        keys=keys,
        traceparent=row.traceparent or "",
        submitted_ms=parse_time(row.submitted, "submitted"),
        submitted_by=row.submitted_by or "",
    )
