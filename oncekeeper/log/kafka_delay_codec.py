"""Delayed tasks as records of the topic ``PREFIX.delay``.

The key is ``ID/PARTITION/OFFSET``: the task, and the place in its queue at which it was read. An id alone would
not do: a task that was enqueued, read anew and handed on again (a retry) would be ended by the late tombstone of
its former place. The value is the task's message, with the time that it waits for as its ``due``; without a value
the record is a tombstone. The header ``delay`` says the rest:

    put|move  DUE_MS  run|enqueue  HEAD  BY

``HEAD`` is the first offset of what was put or moved together, ``BY`` names the process that wrote the record. A
place that waits already stays as it is by ``put``.

The number of a record's partition is that of the queue's (of whatever queue): its lowest twelve bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from dedup.ids import TaskId, id_text, parse_id
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.delayed import WAYS
from oncekeeper.log.kafka_codec import messages
from oncekeeper.log.kafka_delay_index import END, MOVE, PUT, Change

HEADER = "delay"
_PARTITIONS = (1 << 12) - 1
_KINDS = {PUT.encode(): PUT, MOVE.encode(): MOVE}
_WAYS = {way.encode(): number for number, way in enumerate(WAYS)}


class Record(Protocol):
    """What is used of ``confluent_kafka.Message``."""

    def key(self) -> bytes | None: ...

    def value(self) -> bytes | None: ...

    def headers(self) -> Any: ...


def source_of(partition: int, sources: int) -> int:
    """Where the records of a queue's partition stand."""
    return (partition & _PARTITIONS) % sources


def waiting(
    topic: str,
    sources: int,
    kind: str,
    partition: int,
    offset: int,
    due_ms: int,
    then: str,
    batch: TaskBatch,
    by: str,
) -> Iterator[dict[str, Any]]:
    """A record a task, as ``Producer.produce`` takes it. ``batch`` says the same due time."""
    source = source_of(partition, sources)
    headers = [(HEADER, f"{kind} {due_ms} {then} {offset} {by}".encode())]
    for at, (task_id, (_, value)) in enumerate(zip(batch.ids, messages(batch), strict=True), offset):
        key = _key(task_id, partition, at)
        yield {"topic": topic, "partition": source, "key": key, "value": value, "headers": headers}


def ended(
    topic: str, sources: int, partition: int, tasks: Iterable[tuple[int, TaskId]]
) -> Iterator[dict[str, Any]]:
    """Tombstones of tasks, each with its offset."""
    source = source_of(partition, sources)
    for offset, task_id in tasks:
        yield {"topic": topic, "partition": source, "key": _key(task_id, partition, offset), "value": None}


def _key(task_id: TaskId, partition: int, offset: int) -> bytes:
    return f"{id_text(task_id)}/{partition}/{offset}".encode()


def change_of(record: Record) -> tuple[Change, str]:
    """What a record says, and who wrote it. ValueError for one that is none of ours."""
    key, value = record.key(), record.value()
    text, partition, offset = (key or b"").decode().split("/")
    task_id, number, at = parse_id(text), int(partition), int(offset)
    if value is None:
        return Change(END, number, at, task_id), ""
    for name, said in record.headers() or ():
        if name == HEADER:
            kind, due_ms, way, head, by = said.split(b" ")
            if kind not in _KINDS or way not in _WAYS:
                break
            change = Change(_KINDS[kind], number, at, task_id, int(due_ms), _WAYS[way], int(head), value)
            return change, by.decode()
    raise ValueError(f"its header {HEADER!r} is missing, or is none of ours")
