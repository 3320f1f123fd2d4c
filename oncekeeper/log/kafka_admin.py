"""Asking and telling the brokers: what is there, whether it can be relied on, and making what is missing.

Every question ends within a few seconds, whatever the network does, and every failure is a LogUnusable in words: a
librdkafka client repeats a vain attempt for minutes, and tells the reason only to its error callback.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec  # type: ignore[attr-defined]

from oncekeeper.errors import LogUnusable
from oncekeeper.log.kafka_names import Address
from oncekeeper.log.kafka_rules import Topic
from oncekeeper.log.kafka_settings import KafkaSettings

T = TypeVar("T")
Place = tuple[str, int]
"""Topic and partition."""

CONNECT_S = 5.0
ASK_S = 5.0
AGAIN_S = 0.05
VISIBLE_S = 5.0  # for a new topic to be known to the brokers

_log = logging.getLogger("oncekeeper.kafka")
_NEEDED = "OffsetDeleteRequest (47)"  # came with 2.4
_DENIED = {
    KafkaError._AUTHENTICATION: "the broker refuses these credentials",
    KafkaError.SASL_AUTHENTICATION_FAILED: "the broker refuses these credentials",
    KafkaError._SSL: "no secure connection",
}
_GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)
_FORBIDDEN = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
)


class Missing(LogUnusable):
    """A topic that does not exist."""


class Words:
    """The last that a client's error callback said, for messages; safe in any thread."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self.count = 0
        self.denied = ""  # what will not become right by waiting
        self.down = False  # no broker is reached
        self._last = ""

    def note(self, error: KafkaError) -> None:
        self.count += 1
        self.denied = _DENIED.get(error.code(), self.denied)
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self.down = True  # says nothing of the reason, which came before
        else:
            self._last = error.str()

    def forget(self) -> None:
        self.denied, self.down = "", False
        self._last = ""

    def why(self, error: Exception | None = None) -> str:
        """The cause in words: what the callback said, or ``error``."""
        said = re.sub(r" \(after \d+ms in state \w+\)", "", self._last)
        text = said or (in_words(error) if error is not None else "") or "no answer"
        return self._settings.clean(text)


def in_words(error: Exception) -> str:
    if isinstance(error, KafkaException) and error.args and isinstance(error.args[0], KafkaError):
        return error.args[0].str()
    if isinstance(error, FutureTimeout):
        return "no answer"
    return str(error)


def code_of(error: Exception) -> int | None:
    if isinstance(error, KafkaException) and error.args and isinstance(error.args[0], KafkaError):
        return error.args[0].code()
    return None


class _Versions(logging.Handler):
    """Reads what the brokers can do from the client's log: it tells it nowhere else."""

    def __init__(self, settings: KafkaSettings) -> None:
        super().__init__()
        self._settings = settings
        self.seen = self.modern = False

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "APIVERSION" in text:
            self.seen = self.seen or "ApiKey" in text
            self.modern = self.modern or _NEEDED in text
        elif not text.startswith("FEATURE") and record.levelno >= logging.WARNING:
            _log.debug("%s", self._settings.clean(text))  # the error callback says it too, once


