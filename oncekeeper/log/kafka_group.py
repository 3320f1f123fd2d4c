"""A node's place in the consumer group: which partitions are its own, and what was fetched of them.

One thread polls, and does nothing that could keep it from polling; the node's loop reads from buffers. All calls of
the client are that thread's: it lets in one thread at a time, and who waits for one that polls may wait for ever.

Kafka decides who owns what (group protocol ``consumer``, KIP-848; cooperative-sticky where the broker has only the
classic one), and only while the node wants to be a member, which it does while it has a session in the ledger:
without a quorum it has no partitions. A partition that moves needs no agreement with its former owner: claims
decide what runs, and what the former owner still runs, the new one waits for.

What is read is exact. A buffer covers an unbroken stretch of offsets from the position at which it was opened;
what Kafka leaves out within the stretch is a Gap, what it has deleted below an uncommitted position is *stuck*:
nothing of that partition is read until a person says that the loss is accepted (``skip``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from oncekeeper.log.kafka_buffers import Buffers, Lost
from oncekeeper.log.kafka_codec import items
from oncekeeper.log.kafka_consumer import CLASSIC, NEW, by_partition, is_unsupported, member_settings
from oncekeeper.log.kafka_names import Names
from oncekeeper.log.port import Item

_log = logging.getLogger("oncekeeper.kafka")

POLL_S = 0.1
PAUSED_POLL_S = 0.005  # how late a partition that has room again is seen
RECORDS_MAX = 4096  # taken from the client in one round
TOPICS_S = 5.0  # how often new queues are looked for
ASK_S = 5.0
LOOK_S = 2.0  # nothing is polled meanwhile
AGAIN_S = 1.0
LAST_COMMIT_S = 2.0

_Rebalance = Callable[[Consumer, list[TopicPartition]], None]


class Group:
    """``listen`` begins; from then on the public methods are the loop's, and those with ``_`` the thread's.

    ``commit`` may be called from any thread.
    """

    def __init__(self, settings: Mapping[str, Any], names: Names, *, protocol: str = "auto") -> None:
        self.positions: Mapping[int, int] = {}
        """The partitions that are ours, each from where we have it; changed on the loop, before on_change."""
        self.protocol = NEW if protocol == "auto" else protocol
        self._may_fall_back = protocol == "auto"
        self._settings = settings
        self._names = names
        self._loop: asyncio.AbstractEventLoop | None = None
        self._buffers = Buffers()
        self._turn = threading.Condition()
        self._life = 0  # odd: a member, or on the way to it
        self._closing = False
        self._consumer: Consumer | None = None
        self._assigned: dict[int, int] = {}  # the thread's view of ``positions``
        self._subscribed: frozenset[str] = frozenset()
        self._topics_at = 0.0
        self._served = 0  # the life that the thread serves
        self._uncommitted = 0
        self._broken: Exception | None = None
        self._said = ""  # until something is read
        self._away = ""  # until the brokers are seen
        self._thread = threading.Thread(target=self._run, name="kafka-group", daemon=True)

    # --- the loop's side --------------------------------------------------------------------------------------

    def listen(self, on_change: Callable[[], None], on_more: Callable[[frozenset[int] | None], None]) -> None:
        """``on_change`` after ``positions`` changed, ``on_more`` with the partitions of which more was fetched."""
        self._loop = asyncio.get_running_loop()
        self._on_change, self._on_more = on_change, on_more
        self._thread.start()

    def want(self, member: bool) -> None:
        """Be a member, or leave. Leaving takes effect here at once."""
        with self._turn:
            if (self._life % 2 == 1) == member:
                return
            self._life += 1
            self._turn.notify()
        if not member:
            self.positions = {}

    def read(self, partition: int, offset: int, tasks_max: int, bytes_max: int) -> list[Item]:
        """What was fetched, from ``offset`` on; what lies below may be forgotten."""
        try:
            return self._buffers.read(partition, offset, tasks_max, bytes_max)
        except Lost as error:
            self._say(f"the consumer group: {error}; joining again")
            self.want(False)
            self._on_change()  # whoever listens takes back what was assigned, and wants to be a member again
            return []

    def commit(self, positions: Mapping[int, int]) -> None:
        """Ask for it, and do not wait. What is no longer ours is passed over: its owner commits it."""
        self._buffers.commit(positions)

    def skip(self, partition: int) -> bool:
        """A person accepts that what Kafka deleted is lost; False: the partition is not stuck here."""
        return self._buffers.skip(partition)

    @property
    def stuck(self) -> dict[int, tuple[int, int]]:
        """Partitions that wait for ``skip``: the committed position, and the lowest offset that is left."""
        return self._buffers.stuck

    @property
    def trouble(self) -> str:
        """What keeps tasks from being read, for people; empty: nothing."""
        alarms = [self._alarm(number, *between) for number, between in sorted(self.stuck.items())]
        return "; ".join([*alarms, *filter(None, (self._away, self._said))])

    def _alarm(self, number: int, position: int, low: int) -> str:
        return (
            f"partition {number} ({self._names.shown(number)}): Kafka deleted offsets {position} to {low - 1} "
            f"before they were run; it waits until somebody accepts that: oncekeeper queue skip {number}"
        )

    def close(self, timeout_s: float = 5.0) -> None:
        if self._loop is None:
            return
        self._loop = None
        with self._turn:
            self._closing = True
            self._life += self._life % 2
            self._turn.notify()
        self._thread.join(timeout_s)

    def _place(self, partition: int) -> TopicPartition:
        topic, number = self._names.place(partition)
        return TopicPartition(topic, number)

    # --- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._turn:
                while self._consumer is None and self._life % 2 == 0 and not self._closing:
                    self._turn.wait()
                life, closing = self._life, self._closing
            if self._consumer is not None and life != self._served:
                self._leave()
            if closing:
                return
            if life % 2 == 0:
                continue
            try:
                if self._consumer is None:
                    self._join(life)
                self._look_for_topics()
                self._skip_stuck()
                self._commit(self._consumer)
                self._poll()
            except Exception as error:  # noqa: BLE001 - a thread that died would leave a node that looks alive
                self._failed(error)

    def _join(self, life: int) -> None:
        settings = member_settings(self._settings, self._names.group, self.protocol)
        settings["on_commit"] = self._committed
        settings["error_cb"] = self._error
        self._served = life
        self._subscribed, self._topics_at = frozenset(), 0.0
        self._broken = None
        self._consumer = Consumer(settings, logger=_log)

    def _leave(self) -> None:
        consumer, self._consumer = self._consumer, None
        assert consumer is not None
        try:
            self._last_commit(consumer)
            consumer.close()
        except Exception as error:  # noqa: BLE001 - the consumer is given up, whatever it says
            _log.warning("leaving the consumer group: %s", error)
        self._give_up(list(self._assigned))
        self._buffers.close_stuck()

    def _last_commit(self, consumer: Consumer) -> None:
        """Wait a little for the answers to what was asked for."""
        self._commit(consumer)
        until = time.monotonic() + LAST_COMMIT_S
        while self._uncommitted > 0 and time.monotonic() < until:
            consumer.consume(1, 0.05)

    def _failed(self, error: Exception) -> None:
        if self._may_fall_back and self.protocol == NEW and is_unsupported(error):
            _log.info("the broker has no group protocol %r: falling back to %r", NEW, CLASSIC)
            self.protocol = CLASSIC
        else:
            self._say(f"the consumer group: {error}")
        if self._consumer is not None:
            self._leave()
        with self._turn:
            if not self._closing:
                self._turn.wait(AGAIN_S)

    def _say(self, trouble: str) -> None:
        self._said = self._note(trouble, self._said)

    def _note(self, trouble: str, before: str) -> str:
        if trouble and trouble != before:
            _log.warning("%s", trouble)
        return trouble

    def _look_for_topics(self) -> None:
        now = time.monotonic()
        if now < self._topics_at:
            return
        self._topics_at = now + TOPICS_S
        assert self._consumer is not None
        try:
            known = self._consumer.list_topics(timeout=LOOK_S).topics
        except KafkaException as error:
            # The membership stands: what was fetched is worked on, and the client finds the brokers again.
            self._away = self._note(f"Kafka: {error.args[0].str()}", self._away)
            self._topics_at = time.monotonic() + (TOPICS_S if self._subscribed else AGAIN_S)
            return
        self._away = ""
        topics = frozenset(topic for topic in known if self._names.is_queue_topic(topic))
        if topics - self._subscribed:
            self._subscribed |= topics
            self._consumer.subscribe(
                sorted(self._subscribed),
                on_assign=self._caught(self._on_assign),
                on_revoke=self._caught(self._on_revoke),
                on_lost=self._caught(self._on_revoke),
            )

    def _caught(self, call: _Rebalance) -> _Rebalance:
        """What a callback raises must not pass through the client: what comes out of it is no exception at all."""

        def caught(consumer: Consumer, places: list[TopicPartition]) -> None:
            try:
                call(consumer, places)
            except Exception as error:  # noqa: BLE001 - raised again behind the client, in _consume
                self._broken = error

        return caught

    def _consume(self, count: int, timeout_s: float) -> list[Message]:
        assert self._consumer is not None
        records = self._consumer.consume(count, timeout_s)
        if self._broken is not None:
            raise self._broken
        return records

    def _commit(self, consumer: Consumer | None) -> None:
        assert consumer is not None
        stored = False
        for number, position in self._buffers.take_commits().items():
            place = self._place(number)
            place.offset = position
            with contextlib.suppress(KafkaException):  # it is being taken from us
                consumer.store_offsets(offsets=[place])
                stored = True
        if stored:
            self._uncommitted += 1
            consumer.commit(asynchronous=True)

    def _resume(self) -> bool:
        """Go on with what has room again; whether something is paused still."""
        assert self._consumer is not None
        again, others = self._buffers.with_room()
        if again:
            self._consumer.resume([self._place(number) for number in again])
        return others

    def _poll(self) -> None:
        assert self._consumer is not None
        if not self._subscribed:
            time.sleep(POLL_S)
            return
        records = self._consume(1, PAUSED_POLL_S if self._resume() else POLL_S)
        if not records:
            return
        records += self._consume(RECORDS_MAX, 0)
        grown = set()
        for (topic, kafka_partition), some in by_partition(records).items():
            number = self._names.number(topic, kafka_partition)
            if self._take(number, topic, kafka_partition, some):
                grown.add(number)
        if grown:
            self._said = self._away = ""
            self._deliver(self._on_more, frozenset(grown))

    def _take(self, number: int, topic: str, kafka_partition: int, records: list[Message]) -> bool:
        found: list[Item] = []
        end = -1
        tasks = []
        for record in records:
            error = record.error()
            if error is None:
                tasks.append(record)
            elif error.code() == KafkaError._PARTITION_EOF:
                end = record.offset() or 0
            else:
                self._complain(number, error)
        if tasks:
            # Outside of the lock: this is where the time goes.
            found = items(number, topic, kafka_partition, tasks, self._names.queue(topic))
        news, pause = self._buffers.add(number, found, end)
        if pause:
            assert self._consumer is not None
            self._consumer.pause([self._place(number)])
        return news

    def _complain(self, number: int, error: KafkaError) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            self._is_stuck(number, self._buffers.fetched_up_to(number), self._low(number))
        elif error.fatal() or is_unsupported(error):
            raise KafkaException(error)
        else:
            self._say(f"the consumer group: {error.str()}")

    # --- rebalancing, within a poll ---------------------------------------------------------------------------

    def _on_assign(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        committed = consumer.committed(
            [TopicPartition(place.topic, place.partition) for place in places], timeout=ASK_S
        )
        starts, blocked, new = [], [], []
        for place in committed:
            if place.error is not None:
                raise KafkaException(place.error)
            number = self._names.number(place.topic, place.partition)
            low = self._low(number)
            if 0 <= place.offset < low:
                self._is_stuck(number, place.offset, low)
                blocked.append(place)
            elif place.offset < 0:
                # Nobody ever committed here, or the group slept for so long that Kafka forgot where it was:
                # from the first that is left. What was executed is known, and is passed.
                if low > 0:
                    _log.warning(
                        "%s: Kafka knows no position and holds nothing below %d: going on from there",
                        self._names.shown(number),
                        low,
                    )
                place.offset = low
                new.append(number)
            starts.append(TopicPartition(place.topic, place.partition, max(place.offset, low)))
        consumer.incremental_assign(starts)
        if blocked:
            consumer.pause([TopicPartition(place.topic, place.partition) for place in blocked])
        opened = {
            self._names.number(start.topic, start.partition): start.offset
            for start in starts
            if start.topic is not None
        }
        self._buffers.open(opened, new)
        stuck = self._buffers.stuck
        self._assigned |= {number: at for number, at in opened.items() if number not in stuck}
        self._say("")
        self._tell()

    def _on_revoke(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        self._give_up([self._names.number(place.topic, place.partition) for place in places])
        consumer.incremental_unassign(places)

    def _give_up(self, numbers: list[int]) -> None:
        self._buffers.close(numbers)
        for number in numbers:
            self._assigned.pop(number, None)
        self._tell()

    def _deliver(self, call: Callable[..., None], *args: object) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is leaving
                loop.call_soon_threadsafe(call, *args)

    def _tell(self) -> None:
        self._deliver(self._told, self._served, dict(self._assigned))

    def _told(self, life: int, positions: dict[int, int]) -> None:
        """On the loop. News of a membership that was left meanwhile is none."""
        if life == self._life:
            self.positions = positions
            if self._loop is not None:
                self._on_change()

    # --- what Kafka deleted ------------------------------------------------------------------------------------

    def _low(self, number: int) -> int:
        assert self._consumer is not None
        low, _ = self._consumer.get_watermark_offsets(self._place(number), timeout=ASK_S, cached=False)
        return int(low)

    def _is_stuck(self, number: int, position: int, low: int) -> None:
        self._buffers.block(number, position, low)
        _log.error("%s", self._alarm(number, position, low))
        if self._assigned.pop(number, None) is not None:
            self._tell()

    def _skip_stuck(self) -> None:
        for number in self._buffers.take_skips():
            place = self._place(number)
            place.offset = low = self._low(number)
            assert self._consumer is not None
            self._consumer.incremental_unassign([self._place(number)])
            self._consumer.incremental_assign([place])
            self._consumer.resume([self._place(number)])
            self._consumer.store_offsets(offsets=[place])
            self._consumer.commit(asynchronous=True)
            self._uncommitted += 1
            self._buffers.reopen(number, low)
            self._assigned[number] = low
            _log.warning("%s: goes on from %d, as told", self._names.shown(number), low)
            self._tell()

    # --- callbacks of the client ------------------------------------------------------------------------------

    def _committed(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        self._uncommitted -= 1
        if error is not None and error.code() != KafkaError._NO_OFFSET:
            # Whoever owns the partition now finds in the ledger what is settled: nothing is lost by it.
            _log.info("a commit was refused: %s", error.str())

    def _error(self, error: KafkaError) -> None:
        if is_unsupported(error) or error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._away = self._note(f"Kafka: {error.str()}", self._away)
