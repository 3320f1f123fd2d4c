"""The client that is a member of a consumer group: its settings under either protocol, and its errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message

from oncekeeper.log.kafka_buffers import Lost

NEW, CLASSIC = "consumer", "classic"
_CLASSIC = {"partition.assignment.strategy": "cooperative-sticky", "session.timeout.ms": "6000"}
_BROKERS = (
    "partition.assignment.strategy",
    "session.timeout.ms",
    "heartbeat.interval.ms",
)  # under the new one
_OURS = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",  # never silently past anything
    "enable.partition.eof": True,  # tells where a partition ends, behind markers too
    "queued.min.messages": 20_000,
    "queued.max.messages.kbytes": 16_384,
    "fetch.queue.backoff.ms": 5,  # until a client whose queue was full fetches again; a second by itself
    "fetch.wait.max.ms": 100,  # how long a partition that is read again may wait for the fetch under way
    "reconnect.backoff.max.ms": 1_000,
}


def member_settings(settings: Mapping[str, Any], group: str, protocol: str) -> dict[str, Any]:
    """The user's settings as a member of this group may have them."""
    found = {**settings, **_OURS, "group.id": group, "group.protocol": protocol}
    if protocol == CLASSIC:
        return found | {name: value for name, value in _CLASSIC.items() if name not in settings}
    return {name: value for name, value in found.items() if name not in _BROKERS}


def by_partition(records: list[Message]) -> dict[tuple[str, int], list[Message]]:
    """By topic and partition. KafkaException or Lost for a record of neither."""
    found: dict[tuple[str, int], list[Message]] = {}
    for record in records:
        topic, partition = record.topic(), record.partition()
        if topic is None or partition is None:
            error = record.error()
            raise KafkaException(error) if error is not None else Lost("a record of no partition")
        found.setdefault((topic, partition), []).append(record)
    return found


def is_unsupported(error: Exception | KafkaError) -> bool:
    """Whether the broker has not what was asked for: the new protocol, say."""
    if isinstance(error, KafkaException):
        error = error.args[0]
    if not isinstance(error, KafkaError):
        return False
    if error.code() == KafkaError._FATAL:
        # What is behind a fatal error, the client says in words only.
        return "API version not supported" in error.str()
    return error.code() in (KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_VERSION)