class Admin:
    """One thread at a time."""

    def __init__(self, address: Address, settings: KafkaSettings, check_version: bool = False) -> None:
        """``check_version``: whoever makes a log wants to know; it costs some log lines of the client's."""
        self._address = address
        self._settings = settings
        self.words = Words(settings)
        logger = logging.Logger("oncekeeper.kafka.admin", logging.DEBUG)  # nobody else's: not in the registry
        self._versions = _Versions(settings)
        logger.addHandler(self._versions)
        given = settings.admin(address.servers)
        if check_version:
            given["debug"] = ",".join(filter(None, ("feature", given.get("debug", ""))))
        try:
            given["error_cb"] = self.words.note
            self._client = AdminClient(given, logger=logger)
        except (KafkaException, ValueError, TypeError) as error:
            raise LogUnusable(f"{address}: kafka settings: {settings.clean(in_words(error))}") from None
        self.kafka_id = ""

    def connect(self) -> None:
        """Reach a broker, and one that will do. Must come first."""
        within_s = CONNECT_S
        deadline = time.monotonic() + within_s
        while True:
            try:
                # In short turns: wrong credentials will not become right.
                found = self._client.list_topics(timeout=max(0.1, min(0.5, deadline - time.monotonic())))
                break
            except KafkaException as error:
                self._client.poll(0)
                if self.words.denied:
                    raise LogUnusable(f"{self._address}: {self.words.denied}: {self.words.why()}") from None
                if time.monotonic() >= deadline:
                    raise LogUnusable(
                        f"{self._address}: no broker answers within {within_s:g} s: {self.words.why(error)}"
                    ) from None
        self._client.poll(0)
        if self._versions.seen and not self._versions.modern:
            raise LogUnusable(
                f"{self._address}: the broker is older than Kafka 2.4, which is the oldest that will do"
            )
        self.kafka_id = str(found.cluster_id or "")
        self.words.forget()

    def close(self) -> None:
        """The client goes with its last reference."""

    # --- asking -----------------------------------------------------------------------------------------------

    def ask(self, what: str, call: Callable[[float], T]) -> T:
        """What ``call`` answers, which gets the seconds it may take; LogUnusable that says why there is none.

        Called again while the brokers are busy among themselves: a leader moves, a coordinator reads its log.
        """
        until = time.monotonic() + ASK_S
        while True:
            try:
                return call(max(0.5, until - time.monotonic()))
            except (KafkaException, FutureTimeout) as error:
                code = code_of(error)
                if code in _PASSING and time.monotonic() < until:
                    if code in _STALE:
                        # What the client knows of leaders is of before: by itself it looks again in minutes.
                        with contextlib.suppress(KafkaException):
                            self._client.list_topics(timeout=max(0.5, until - time.monotonic()))
                    time.sleep(AGAIN_S)
                    if code in _MOVED:
                        self._look_again()
                    continue
                self._client.poll(0)
                said = self._settings.clean(in_words(error))
                if code in _FORBIDDEN:
                    raise LogUnusable(f"{self._address}: {what}: no permission: {said}") from None
                if code in _GONE:
                    raise Missing(f"{self._address}: {what}: {said}") from None
                why = self.words.why(error) if code in _SILENT else said
                raise LogUnusable(f"{self._address}: {what}: {why}") from None

    def _look_again(self) -> None:
        """By itself the client goes on asking whom it knows for leader, and is refused for ever."""
        with contextlib.suppress(KafkaException):
            self._client.list_topics(timeout=1.0)

    def topics(self) -> dict[str, int]:
        """Every topic that we may see, with its number of partitions."""
        found = self.ask("listing topics", lambda within_s: self._client.list_topics(timeout=within_s)).topics
        return {name: len(topic.partitions) for name, topic in found.items() if topic.error is None}

    def brokers(self) -> int:
        return len(
            self.ask("listing brokers", lambda within_s: self._client.list_topics(timeout=within_s)).brokers
        )

    def describe(self, names: Iterable[str]) -> dict[str, Topic]:
        """Those of the topics that exist."""
        found = {}
        for name in names:
            with contextlib.suppress(Missing):
                found[name] = self.ask(f"topic {name}", functools.partial(self._describe, name))
        return found

    def describe_new(self, names: Sequence[str]) -> dict[str, Topic]:
        """Of topics that were just created: each broker hears of them in its own time, and any of them is asked."""
        until = time.monotonic() + VISIBLE_S
        found = self.describe(names)
        while len(found) < len(names) and time.monotonic() < until:
            time.sleep(AGAIN_S)
            found |= self.describe(name for name in names if name not in found)
        return found

    def _describe(self, name: str, within_s: float) -> Topic:
        resource = ConfigResource(ConfigResource.Type.TOPIC, name)
        described = self._client.describe_topics(
            TopicCollection([name]), include_authorized_operations=True, request_timeout=within_s
        )[name]
        configs = self._client.describe_configs([resource], request_timeout=within_s)[resource]
        said = described.result(within_s + 1)
        try:
            config = configs.result(within_s + 1)
        except KafkaException as error:
            if code_of(error) not in _FORBIDDEN:
                raise
            # A right that few clients are given. What follows from a wrong setting is the operators' to see then.
            _log.warning("topic %s: no permission to DESCRIBE_CONFIGS: its settings are not checked", name)
            config = {}
        if not said.partitions:  # it is being made
            raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
        may = said.authorized_operations
        return Topic(
            name=name,
            id=str(said.topic_id),
            partitions=len(said.partitions),
            replication=min(len(partition.replicas) for partition in said.partitions),
            config={key: str(entry.value) for key, entry in config.items() if entry.value is not None},
            may=None if not may else frozenset(operation.name for operation in may),
        )

    def lows(self, places: Iterable[Place]) -> dict[Place, int]:
        """The lowest offsets that are left."""
        return self._offsets(places, OffsetSpec.earliest())  # type: ignore[no-untyped-call]

    def ends(self, places: Iterable[Place]) -> dict[Place, int]:
        return self._offsets(places, OffsetSpec.latest())  # type: ignore[no-untyped-call]

    def since(self, places: Iterable[Place], epoch_ms: int) -> dict[Place, int]:
        """The first offsets whose records are of that time or later; -1 where none is."""
        return self._offsets(places, OffsetSpec.for_timestamp(epoch_ms))

    def _offsets(self, places: Iterable[Place], spec: OffsetSpec) -> dict[Place, int]:
        wanted = {TopicPartition(*place): spec for place in places}
        if not wanted:
            return {}

        def call(within_s: float) -> dict[Place, int]:
            asked = self._client.list_offsets(wanted, request_timeout=within_s)
            return {
                (place.topic, place.partition): future.result(within_s + 1).offset
                for place, future in asked.items()
            }

        return self.ask(f"offsets of {', '.join(sorted({place.topic for place in wanted}))}", call)

    def commit(self, group: str, positions: Mapping[Place, int]) -> None:
        """Set the positions. A broker refuses where the group has members."""

        def call(within_s: float) -> None:
            moved = [TopicPartition(*place, offset) for place, offset in positions.items()]
            asked = self._client.alter_consumer_group_offsets(
                [ConsumerGroupTopicPartitions(group, moved)], request_timeout=within_s
            )
            for place in asked[group].result(within_s + 1).topic_partitions or []:
                if place.error is not None:
                    raise KafkaException(place.error)

        self.ask(f"committing for group {group}, which only its members can while it has any", call)

    def delete_below(self, positions: Mapping[Place, int]) -> dict[Place, int]:
        """DeleteRecords; what the lowest offsets are now."""
        if not positions:
            return {}

        def call(within_s: float) -> dict[Place, int]:
            wanted = [TopicPartition(*place, offset) for place, offset in positions.items()]
            asked = self._client.delete_records(wanted, request_timeout=within_s)
            return {
                (place.topic, place.partition): future.result(within_s + 1).low_watermark
                for place, future in asked.items()
            }

        return self.ask("deleting old records", call)

    # --- making -----------------------------------------------------------------------------------------------

    def create(self, name: str, partitions: int, replication: int | None, config: Mapping[str, str]) -> None:
        """Make the topic unless it is there, and wait until it is known."""
        new = NewTopic(
            name,
            num_partitions=partitions,
            replication_factor=-1 if replication is None else replication,
            config=dict(config),
        )

        def call(within_s: float) -> None:
            asked = self._client.create_topics([new], operation_timeout=within_s, request_timeout=within_s)
            try:
                asked[name].result(within_s + 1)
            except KafkaException as error:
                if code_of(error) != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise

        self.ask(f"creating topic {name} (partitions={partitions}, replication={replication})", call)
        until = time.monotonic() + VISIBLE_S
        while name not in self.topics():
            if time.monotonic() >= until:
                raise LogUnusable(
                    f"{self._address}: topic {name}: was created, and is not known after {VISIBLE_S:g} s"
                )
            time.sleep(AGAIN_S)


_MOVED = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
)
_PASSING = (
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.OFFSET_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.NOT_CONTROLLER,
    KafkaError.NETWORK_EXCEPTION,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.UNSTABLE_OFFSET_COMMIT,
    KafkaError._NOENT,  # no leader is known
    KafkaError._TRANSPORT,
)
_STALE = (
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.NOT_LEADER_FOR_PARTITION,
)
_SILENT = (
    KafkaError._TRANSPORT,
    KafkaError._TIMED_OUT,
    KafkaError._ALL_BROKERS_DOWN,
    None,  # no Kafka error: the client did not answer
)
