"""Following the topic of delayed tasks into this process's index.

One thread reads all partitions of the topic, with a consumer of its own that belongs to no group, and applies
what it reads; everybody else reads the file. Each node indexes the tasks of all queues' partitions and not only
of its own:

- Whoever takes a partition over has its tasks already, up to what was written in the last moments.
- Any node finds, moves and drops any task, whoever owns its partition.
- Nothing has to agree with the consumer group: no rebuild waits for a rebalance, and none waits for a rebuild.

It costs each node the disk and the processor time of all delayed tasks.

Once a second the broker is asked for the topic's ends; when the positions reach them, the index is as of the
asking. Rows are given to be run only by an index that is as of the last ``expect_current``: the node's joining, or
a reschedule that this node did not see at once. So nothing starts by a time from which it was moved. An index that
was current and lost the broker goes on: what waits is started when it is due.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from dedup.ids import TaskId
from oncekeeper.errors import LogUnusable
from oncekeeper.log.delayed import Delayed, Place
from oncekeeper.log.kafka_admin import Admin
from oncekeeper.log.kafka_delay_codec import change_of
from oncekeeper.log.kafka_delay_index import END, Change, DelayIndex, IndexDamaged, IndexReads, IndexUnusable
from oncekeeper.log.kafka_names import Address, Names
from oncekeeper.log.kafka_rules import Topic
from oncekeeper.log.kafka_settings import KafkaSettings
from oncekeeper.log.port import Fetched, Undecodable

T = TypeVar("T")
_log = logging.getLogger("oncekeeper.kafka")
_quiet = logging.Logger("oncekeeper.kafka.consumer", logging.CRITICAL)  # the error callback says what matters

ASK_S = 1.0
AGAIN_S = 1.0
POLL_S = 0.1
RECORDS_MAX = 20_000
SEEN_S = 60.0  # how often the file is told that it is current
DRAW_S = 60.0  # how often is looked, while nothing is read, for what comes near
DELETE_RETENTION_MS = 86_400_000  # Kafka's own
_OURS = {
    "queued.min.messages": "50000",
    "queued.max.messages.kbytes": "32768",
    "fetch.queue.backoff.ms": "5",
    "fetch.wait.max.ms": "100",
}
_FIXED = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
    "auto.offset.reset": "error",
}
_PASSING = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._RESOLVE)


def now_ms() -> int:
    """For ages: it goes on while the machine sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


