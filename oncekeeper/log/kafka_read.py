"""Reading without a group: a stretch of one partition, exactly as it stands.

One consumer that is assigned to what is asked for, and commits nothing. It goes on where it stopped if the next
question begins there, and is assigned anew otherwise. ``auto.offset.reset=error``: an offset that Kafka has deleted
shows as an error and not as a jump, so a jump within a partition is a gap and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from oncekeeper.errors import LogUnusable
from oncekeeper.log.kafka_admin import Place, Words, code_of, in_words
from oncekeeper.log.kafka_names import Address
from oncekeeper.log.kafka_settings import KafkaSettings

READ_S = 8.0  # without a word from the broker
_ROUND = 10_000
_TURN_S = 0.2  # an interrupt from the keyboard is seen between turns
_quiet = logging.Logger("oncekeeper.kafka.consumer", logging.CRITICAL)  # the error callback says what matters
_AGAIN = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._RESOLVE)


class Passed(Exception):
    """The offset is none of the partition's: Kafka deleted it, or it is above the end."""


class Reader:
    """Records of one or more partitions in order. One thread at a time."""

    def __init__(
        self,
        address: Address,
        settings: KafkaSettings,
        group: str,
        ends: Callable[[list[Place]], dict[Place, int]],
    ) -> None:
        self._ends = ends
        self.words = Words(settings)
        self._address = address
        self._settings = settings
        ours = {
            "fetch.wait.max.ms": "10",  # how soon an end shows
            "queued.min.messages": "50000",
            "fetch.queue.backoff.ms": "10",  # a second, and reading would stop for one whenever the queue was full
            "queued.max.messages.kbytes": "32768",
        }
        fixed = {
            # A name is required; nothing is ever committed or joined under it.
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "error_cb": self.words.note,
        }
        try:
            self._consumer = Consumer({**ours, **settings.consumer(address.servers), **fixed}, logger=_quiet)
        except (KafkaException, ValueError, TypeError) as error:
            raise LogUnusable(f"{address}: kafka settings: {settings.clean(in_words(error))}") from None
        self._met: set[str] = set()
        self._place: Place | None = None
        self._next = 0  # the offset at which the next read goes on without a jump
        self._held: deque[Message] = deque()  # fetched, not given out
        self._end: int | None = None  # seen behind what is held

    def close(self) -> None:
        self._consumer.close()

    def read(
        self, topic: str, partition: int, offset: int, records_max: int, bytes_max: int
    ) -> tuple[list[Message], int]:
        """Records from ``offset`` on, one at least unless the end is there, and the offset after them.

        What lies between the last of them and that offset holds no record. Raises Passed.
        """
        place = (topic, partition)
        goes_on = place == self._place and offset == self._next and (bool(self._held) or self._end is None)
        if goes_on:
            self._fill()
        if not goes_on or not self._held:
            # Also because an end that was on its way since the last read is old news.
            if offset == self._ends([place])[place]:
                return [], offset
            self._assign({place: offset})
            self._place = place
            self._fill()
        found: list[Message] = []
        size = 0
        while self._held and len(found) < records_max and (size < bytes_max or not found):
            size += len(self._held[0].value() or b"")
            if found and size > bytes_max:
                break
            found.append(self._held.popleft())
        after = (found[-1].offset() or 0) + 1 if found else offset
        if not self._held and self._end is not None:
            after = max(after, self._end)
        self._next = after
        return found, after

    def committed(self, places: Iterable[Place], within_s: float) -> dict[Place, int]:
        """The group's positions, where there are any. Raises KafkaException, and may be asked again.

        Not asked through an admin client: of a question to a group's coordinator whose connection breaks at that
        moment, that one ends the process (librdkafka #5397; seen with 2.16.0 at a broker that was killed).
        """
        found: dict[Place, int] = {}
        wanted = [TopicPartition(*place) for place in places]
        for place in self._consumer.committed(wanted, timeout=within_s) if wanted else ():
            if place.error is not None:
                raise KafkaException(place.error)
            if place.offset >= 0:
                found[place.topic or "", place.partition] = place.offset
        return found

    def _fill(self) -> None:
        until = time.monotonic() + READ_S
        while not self._held and self._end is None:
            for record in self._fetch(until):
                if record.error() is None:
                    self._held.append(record)
                else:
                    self._end = record.offset()
                    self._rest()

    def scan(self, places: Mapping[Place, int]) -> Iterator[list[Message]]:
        """All records of these partitions from their offsets to their ends, in no order between partitions."""
        self._place = None
        self._assign(places)
        left = set(places)
        while left:
            found = []
            for record in self._fetch(time.monotonic() + READ_S):
                if record.error() is None:
                    found.append(record)
                else:
                    left.discard((record.topic() or "", record.partition() or 0))
            yield found
        self._rest()

    def _rest(self) -> None:
        """A consumer at an end goes on asking the broker for more."""
        with contextlib.suppress(KafkaException):
            self._consumer.unassign()

    def _assign(self, places: Mapping[Place, int]) -> None:
        self._held.clear()
        self._end = None
        try:
            for topic in {topic for topic, _ in places} - self._met:
                # A consumer that is assigned to a topic that it never heard of finds its leader a second later.
                self._consumer.list_topics(topic, timeout=READ_S)
                self._met.add(topic)
            self._consumer.assign([TopicPartition(*place, offset) for place, offset in places.items()])
        except KafkaException as error:
            raise self._unusable("reading", error) from None

    def _fetch(self, until: float) -> list[Message]:
        """Records and ends; waits for the first."""
        while True:
            try:
                got = self._consumer.consume(1, max(0.0, min(_TURN_S, until - time.monotonic())))
                got += self._consumer.consume(_ROUND, 0) if got else []
            except KafkaException as error:
                raise self._unusable("reading", error) from None
            found = []
            for record in got:
                said = record.error()
                if said is None or said.code() == KafkaError._PARTITION_EOF:
                    found.append(record)
                elif said.code() == KafkaError._AUTO_OFFSET_RESET:
                    self._place = None
                    raise Passed(said.str())
                elif said.code() not in _AGAIN:
                    raise self._unusable("reading", KafkaException(said))
            if found:
                return found
            if time.monotonic() >= until:
                self._place = None
                raise LogUnusable(
                    f"{self._address}: reading: no answer within {READ_S:g} s: {self.words.why()}"
                )

    def _unusable(self, what: str, error: KafkaException) -> LogUnusable:
        self._place = None
        why = self.words.why(error) if code_of(error) in _AGAIN else self._settings.clean(in_words(error))
        return LogUnusable(f"{self._address}: {what}: {why}")
