"""Task messages as Kafka's records: one record, one task.

What was submitted together differs in id and body only. So a record is written with these two last, and read in a
short way if it begins as its neighbour did: the text up to the id is equal, the id is the next one, and what
follows is one JSON object and the end. That is the whole grammar of such a record, so the short way believes
nothing that the long way (``validate_message``) would refuse; whatever does not fit it takes the long way.
In a keyed record the key stands between id and body, and the id must be the key's own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from dedup.ids import Ids, keyed_id
from oncekeeper.envelope import (
    BATCH_TASKS_MAX,
    BODY_BYTES_MAX,
    UNDECODABLE,
    Message,
    TaskBatch,
    batch_of,
    encode_header,
    validate_message,
)
from oncekeeper.errors import InvalidTask
from oncekeeper.log.cut import ROW_BYTES_MAX
from oncekeeper.log.port import Fetched, Gap, Item, Undecodable

_ID = b',"id":"'
_BODY = b'","body":'
_KEY = b'","key":'
# Behind the "k" of the id: its digits, a key in which nothing is escaped, and the body.
_KEYED = re.compile(rb'([0-9a-f]{32})","key":"([ !#-\[\]-~]{1,512})","body":(\{.*\})\}', re.DOTALL)
_check_json = msgspec.json.Decoder(msgspec.Raw).decode
_text = msgspec.json.Encoder().encode


class Record(Protocol):
    """What is used of ``confluent_kafka.Message``."""

    def offset(self) -> int | None: ...

    def value(self) -> bytes | None: ...


def messages(batch: TaskBatch) -> Iterator[tuple[bytes | None, bytes]]:
    """(key, value) of each task's record. The key is the user's idempotency key."""
    prefix = encode_header(batch)[:-1] + _ID
    if batch.ids.runs:
        ids = itertools.chain.from_iterable(range(start, start + count) for start, count in batch.ids.runs)
        for number, body in zip(ids, batch.bodies, strict=True):
            yield None, b'%b%d","body":%b}' % (prefix, number, body)
        return
    keys = batch.keys or ("",) * len(batch.ids.keys)
    for digest, key, body in zip(batch.ids.keys, keys, batch.bodies, strict=True):
        head = b"%bk%b" % (prefix, digest.hex().encode())
        if key:
            yield key.encode(), b'%b","key":%b,"body":%b}' % (head, _text(key), body)
        else:
            yield None, b'%b","body":%b}' % (head, body)


def items(
    number: int, topic: str, kafka_partition: int, records: Sequence[Record], queue: str = "default"
) -> list[Item]:
    """Records of one partition, in order, as the items of a read: neighbours in one batch, gaps named.

    ``number`` is the partition's number in the port. A record without an id gets one from its place, and
    one that names no queue is of ``queue``, the topic's own.
    """
    return _Reading(number, topic, kafka_partition, queue).read(records)


class _Reading:
    def __init__(self, number: int, topic: str, kafka_partition: int, queue: str) -> None:
        self._queue = queue
        self._number = number
        self._place = f"{topic}/{kafka_partition}"
        self._items: list[Item] = []
        self._base = 0
        self._group: list[
            Message
        ] = []  # the first of the batch that is being gathered, or all of it if keyed
        self._bodies: list[bytes] = []  # of a batch of range ids
        self._bytes = 0  # of the bodies that are being gathered

    def read(self, records: Sequence[Record]) -> list[Item]:
        expected = -1
        prefix, next_id = b"", 0  # of the short way; without a prefix it is closed
        keyed = b""  # the same for keyed records
        bodies = self._bodies
        for record in records:
            offset, value = record.offset(), record.value()
            if offset is None:
                raise ValueError("a record without an offset is an error's, and is no task")
            if expected not in (-1, offset):
                self._flush()
                self._items.append(Gap(self._number, expected, offset - expected))
                prefix = keyed = b""
            expected = offset + 1
            if prefix and value is not None:
                head = b'%b%d","body":' % (prefix, next_id)
                if value.startswith(head) and self._has_room(len(bodies)):
                    body = value[len(head) : -1]
                    if value.endswith(b"}") and _is_body(body):
                        bodies.append(body)
                        self._bytes += len(body)
                        next_id += 1
                        continue
            if keyed and value is not None and value.startswith(keyed) and self._has_room(len(self._group)):
                found = _next_keyed(value, len(keyed), self._group[0])
                if found is not None:
                    self._group.append(found)
                    self._bytes += len(found.body)
                    continue
            message = self._long_way(offset, value)
            prefix = keyed = b""
            if message is None or value is None:
                continue
            if isinstance(message.id, int):
                prefix, next_id = _prefix_of(value, message), message.id + 1
            elif message.key:
                keyed = _keyed_prefix_of(value, message)
        self._flush()
        return self._items

    def _long_way(self, offset: int, value: bytes | None) -> Message | None:
        try:
            if value is None:
                raise InvalidTask("message", "the record has no value (a tombstone)")
            message = validate_message(value, queue_default=self._queue)
        except InvalidTask as error:
            self._flush()
            self._items.append(Undecodable(self._number, offset, 1, value or b"", str(error)))
            return None
        if message.id is None:
            # Whoever reads this place again makes the same id of it.
            message = msgspec.structs.replace(message, id=keyed_id("kafka", f"{self._place}/{offset}"))
        if not self._joins(message):
            self._flush()
            self._base = offset
        self._bytes += len(message.body)
        if isinstance(message.id, int):
            if not self._group:
                self._group.append(message)
            self._bodies.append(message.body)
        else:
            self._group.append(message)
        return message

    def _joins(self, message: Message) -> bool:
        """Whether the message belongs to the batch that is being gathered."""
        if not self._group:
            return False
        first = self._group[0]
        if isinstance(first.id, int):
            adjacent = first.id + len(self._bodies) == message.id
            count = len(self._bodies)
        else:
            adjacent = isinstance(message.id, bytes)
            count = len(self._group)
        return adjacent and self._has_room(count) and first.options() == message.options()

    def _has_room(self, count: int) -> bool:
        return count < BATCH_TASKS_MAX and self._bytes < ROW_BYTES_MAX

    def _flush(self) -> None:
        if not self._group:
            return
        first = self._group[0]
        batch = batch_of(self._group)
        if isinstance(first.id, int):
            ids = Ids(((first.id, len(self._bodies)),))
            batch = msgspec.structs.replace(batch, ids=ids, bodies=tuple(self._bodies))
        self._items.append(Fetched(self._number, self._base, batch))
        self._group.clear()
        self._bodies.clear()
        self._bytes = 0


def _prefix_of(value: bytes, message: Message) -> bytes:
    """The text up to the id, if the record is written as ours are; else empty.

    All else in an envelope is scalar, and a quote within a string is escaped. So if the record ends with this id
    and this body, then these are its own and not text within its body.
    """
    tail = str(message.id).encode() + _BODY + message.body + b"}"
    at = len(value) - len(tail)
    return value[:at] if value.endswith(tail) and value[:at].endswith(_ID) else b""


def _keyed_prefix_of(value: bytes, message: Message) -> bytes:
    """The same for a keyed record, up to the ``k`` of its id."""
    assert isinstance(message.id, bytes)
    key = _text(message.key)
    tail = b'k%b%b%b,"body":%b}' % (message.id.hex().encode(), _KEY, key, message.body)
    at = len(value) - len(tail)
    return value[: at + 1] if value.endswith(tail) and value[:at].endswith(_ID) else b""


def _next_keyed(value: bytes, at: int, first: Message) -> Message | None:
    """The message of a record that is written as ``first`` was up to ``at``; None: let the long way see."""
    match = _KEYED.fullmatch(value, at)
    if match is None or not _is_body(match[3]):
        return None
    digest, key = bytes.fromhex(match[1].decode()), match[2].decode()
    if digest != keyed_id(first.queue, key):
        return None
    return msgspec.structs.replace(first, id=digest, key=key, body=match[3])


def _is_body(body: bytes) -> bool:
    if body[:1] != b"{" or len(body) > BODY_BYTES_MAX or not body.isascii():
        return False  # the long way says what is wrong, if anything is
    try:
        _check_json(body)
    except UNDECODABLE:
        return False
    return True
