"""Producing: everything that was handed over is confirmed, or its outcome is told for what it is.

One idempotent producer. A call hands its records over and waits until each is accounted for, so nothing is under
way between two calls. Buffers are bounded by librdkafka's limits; a call that has more than fits takes turns with
them, and stops at the first failure.

What a failure says: a refusal (no permission, too large, …) of everything, with no trouble on the way, means that
nothing was stored. A timeout means nothing at all, and is told as unknown.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from oncekeeper.errors import LogUnusable
from oncekeeper.log.kafka_admin import Words, in_words
from oncekeeper.log.kafka_names import Address
from oncekeeper.log.kafka_settings import KafkaSettings
from oncekeeper.log.port import UnknownAppend, Unsent

_log = logging.getLogger("oncekeeper.kafka")

SEND_TIMEOUT_MS = 10_000
GRACE_S = 2.0  # librdkafka looks for what has timed out once a second
PROBE_S = 2.0
BUFFERED_MAX = 100_000
BUFFERED_KB_MAX = 65_536
BATCH_BYTES = 1_000_000  # librdkafka's own
_TURN_S = 0.2  # an interrupt from the keyboard is seen between turns

# Said by a broker of records that it did not take, or by the client of records that it did not send.
_REFUSALS = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.RECORD_LIST_TOO_LARGE,
    KafkaError.INVALID_MSG_SIZE,
    KafkaError.INVALID_RECORD,
    KafkaError.INVALID_TIMESTAMP,
    KafkaError.POLICY_VIOLATION,
    KafkaError.TOPIC_EXCEPTION,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError._QUEUE_FULL,
}

Note = Callable[[KafkaError | None, Message], None]


class Row:
    """Records of one partition as ``produce_batch`` takes them, and the offsets where they came to rest."""

    __slots__ = ("messages", "offsets", "partition", "topic")

    def __init__(self, topic: str, partition: int, messages: list[dict[str, Any]]) -> None:
        self.topic = topic
        self.partition = partition
        self.messages = messages
        self.offsets: list[int] = []


class _Call:
    """What became of one call's records. A report that comes when the call is over finds nobody."""

    def __init__(self) -> None:
        self.handed = 0
        self.settled: list[list[int]] = []
        self.failed = 0
        self.failures: dict[int, str] = {}
        self.fatal = False

    @property
    def confirmed(self) -> int:
        return sum(map(len, self.settled))

    def noting(self) -> tuple[list[int], Note]:
        """A list of offsets, and the callback that fills it. It runs for every record: it does almost nothing."""
        offsets: list[int] = []
        self.settled.append(offsets)
        append = offsets.append

        def note(error: KafkaError | None, message: Message) -> None:
            if error is None:
                append(message.offset())  # type: ignore[arg-type]  # only a record that was not stored has none
            else:
                self.failed += 1
                self.fail(error)

        return offsets, note

    def fail(self, error: KafkaError) -> None:
        self.failures.setdefault(error.code(), error.str())
        self.fatal = self.fatal or error.fatal() or error.code() == KafkaError._FATAL


