"""The task log on Kafka: one record is one task, one queue is one topic.

Nodes that consume get their partitions by ``kafka_group``; this handle does the rest: it appends, reads where it is
told (listings, evidence), asks for ends and positions, keeps what is put aside, and deletes what is done. It holds
an admin client, and a producer and a consumer without a group, each made when it is first needed.

What SQLite promises and Kafka cannot:

- Nothing is all or none over partitions. A call of which a part was stored raises UnknownAppend; the same ids again
  are safe, as ever.
- A person can rewind the group, and positions go back. Everything is recognised then, and discarded.
- ``commit`` works only while the group has no members: a node commits by its membership.
- ``find`` looks at what is not committed yet.
- The age of a record is by the timestamp that its producer gave it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dedup.ids import Ids, TaskId, id_text
from oncekeeper.envelope import TaskBatch, encode_task
from oncekeeper.errors import LogUnusable
from oncekeeper.log.cut import cut, partition_of_key
from oncekeeper.log.kafka_admin import Admin, Place
from oncekeeper.log.kafka_aside import AsideTopics
from oncekeeper.log.kafka_codec import items, messages
from oncekeeper.log.kafka_delay_follow import Follower
from oncekeeper.log.kafka_delayed import KafkaDelays
from oncekeeper.log.kafka_names import Address, Names, parse_url
from oncekeeper.log.kafka_read import Passed, Reader
from oncekeeper.log.kafka_rules import RETENTION_MS_MIN, Demands, Topic
from oncekeeper.log.kafka_send import SEND_TIMEOUT_MS, Row, Sender
from oncekeeper.log.kafka_settings import KafkaSettings
from oncekeeper.log.kafka_topics import Topics, claim
from oncekeeper.log.port import Appended, Aside, Fetched, Gap, Item, Located, UnknownAppend, Unsent

FIND_RECORDS_MAX = 2_000_000
FIND_S = 10.0
_RECORD_BYTES = 128  # what Kafka adds to a record and to its batch


def open_kafka(
    url: str,
    *,
    cluster_id: str | None = None,
    create: bool = False,
    partitions: int | None = None,
    replication: int | None = None,
    settings: KafkaSettings | Mapping[str, str] | None = None,
    index_path: str | os.PathLike[str] | None = None,
    send_timeout_ms: int = SEND_TIMEOUT_MS,
    retention_ms_min: int = RETENTION_MS_MIN,
) -> KafkaLog:
    """Open the log at ``url`` (``kafka://HOST:PORT[,…][/PREFIX]``); LogUnusable says why it cannot be.

    ``create`` makes the topics that are missing, with ``partitions`` (default 12) and ``replication`` (default 3,
    as far as there are brokers); those that are there must have as many at least. ``index_path``: the SQLite file
    for what lies aside; in memory if not given. A send is given up after ``send_timeout_ms``. Topics that others
    made must keep what they hold for ``retention_ms_min`` at least.
    """
    address = parse_url(url)
    names = Names(address.prefix)
    given = settings if isinstance(settings, KafkaSettings) else KafkaSettings(settings)
    admin = Admin(address, given, check_version=create)
    admin.connect()
    topics = Topics(admin, names, Demands(partitions, replication, retention_ms_min))
    topics.open(create)
    log = KafkaLog(address, given, admin, topics, names, index_path, send_timeout_ms)
    if cluster_id is not None:
        try:
            log.claim(cluster_id, create)
        except (Unsent, UnknownAppend) as error:
            log.close()
            raise LogUnusable(str(error)) from error
        except LogUnusable:
            log.close()
            raise
    return log


class KafkaLog:
    """TaskLog over a Kafka cluster. One thread at a time."""

    def __init__(
        self,
        address: Address,
        settings: KafkaSettings,
        admin: Admin,
        topics: Topics,
        names: Names,
        index_path: str | os.PathLike[str] | None,
        send_timeout_ms: int,
    ) -> None:
        self.address = address
        self.names = names
        self._settings = settings
        self._admin = admin
        self._topics = topics
        self._sender = Sender(address, settings, send_timeout_ms)
        self._a_reader: Reader | None = None
        self._aside = AsideTopics(topics.aside, admin, self._reader, self._sender, index_path)
        # Many clients that each submit one task must not all start with the same partition.
        self._turns: dict[str, int] = {}
        self._send_timeout_ms = send_timeout_ms
        self.delays: KafkaDelays | None = None
        """None: here they are not kept (``keep_delayed``)."""

    @property
    def partitions(self) -> int:
        """Those of the default queue."""
        return self._topics.counts[self.names.default]

    def close(self) -> None:
        self._sender.close()
        if self._a_reader is not None:
            self._a_reader.close()
            self._a_reader = None
        self._aside.close()
        if self.delays is not None:
            self.delays.close()

    def keep_delayed(self, follower: Follower) -> KafkaDelays:
        """Delayed tasks need an index, which one thread of a process maintains for all of its handles."""
        # A sender of its own: the topic takes larger messages than those of tasks.
        sender = Sender(self.address, self._settings, self._send_timeout_ms)
        self.delays = KafkaDelays(self, self._admin, self._topics.delay, sender, follower)
        return self.delays

    def claim(self, cluster_id: str, create: bool) -> None:
        claim(self._admin, self._reader(), self._sender, self._topics.cluster, cluster_id, create)

    def _reader(self) -> Reader:
        if self._a_reader is None:
            self._a_reader = Reader(self.address, self._settings, self.names.group, self._admin.ends)
        return self._a_reader

    # --- writing ------------------------------------------------------------------------------------------------

    def append(self, batches: Sequence[TaskBatch]) -> list[Appended]:
        """Store batches, each confirmed by the brokers. Runs are spread over a queue's partitions."""
        pieces: list[tuple[Topic, int, TaskBatch]] = []
        try:
            for queue in dict.fromkeys(batch.queue for batch in batches):
                topic = self._topics.of_queue(queue)
                pieces += self._cut([batch for batch in batches if batch.queue == queue], topic)
        except LogUnusable as error:
            raise Unsent(str(error)) from error
        return self._append(pieces)

    def append_to(self, batches: Sequence[tuple[int, TaskBatch]]) -> list[Appended]:
        """``append`` to partitions that are given, whole."""
        pieces = []
        try:
            for number, batch in batches:
                name, partition = self._place(number)
                pieces.append((self._topics.of_queue(self.names.queue(name)), partition, batch))
        except (LogUnusable, ValueError) as error:  # the second: its topic is gone
            raise Unsent(str(error)) from error
        return self._append(pieces)

    def _append(self, pieces: Sequence[tuple[Topic, int, TaskBatch]]) -> list[Appended]:
        if not pieces:
            return []
        limit = min(self._limit(topic) for topic in (self._topics.default, *(piece[0] for piece in pieces)))
        for topic, _, piece in pieces:
            self._check_size(piece, topic)
        rows: list[Row] = []
        try:
            self._sender.send(self._rows(pieces, rows), limit)
        except LogUnusable as error:
            raise Unsent(str(error)) from error
        except (Unsent, UnknownAppend):
            for topic, _, _ in pieces:
                self._topics.forget(topic.name)  # it may have been deleted, or changed
            raise
        return [appended for row in rows for appended in self._appended(row)]

    def _cut(self, batches: Sequence[TaskBatch], topic: Topic) -> Iterator[tuple[Topic, int, TaskBatch]]:
        turn = self._turns.get(topic.name)
        if turn is None:
            turn = random.randrange(topic.partitions)
        for partition, piece in cut(batches, topic.partitions, turn):
            self._turns[topic.name] = partition + 1
            yield topic, partition, piece

    def _rows(self, pieces: Sequence[tuple[Topic, int, TaskBatch]], rows: list[Row]) -> Iterator[Row]:
        """Encoded one by one, while those before are on their way."""
        for topic, partition, piece in pieces:
            if piece.keys:
                found = [{"key": key, "value": value} for key, value in messages(piece)]
            else:
                found = [{"value": value} for _, value in messages(piece)]
            row = Row(topic.name, partition, found)
            rows.append(row)
            yield row

    def _appended(self, row: Row) -> Iterator[Appended]:
        """Others' records may stand between those of a row."""
        number = self.names.number(row.topic, row.partition)
        offsets = sorted(row.offsets)
        if offsets[-1] - offsets[0] == len(offsets) - 1:
            yield Appended(number, offsets[0], len(offsets))
            return
        start = 0
        for at in range(1, len(offsets) + 1):
            if at == len(offsets) or offsets[at] != offsets[at - 1] + 1:
                yield Appended(number, offsets[start], at - start)
                start = at

    def _limit(self, topic: Topic) -> int:
        """Bytes of a message, by the topic and by our own settings."""
        ours = self._settings.get("message.max.bytes")
        return min(topic.message_bytes_max, int(ours) if ours else 1_000_000_000)

    def _check_size(self, piece: TaskBatch, topic: Topic) -> None:
        """Before anything is sent: a part of a call that is stored cannot be taken back."""
        longest = max(map(len, piece.bodies))
        room = self._limit(topic) - _RECORD_BYTES
        if longest + 4096 <= room:  # an envelope is shorter
            return
        for at in range(len(piece)):
            one = piece.part(at, 1)
            size = len(encode_task(one)) + (len(one.keys[0].encode()) if one.keys else 0)
            if size > room:
                raise Unsent(
                    f"{self.address}: task {id_text(next(iter(one.ids)))} has {size} bytes, topic {topic.name} "
                    f"takes {room} (its max.message.bytes is {topic.message_bytes_max}): nothing was sent"
                )

    def commit(self, positions: Mapping[int, int]) -> None:
        """Move positions forward, in a group without members. ValueError for one above its partition's end."""
        if not positions:
            return
        try:
            places = {number: self._place(number) for number in positions}
            ends = self._admin.ends(places.values())
            standing = self._standing(places.values())
        except LogUnusable as error:
            raise Unsent(str(error)) from error
        for number, place in places.items():
            if positions[number] > ends[place]:
                raise ValueError(
                    f"partition {number}: position={positions[number]} is above its end={ends[place]}"
                )
        moved = {
            place: positions[number]
            for number, place in places.items()
            if positions[number] > standing.get(place, 0)
        }
        if not moved:
            return
        try:
            self._admin.commit(self.names.group, moved)
        except LogUnusable as error:
            raise UnknownAppend(str(error)) from error

    def retain(self, keep_ms: int, now_ms: int) -> int:
        """DeleteRecords below the positions, up to the first record that is younger than keep_ms."""
        try:
            return self._retain(keep_ms, now_ms)
        except LogUnusable as error:
            raise Unsent(str(error)) from error

    def _retain(self, keep_ms: int, now_ms: int) -> int:
        here = self._places()
        committed = self._standing(here)
        lows = self._admin.lows(committed)
        some = {place: at for place, at in committed.items() if at > lows[place]}
        younger = self._admin.since(some, max(0, now_ms - keep_ms + 1))
        bounds = {place: at if younger[place] < 0 else min(at, younger[place]) for place, at in some.items()}
        after = self._admin.delete_below({place: at for place, at in bounds.items() if at > lows[place]})
        return sum(low - lows[place] for place, low in after.items())

    # --- reading ------------------------------------------------------------------------------------------------

    def read(self, partition: int, offset: int, tasks_max: int, bytes_max: int) -> list[Item]:
        topic, kafka_partition = self._place(partition)
        reader = self._reader()
        at = offset
        for _ in range(3):
            try:
                records, after = reader.read(topic, kafka_partition, at, tasks_max, bytes_max)
            except Passed:
                place = (topic, kafka_partition)
                if at >= self._admin.ends([place])[place]:
                    return []
                at = max(
                    at, self._admin.lows([place])[place]
                )  # what retention took is left out, and shows by the first item's base
                continue
            found = items(partition, topic, kafka_partition, records, self.names.queue(topic))
            first = found[0].base if found else after
            if first > at:
                found.insert(0, Gap(partition, at, first - at))
            if found and after > found[-1].end:
                found.append(Gap(partition, found[-1].end, after - found[-1].end))
            return found
        raise LogUnusable(
            f"{self.address}: {topic}/{kafka_partition}: it is deleted faster than it can be read"
        )

    def ends(self) -> dict[int, int]:
        here = self._places()
        ends = self._admin.ends(here)
        return {number: ends[place] for place, number in here.items()}

    def committed(self) -> dict[int, int]:
        """0 where no position was committed, or the lowest offset that is left."""
        here = self._places()
        standing = self._standing(here)
        lows = self._admin.lows(place for place in here if place not in standing)
        return {
            number: standing[place] if place in standing else lows[place] for place, number in here.items()
        }

    def _standing(self, places: Iterable[Place]) -> dict[Place, int]:
        """The positions that were committed."""
        reader, wanted = self._reader(), list(places)
        return self._admin.ask(
            f"positions of group {self.names.group}", lambda within_s: reader.committed(wanted, within_s)
        )

    def find(self, task_id: TaskId) -> list[Located]:
        """Every place above the committed positions where the id stands.

        Kafka has no index: this reads what waits. A keyed task is looked for in its key's partitions first, and in
        all if it is not there (another client chose the partition). LogUnusable beyond FIND_RECORDS_MAX records or
        FIND_S seconds, if nothing was found until then.
        """
        here = self._places()
        standing = self._standing(here)
        lows, ends = self._admin.lows(here), self._admin.ends(here)
        starts = {place: max(standing.get(place, 0), lows[place]) for place in here}
        open_places = {place: at for place, at in starts.items() if at < ends[place]}
        until = time.monotonic() + FIND_S
        if isinstance(task_id, bytes):
            counts: dict[str, int] = {}
            for topic, _ in here:
                counts[topic] = counts.get(topic, 0) + 1
            likely = {
                place: at
                for place, at in open_places.items()
                if place[1] == partition_of_key(task_id, counts[place[0]])
            }
            if found := self._find(task_id, likely, until):
                return found
        return self._find(task_id, open_places, until)

    def _find(self, task_id: TaskId, places: Mapping[Place, int], until: float) -> list[Located]:
        if not places:
            return []
        text = f'"{id_text(task_id)}"'.encode()
        found: list[Located] = []
        looked = 0
        for records in self._reader().scan(places):
            for record in records:
                value = record.value()
                # A range id stands in its message, as it is; a keyed one may be left out.
                if value is None or (text not in value and (isinstance(task_id, int) or b'"id":"k' in value)):
                    continue
                topic, partition = record.topic() or "", record.partition() or 0
                number = self.names.number(topic, partition)
                for item in items(number, topic, partition, [record], self.names.queue(topic)):
                    if isinstance(item, Fetched) and next(iter(item.batch.ids)) == task_id:
                        found.append(Located(number, item.base, item.batch))
            looked += len(records)
            if looked > FIND_RECORDS_MAX or time.monotonic() > until:
                if found:
                    break
                raise LogUnusable(
                    f"{self.address}: task {id_text(task_id)} is not among the first {looked} tasks that wait, "
                    "and more were not looked at"
                )
        return sorted(found, key=lambda located: (located.partition, located.offset))

    def _place(self, number: int) -> Place:
        """ValueError for a number of no partition."""
        if (place := self._known_place(number)) is None:
            self._topics.of_queues()
            place = self._known_place(number)
        if place is None:
            raise ValueError(
                f"partition={number} must be below {self.partitions}, or be one of another queue"
            )
        return place

    def _known_place(self, number: int) -> Place | None:
        try:
            topic, partition = self.names.place(number)
        except KeyError:
            return None
        return (topic, partition) if partition < self._topics.counts.get(topic, 0) else None

    def _places(self) -> dict[Place, int]:
        """The partitions of every queue, with their numbers, in the numbers' order."""
        found = {
            (topic, partition): self.names.number(topic, partition)
            for topic, count in self._topics.of_queues().items()
            for partition in range(count)
        }
        return dict(sorted(found.items(), key=lambda each: each[1]))

    # --- put aside ----------------------------------------------------------------------------------------------

    def put_aside(self, tasks: Sequence[Aside]) -> None:
        self._aside.put(tasks)

    def aside(self, kind: str, after: int, limit: int) -> list[tuple[int, Aside]]:
        return self._aside.page(kind, after, limit)

    def find_aside(self, ids: Ids) -> list[Aside]:
        return self._aside.find(ids)

    def drop_aside(self, tasks: Sequence[Aside]) -> None:
        self._aside.drop(tasks)
