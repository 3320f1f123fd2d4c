"""Delayed tasks on Kafka: a compacted topic is the source of truth, and an index on this disk finds what is in it.

    defer    records, confirmed by the brokers; then the position of the queue may pass them
    move     the same records with another time
    drop     tombstones
    enqueue  appended to the queue anew, then tombstones: a crash in between leaves a task twice, and one claim wins

Every write waits until it is in the index of this process too, so that who wrote finds what it wrote; and what is
read or judged is read from an index that was at the topic's end when the call began (kafka_delay_follow.py). Kafka
has no "all or none" over partitions: what was stored of a call that failed is as it should be, and the call is
repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec

from dedup.ids import TaskId
from oncekeeper.envelope import TaskBatch
from oncekeeper.errors import LogUnusable
from oncekeeper.log.delayed import Deferral, Delayed, Place, enqueued, gathered
from oncekeeper.log.kafka_admin import Admin
from oncekeeper.log.kafka_delay_codec import ended, waiting
from oncekeeper.log.kafka_delay_follow import FollowedReads, Follower
from oncekeeper.log.kafka_delay_index import MOVE, PUT
from oncekeeper.log.kafka_rules import Topic
from oncekeeper.log.kafka_send import Sender
from oncekeeper.log.port import Appended, Fetched, Undecodable, UnknownAppend, Unsent

WRITE_S = 10.0
READ_S = 3.0  # somebody waits for the answer
Records = Iterator[dict[str, Any]]


class Queues(Protocol):
    """What of the log appends to a partition that is given."""

    def append_to(self, batches: Sequence[tuple[int, TaskBatch]]) -> list[Appended]: ...


class KafkaDelays:
    """DelayStore. One thread at a time."""

    def __init__(self, log: Queues, admin: Admin, topic: Topic, sender: Sender, follower: Follower) -> None:
        self._log = log
        self._admin = admin
        self._topic = topic
        self._sender = sender
        self._follower = follower
        self._reads = FollowedReads(follower)

    def close(self) -> None:
        self._reads.close()
        self._sender.close()

    def catch_up(self, within_s: float = WRITE_S) -> None:
        """Until the index has everything that stands in the topic now. Raises LogUnusable."""
        places = [(self._topic.name, source) for source in range(self._topic.partitions)]
        ends = self._admin.ends(places)
        self._follower.wait({source: end for (_, source), end in ends.items()}, within_s)

    # --- writing ------------------------------------------------------------------------------------------------

    @contextmanager
    def _nothing_sent(self) -> Iterator[None]:
        try:
            yield
        except LogUnusable as error:
            raise Unsent(str(error)) from error

    def _send(self, records: Iterable[dict[str, Any]]) -> None:
        with self._nothing_sent():
            self._sender.send_each(records, self._topic.message_bytes_max)
        try:
            self.catch_up()
        except LogUnusable as error:
            raise UnknownAppend(f"stored, but not indexed: {error}") from error

    def _waiting(self, kind: str, row: Delayed, batch: TaskBatch) -> Records:
        batch = msgspec.structs.replace(batch, due_ms=row.due_ms)
        sources, by = self._topic.partitions, self._follower.name
        return waiting(
            self._topic.name, sources, kind, row.partition, row.offset, row.due_ms, row.then, batch, by
        )

    def _end(self, rows: Iterable[Delayed]) -> None:
        tombstones: list[dict[str, Any]] = []
        with self._nothing_sent():
            for row in rows:
                tasks = self._reads.ask(lambda file: file.ids(row))  # noqa: B023  # asked at once
                tombstones += ended(self._topic.name, self._topic.partitions, row.partition, tasks)
        if tombstones:
            self._send(tombstones)

    def defer(self, tasks: Sequence[Deferral]) -> None:
        if not tasks:
            return
        with self._nothing_sent():
            self.catch_up()
            free = [part for task in tasks for part in self._free(task)]
        if free:
            self._send(record for row, batch in free for record in self._waiting(PUT, row, batch))

    def _free(self, task: Deferral) -> Iterator[tuple[Delayed, TaskBatch]]:
        """The parts at whose places nothing waits. What stands was put by whoever read it before."""
        end = task.offset + len(task.batch)
        place = Place(task.partition, task.offset, len(task.batch))
        taken = self._reads.ask(lambda file: file.standing(place))
        at = task.offset
        for row in (*taken, Delayed(0, task.partition, end)):
            if row.offset > at:
                free = Delayed(task.due_ms, task.partition, at, row.offset - at, task.then)
                yield free, task.batch.part(at - task.offset, free.count)
            at = row.end

    def move(self, places: Sequence[Place], due_ms: int, was_ms: int | None = None) -> int:
        with self._nothing_sent():
            self.catch_up()
            standing = [row for row in self._standing(places) if was_ms in (None, row.due_ms)]
            found = self._reads.ask(lambda file: file.fetch(standing))
        moved = [
            (msgspec.structs.replace(row, due_ms=due_ms), item.batch)
            for row, item in found
            if isinstance(item, Fetched)
        ]
        if moved:
            self._send(record for row, batch in moved for record in self._waiting(MOVE, row, batch))
        return sum(row.count for row, _ in moved)

    def _standing(self, places: Iterable[Place]) -> list[Delayed]:
        return [
            row
            for place in gathered(places)
            for row in self._reads.ask(lambda file: file.standing(place))  # noqa: B023
        ]

    def drop(self, places: Iterable[Place]) -> int:
        with self._nothing_sent():
            standing = self._standing(places)
        self._end(standing)
        return sum(row.count for row in standing)

    def enqueue(self, rows: Sequence[Delayed]) -> list[Appended]:
        if not rows:
            return []
        with self._nothing_sent():
            self.catch_up()
            found = self._reads.ask(lambda file: file.fetch(rows))
        # What cannot be decoded stays: whoever fetches it gives it to dead letters.
        standing = [(row, item) for row, item in found if isinstance(item, Fetched)]
        again = [(row.partition, enqueued(item.batch, row.due_ms)) for row, item in standing]
        appended = self._log.append_to(again)
        self._end(row for row, _ in standing)
        return appended

    # --- reading ------------------------------------------------------------------------------------------------

    def due(
        self, partitions: Iterable[int], until_ms: int, after: Delayed | None, limit: int
    ) -> list[Delayed]:
        self.catch_up(READ_S)
        return self._reads.ask(lambda file: file.due(partitions, until_ms, after, limit))

    def fetch(self, rows: Sequence[Delayed]) -> list[tuple[Delayed, Fetched | Undecodable]]:
        self.catch_up(READ_S)
        return self._reads.ask(lambda file: file.fetch(rows))

    def find(self, task_id: TaskId) -> list[Delayed]:
        self.catch_up(READ_S)
        return self._reads.find(task_id)

    def standing(self, place: Place) -> list[Delayed]:
        self.catch_up(READ_S)
        return self._reads.ask(lambda file: file.standing(place))

    def counts(self) -> dict[int, int]:
        self.catch_up(READ_S)
        return self._reads.counts()