class Sender:
    """Makes its producer when it is first used, and another one after a failure that one cannot get over."""

    def __init__(
        self, address: Address, settings: KafkaSettings, send_timeout_ms: int = SEND_TIMEOUT_MS
    ) -> None:
        self.words = Words(settings)
        self._address = address
        self._settings = settings
        self._timeout_ms = send_timeout_ms
        self._producer: Producer | None = None
        self._limit = 0

    def send(self, rows: Iterable[Row], message_bytes_max: int) -> None:
        """Store the records of every row. Raises Unsent or UnknownAppend.

        ``message_bytes_max``: the lowest limit of the topics; no batch of records may exceed it either.
        """
        with self._call(message_bytes_max) as (producer, call):
            for row in rows:
                row.offsets, note = call.noting()
                if not self._hand_over(producer, call, row, note):
                    break

    def send_each(self, records: Iterable[Mapping[str, Any]], message_bytes_max: int) -> None:
        """The same for records with headers, each the arguments of ``Producer.produce``."""
        with self._call(message_bytes_max) as (producer, call):
            _, note = call.noting()
            for record in records:
                if not self._hand_over_one(producer, call, record, note):
                    break

    def close(self) -> None:
        self._discard()

    @contextlib.contextmanager
    def _call(self, message_bytes_max: int) -> Iterator[tuple[Producer, _Call]]:
        call, trouble = _Call(), self.words.count
        producer = self._ready(message_bytes_max)
        whole = False
        try:
            yield producer, call
            whole = not call.failures
            self._wait(producer, call, lambda: call.confirmed + call.failed >= call.handed)
        except BaseException:
            self._discard()  # it may hold records that nobody waits for
            raise
        if not (whole and call.confirmed == call.handed):
            self._report(call, clear=trouble == self.words.count)
        self.words.forget()

    def _wait(self, producer: Producer, call: _Call, done: Callable[[], bool]) -> None:
        """Until done; or until nothing moved for longer than any record may take."""
        seen, until = -1, 0.0
        while not done():
            moved = call.confirmed + call.failed
            if moved != seen:
                seen, until = moved, time.monotonic() + self._timeout_ms / 1000 + GRACE_S
            elif time.monotonic() >= until:
                return
            producer.flush(_TURN_S)  # sends at once, whatever linger.ms says

    def _hand_over(self, producer: Producer, call: _Call, row: Row, note: Note) -> bool:
        """False when something failed, and no more shall be sent."""
        left, row.messages = row.messages, []
        while left:
            try:
                taken = producer.produce_batch(row.topic, left, partition=row.partition, on_delivery=note)
            except BufferError:
                taken = 0
            except KafkaException as error:
                call.fail(error.args[0])
                return False
            call.handed += taken
            if taken < len(left) and not self._wait_for_room(producer, call):
                return False
            if taken:
                left = _refused(left, call) if taken < len(left) else []
            if call.failures:
                return False
        producer.poll(0)
        return not call.failures

    def _hand_over_one(self, producer: Producer, call: _Call, record: Mapping[str, Any], note: Note) -> bool:
        while True:
            try:
                producer.produce(**record, on_delivery=note)
            except BufferError:
                if not self._wait_for_room(producer, call):
                    return False
            except KafkaException as error:
                call.fail(error.args[0])
                return False
            else:
                call.handed += 1
                producer.poll(0)
                return not call.failures

    def _wait_for_room(self, producer: Producer, call: _Call) -> bool:
        held = len(producer)
        self._wait(producer, call, lambda: len(producer) <= held // 2 or bool(call.failures))
        if len(producer) > held // 2:
            call.fail(KafkaError(KafkaError._TIMED_OUT))
        return not call.failures

    # --- the producer -------------------------------------------------------------------------------------------

    def _ready(self, message_bytes_max: int) -> Producer:
        if self._producer is not None and self._limit > message_bytes_max:
            self._discard()
        if self._producer is None:
            producer = self._make(message_bytes_max)
            # Also because a producer that is used before it has a connection waits half a second for its number.
            self._probe(producer)
            self._producer, self._limit = producer, message_bytes_max
        elif self.words.down:
            self._probe(self._producer)
        return self._producer

    def _make(self, limit: int) -> Producer:
        given = self._settings.producer(self._address.servers)
        try:
            batch_bytes = int(given.get("batch.size", BATCH_BYTES))
        except ValueError:
            raise LogUnusable(f"{self._address}: kafka settings: batch.size must be a number") from None
        ours = {
            "linger.ms": "5",
            "queue.buffering.max.messages": str(BUFFERED_MAX),
            "queue.buffering.max.kbytes": str(BUFFERED_KB_MAX),
        }
        fixed = {
            "message.max.bytes": str(max(1000, min(limit, 1_000_000_000))),
            "batch.size": str(
                max(1, min(batch_bytes, limit))
            ),  # a batch counts as one message with the broker
            "enable.idempotence": self._settings.acks_all,
            "message.timeout.ms": str(self._timeout_ms),
            "error_cb": self.words.note,
        }
        try:
            return Producer({**ours, **given, **fixed}, logger=_quiet)
        except (KafkaException, ValueError, TypeError) as error:
            raise LogUnusable(
                f"{self._address}: kafka settings: {self._settings.clean(in_words(error))}"
            ) from None

    def _probe(self, producer: Producer) -> None:
        """As long as no broker is there, nothing is even tried: the answer is quick and sure."""
        try:
            producer.list_topics(timeout=PROBE_S)
        except KafkaException as error:
            producer.poll(0)
            raise Unsent(f"{self._address}: no broker answers: {self.words.why(error)}") from None
        producer.poll(0)
        self.words.forget()

    def _discard(self) -> None:
        if self._producer is not None:
            self._producer.purge(in_queue=True, in_flight=True)
            self._producer.flush(0)
            self._producer = None

    def _report(self, call: _Call, clear: bool) -> None:
        """Raise what is true of a call that failed."""
        missing = call.handed - call.confirmed - call.failed
        if call.fatal or missing:
            self._discard()
        code, said = next(iter(call.failures.items()), (KafkaError._TIMED_OUT, "no answer"))
        why = self._settings.clean(said)
        if code in (KafkaError._MSG_TIMED_OUT, KafkaError._TIMED_OUT):
            why = f"not confirmed within {self._timeout_ms / 1000:g} s: {self.words.why()}"
        if clear and not call.confirmed and not missing and _REFUSALS.issuperset(call.failures):
            raise Unsent(f"{self._address}: {why}")
        raise UnknownAppend(
            f"{self._address}: {call.confirmed} tasks are confirmed, the others are not: {why}"
        )


def _refused(messages: list[dict[str, Any]], call: _Call) -> list[dict[str, Any]]:
    """Those that found no room. Whatever else was wrong with one fails the call."""
    again = []
    for message in messages:
        error = message.pop("_error", None)
        if error is not None and error.code() == KafkaError._QUEUE_FULL:
            again.append(message)
        elif error is not None:
            call.fail(error)
    return again


_quiet = logging.Logger("oncekeeper.kafka.producer", logging.CRITICAL)
"""For clients whose error callback says what matters."""