class Follower:
    """The public methods may be called from any thread; those with ``_`` are the thread's own."""

    def __init__(
        self, address: Address, settings: KafkaSettings, names: Names, cluster_id: str, file: Path
    ) -> None:
        self.file = file
        self.name = secrets.token_hex(4)
        """By which the thread knows what this process itself wrote."""
        self._lives = 0
        self.life = 0
        """Of the file: readers of a former one open it anew. 0: there is none yet."""
        self.on_change: Callable[[frozenset[int]], None] = lambda partitions: None
        """Told (in the thread) of queues' partitions for which another process put or moved tasks."""
        self._address = address
        self._settings = settings
        self._names = names
        self._cluster_id = cluster_id
        self._turn = threading.Condition()
        self._closing = False
        self._damage = ""
        self._positions: dict[int, int] = {}
        self._current_ms = -(1 << 60)
        self._expected_ms = now_ms()
        self._trouble = "no broker was asked yet"
        self._admin: Admin | None = None
        self._index: DelayIndex | None = None
        self._consumer: Consumer | None = None
        self._asked: tuple[int, dict[int, int]] = (0, {})
        self._ask_at = 0.0
        self._seen_at = 0.0
        self._draw_at = 0.0
        self._thread = threading.Thread(target=self._run, name="kafka-delays", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def reads(self) -> FollowedReads:
        return FollowedReads(self)

    def damaged(self, why: str) -> None:
        """A reader met what cannot be trusted: begin anew."""
        with self._turn:
            self._damage = self._damage or why
            self._current_ms = -(1 << 60)
            self._turn.notify_all()

    def wait(self, ends: Mapping[int, int], within_s: float) -> None:
        """Until the index has everything below these offsets. LogUnusable says how far it is."""
        until = time.monotonic() + within_s
        with self._turn:
            while not self._reached(ends):
                left = until - time.monotonic()
                if left <= 0 or self._closing:
                    raise LogUnusable(self._not_current(ends))
                self._turn.wait(left)

    def _reached(self, ends: Mapping[int, int]) -> bool:
        return not self._damage and all(
            self._positions.get(source, -1) >= end for source, end in ends.items()
        )

    def expect_current(self) -> None:
        """From now on the index must have everything that was written before this call."""
        self._expected_ms = now_ms() + 1  # what was asked within this millisecond may have been asked before
        self._ask_at = 0.0

    def check_current(self) -> None:
        """LogUnusable if the index may lack what it was expected to have."""
        if self._current_ms < self._expected_ms:
            with self._turn:
                raise LogUnusable(self._not_current(self._asked[1]))

    def _not_current(self, ends: Mapping[int, int]) -> str:
        missing = sum(max(0, end - self._positions.get(source, 0)) for source, end in ends.items())
        why = self._trouble or (
            f"{missing} records of it are not read yet" if missing else "it is being asked"
        )
        return f"{self._address}: topic {self._names.delay}: the index of delayed tasks is not current: {why}"

    # --- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            try:
                self._begin()
                while not self._closing:
                    self._follow()
            except IndexDamaged as error:
                self.damaged(str(error))
            except (LogUnusable, KafkaException, RuntimeError) as error:
                self._say(str(error))
            except Exception as error:  # noqa: BLE001  # begun anew: ended, it would leave all where it is
                _log.exception("following delayed tasks failed")
                self._say(f"following failed: {error!r}")
            self._end_consumer()
            with self._turn:
                if not self._closing:
                    self._turn.wait(AGAIN_S)
        if self._index is not None:
            self._index.close()

    def _say(self, trouble: str) -> None:
        with self._turn:
            said, self._trouble = self._trouble, trouble
        if trouble and trouble != said:
            _log.warning("delayed tasks: %s", trouble)

    def _end_consumer(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            with contextlib.suppress(KafkaException, RuntimeError):
                consumer.close()

    def _begin(self) -> None:
        """Everything that following needs, from wherever the file stands."""
        if self._admin is None:
            admin = Admin(self._address, self._settings)
            admin.connect()
            self._admin = admin
        topic = self._admin.describe([self._names.delay]).get(self._names.delay)
        if topic is None:
            raise LogUnusable(f"topic {self._names.delay}: does not exist yet")
        self._open_index(topic)
        self._ask_for_ends(topic.partitions)
        self._assign(topic)
        self._say("")

    def _open_index(self, topic: Topic) -> None:
        index = self._index
        if index is None:
            index = DelayIndex(self.file, self._cluster_id, f"{topic.id}/{topic.partitions}")
            self._index = index
            try:
                index.open()
            except IndexDamaged as error:
                self._damage = self._damage or str(error)
            except LogUnusable:
                self._index = None
                raise
        elif not index.is_of(f"{topic.id}/{topic.partitions}"):
            index.close()
            self._index = None
            self.life = 0
            return self._open_index(topic)
        if not self._damage:
            self._damage = self._too_old(index, topic)
        if self._damage:
            self.life = 0
            index.reset(self._damage)
        positions = dict.fromkeys(range(topic.partitions), 0) | index.positions()
        with self._turn:
            # Readers hold what was deleted until they see another life.
            if self.life == 0:
                self._lives += 1
                self.life = self._lives
            self._damage = ""
            self._positions = positions
            self._turn.notify_all()
        return None

    def _too_old(self, index: DelayIndex, topic: Topic) -> str:
        """Tombstones that were written since may be compacted away."""
        kept_ms = int(topic.config.get("delete.retention.ms", DELETE_RETENTION_MS))
        age_ms = _wall_ms() - index.seen_ms()
        if age_ms < kept_ms // 2:
            return ""
        return f"it was last current {age_ms // 1000} s ago, and tombstones are kept for {kept_ms // 1000} s"

    def _assign(self, topic: Topic) -> None:
        settings = {**_OURS, **self._settings.consumer(self._address.servers), **_FIXED}
        # A name is required; nothing is ever committed or joined under it.
        settings |= {"group.id": self._names.group, "error_cb": self._client_said}
        self._consumer = Consumer(settings, logger=_quiet)
        # A consumer that is assigned to a topic that it never heard of finds its leader a second later.
        self._consumer.list_topics(topic.name, timeout=5.0)
        assert self._admin is not None
        places = [(topic.name, source) for source in range(topic.partitions)]
        lows, ends = self._admin.lows(places), self._asked[1]
        starts = []
        for place in places:
            source = place[1]
            at = self._positions[source]
            if at > ends[source]:
                raise IndexDamaged(
                    f"{self.file}: it is at {at} of partition {source}, which ends at {ends[source]}"
                )
            starts.append(TopicPartition(*place, max(at, lows[place])))
        self._consumer.assign(starts)

    def _client_said(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._say(f"Kafka: {error.str()}")

    def _ask_for_ends(self, partitions: int) -> None:
        assert self._admin is not None
        at_ms = now_ms()
        ends = self._admin.ends((self._names.delay, source) for source in range(partitions))
        self._asked = at_ms, {source: end for (_, source), end in ends.items()}
        self._ask_at = time.monotonic() + ASK_S

    def _follow(self) -> None:
        """One round: read, apply, tell."""
        assert self._consumer is not None
        if self._damage:
            raise IndexDamaged(self._damage)
        if time.monotonic() >= self._ask_at:
            self._ask_for_ends(len(self._positions))
        records = self._consumer.consume(1, POLL_S)
        if records:
            records += self._consumer.consume(RECORDS_MAX, 0)
        if time.monotonic() >= self._draw_at:
            assert self._index is not None
            more = self._index.draw_near()
            self._draw_at = time.monotonic() + (0 if more else DRAW_S)
        found, others = self._sort(records)
        if found:
            self._apply(found)
        asked_ms, ends = self._asked
        if asked_ms > self._current_ms and self._reached(ends):
            self._current_ms = asked_ms
            if time.monotonic() >= self._seen_at:
                self._seen_at = time.monotonic() + SEEN_S
                self._apply({source: ([], at) for source, at in self._positions.items()}, _wall_ms())
            self._say("")
        if others:
            self.on_change(frozenset(others))

    def _apply(self, found: Mapping[int, tuple[Sequence[Change], int]], seen_ms: int = 0) -> None:
        assert self._index is not None
        self._index.apply(found, seen_ms)
        with self._turn:
            self._positions |= {source: at for source, (_, at) in found.items()}
            self._turn.notify_all()

    def _sort(self, records: Sequence[Message]) -> tuple[dict[int, tuple[list[Change], int]], set[int]]:
        """By source its changes and the offset behind them; and whose tasks another process put or moved."""
        found: dict[int, tuple[list[Change], int]] = {}
        others: set[int] = set()
        for record in records:
            error, source, offset = record.error(), record.partition() or 0, record.offset() or 0
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    if offset > self._positions[source]:
                        found[source] = found.get(source, ([], 0))[0], offset
                elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                    raise IndexDamaged(f"{self.file}: {error.str()}")
                elif error.code() not in _PASSING:
                    raise KafkaException(error)
                continue
            changes = found[source][0] if source in found else []
            found[source] = changes, offset + 1
            try:
                change, by = change_of(record)
            except ValueError as error_:
                _log.warning("%s/%d, offset %d: passed over: %s", self._names.delay, source, offset, error_)
                continue
            changes.append(change)
            if change.kind != END and by != self.name:
                others.add(change.partition)
        return found, others


class FollowedReads:
    """DelayReads over a follower's file, for one thread. Never waits.

    ``due``, ``fetch`` and ``standing``, which say what is to run, want an index that is current
    (``Follower.expect_current``).
    """

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._file: IndexReads | None = None
        self._life = 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def ask(self, question: Callable[[IndexReads], T]) -> T:
        """Put a question to the file as it is now."""
        life = self._follower.life
        if self._file is None or life != self._life:
            self.close()
            if life == 0:
                self._follower.check_current()
                raise LogUnusable("the index of delayed tasks is not open yet")
            self._file = IndexReads(self._follower.file)
            self._life = life
            self._guarded(lambda file: file.open(), self._file)
        return self._guarded(question, self._file)

    def _guarded(self, question: Callable[[IndexReads], T], file: IndexReads) -> T:
        try:
            return question(file)
        except IndexUnusable as error:
            is_gone = not self._follower.file.exists()  # who follows may have it open still
            if isinstance(error, IndexDamaged) or is_gone:
                self.close()
                if self._life == self._follower.life:
                    self._follower.damaged(f"{self._follower.file}: it is gone" if is_gone else str(error))
            raise

    def due(
        self, partitions: Iterable[int], until_ms: int, after: Delayed | None, limit: int
    ) -> list[Delayed]:
        self._follower.check_current()
        return self.ask(lambda file: file.due(partitions, until_ms, after, limit))

    def fetch(self, rows: Sequence[Delayed]) -> list[tuple[Delayed, Fetched | Undecodable]]:
        self._follower.check_current()
        return self.ask(lambda file: file.fetch(rows))

    def find(self, task_id: TaskId) -> list[Delayed]:
        return self.ask(lambda file: file.find(task_id))

    def standing(self, place: Place) -> list[Delayed]:
        self._follower.check_current()
        return self.ask(lambda file: file.standing(place))

    def counts(self) -> dict[int, int]:
        return self.ask(lambda file: file.counts())
