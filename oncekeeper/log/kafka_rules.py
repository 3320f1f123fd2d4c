"""What a topic must be for a log to rely on it (pure): wanted settings, and errors that name what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from oncekeeper.errors import LogUnusable
from oncekeeper.log.kafka_names import PARTITIONS_MAX

DAY_MS = 24 * 3600 * 1000
DELAY_BYTES = 1024
RETENTION_MS_MIN = 7 * DAY_MS  # what Kafka's own default is


@dataclass(frozen=True)
class Demands:
    """What a log wants of its topics; None: whatever is there."""

    partitions: int | None = None
    replication: int | None = None
    retention_ms_min: int = RETENTION_MS_MIN


@dataclass(frozen=True)
class Topic:
    name: str
    id: str
    partitions: int
    replication: int
    config: Mapping[str, str]
    may: frozenset[str] | None
    """Operations that the broker allows us; None where it does not say."""

    @property
    def message_bytes_max(self) -> int:
        return int(self.config.get("max.message.bytes", 1_048_588))


def task_topic_config() -> dict[str, str]:
    """Nodes delete what is committed and old; Kafka deletes nothing by itself."""
    return {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}


def aside_topic_config() -> dict[str, str]:
    """Room for whatever a task topic may hold by default, and for what is said about it."""
    return {"cleanup.policy": "compact", "max.message.bytes": str(2 << 20)}


def delay_topic_config() -> dict[str, str]:
    """A node that was away for less than this need not read the whole topic again when it comes back."""
    return aside_topic_config() | {"delete.retention.ms": str(14 * DAY_MS)}


def check_task_topic(topic: Topic, demands: Demands) -> None:
    """LogUnusable naming the topic, the setting, what it is and what it must be."""
    policy = topic.config.get("cleanup.policy", "delete")
    if "compact" in policy:
        raise _wrong(
            topic, f"cleanup.policy={policy}", "'delete': compaction would drop tasks that share a key"
        )
    retention_ms = int(topic.config.get("retention.ms", "-1"))
    if 0 <= retention_ms < demands.retention_ms_min:
        raise _wrong(
            topic,
            f"retention.ms={retention_ms}",
            f"-1 (nodes delete what is done), or {demands.retention_ms_min} at least: "
            "Kafka deletes what is older, executed or not",
        )
    retention_bytes = int(topic.config.get("retention.bytes", "-1"))
    if retention_bytes >= 0:
        raise _wrong(
            topic, f"retention.bytes={retention_bytes}", "-1: Kafka deletes what exceeds it, executed or not"
        )
    if demands.partitions is not None and topic.partitions < demands.partitions:
        raise _wrong(topic, f"partitions={topic.partitions}", f"{demands.partitions} at least, as configured")
    if topic.partitions > PARTITIONS_MAX:
        raise _wrong(topic, f"partitions={topic.partitions}", f"{PARTITIONS_MAX} at most")
    _check_replication(topic, demands)
    check_rights(topic, ("READ", "WRITE"))


def check_compacted_topic(topic: Topic, demands: Demands) -> None:
    _check_compacts(topic, "what lies aside would be lost")
    if topic.partitions != 1:
        raise _wrong(topic, f"partitions={topic.partitions}", "1: its records have one order")
    _check_replication(topic, demands)
    check_rights(topic, ("READ", "WRITE"))


def check_delay_topic(topic: Topic, tasks: Topic, demands: Demands) -> None:
    """``tasks``: the topic of the default queue."""
    _check_compacts(topic, "what waits for longer than it is kept would be lost")
    # A message is written again with the time that it waits for, and with more beside it.
    wanted = tasks.message_bytes_max + DELAY_BYTES
    if topic.config and tasks.config and topic.message_bytes_max < wanted:
        raise _wrong(
            topic,
            f"max.message.bytes={topic.message_bytes_max}",
            f"{wanted} at least: what topic {tasks.name} takes must fit in here too",
        )
    _check_replication(topic, demands)
    check_rights(topic, ("READ", "WRITE"))


def _check_compacts(topic: Topic, otherwise: str) -> None:
    policy = topic.config.get("cleanup.policy", "delete")
    if topic.config and policy != "compact":
        raise _wrong(topic, f"cleanup.policy={policy}", f"'compact': with 'delete' {otherwise}")


def _check_replication(topic: Topic, demands: Demands) -> None:
    if demands.replication is not None and topic.replication < demands.replication:
        raise _wrong(
            topic, f"replication={topic.replication}", f"{demands.replication} at least, as configured"
        )


def check_rights(topic: Topic, rights: Iterable[str]) -> None:
    if topic.may is not None and (lacking := [right for right in rights if right not in topic.may]):
        raise LogUnusable(
            f"topic {topic.name}: no permission to {' and '.join(lacking)} "
            f"(allowed are: {', '.join(sorted(topic.may)) or 'nothing'})"
        )


def _wrong(topic: Topic, found: str, expected: str) -> LogUnusable:
    return LogUnusable(f"topic {topic.name}: {found} must be {expected}")
