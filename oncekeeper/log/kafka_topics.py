"""The topics of a log: made or checked when it is opened, and one more for each queue when it is first used.

The topic ``PREFIX.cluster`` says whose log it is. Two clusters that come at once both write their id: the first
record counts, and who finds another's there writes that one again, so that compaction keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping

from oncekeeper.errors import LogUnusable
from oncekeeper.log.kafka_admin import Admin
from oncekeeper.log.kafka_names import PARTITIONS_MAX, Names
from oncekeeper.log.kafka_read import Reader
from oncekeeper.log.kafka_rules import (
    DELAY_BYTES,
    Demands,
    Topic,
    aside_topic_config,
    check_compacted_topic,
    check_delay_topic,
    check_task_topic,
    delay_topic_config,
    task_topic_config,
)
from oncekeeper.log.kafka_send import Sender

PARTITIONS_DEFAULT = 12
REPLICATION_DEFAULT = 3  # as far as there are brokers
_KEY = b"cluster_id"


class Topics:
    def __init__(self, admin: Admin, names: Names, demands: Demands) -> None:
        if demands.partitions is not None and not 1 <= demands.partitions <= PARTITIONS_MAX:
            raise LogUnusable(f"partitions={demands.partitions} must be from 1 to {PARTITIONS_MAX}")
        self._admin = admin
        self._names = names
        self._demands = demands
        self._known: dict[str, Topic] = {}
        self.counts: dict[str, int] = {}
        """The partitions of each queue's topic, as they were seen last. They only become more."""

    @property
    def default(self) -> Topic:
        return self._known[self._names.default]

    @property
    def aside(self) -> dict[str, Topic]:
        """By kind."""
        return {"dead": self._known[self._names.dead], "suspect": self._known[self._names.suspect]}

    @property
    def delay(self) -> Topic:
        return self._known[self._names.delay]

    @property
    def cluster(self) -> Topic:
        return self._known[self._names.cluster]

    def open(self, create: bool) -> None:
        """Every topic is there and as it must be, or LogUnusable."""
        names = self._names
        wanted = (names.default, names.dead, names.suspect, names.cluster, names.delay)
        found = self._admin.describe(wanted)
        if missing := [name for name in wanted if name not in found]:
            if not create:
                raise LogUnusable(
                    f"topic {missing[0]}: does not exist; `oncekeeper cluster up` makes the topics of a log"
                )
            self._make(missing, found)
            found |= self._admin.describe_new(missing)
        for name in wanted:
            if name not in found:
                raise LogUnusable(f"topic {name}: was created, and is not known yet: try again")
            if name == names.default:
                check_task_topic(found[name], self._demands)
            elif name == names.delay:
                check_delay_topic(found[name], found[names.default], self._demands)
            else:
                check_compacted_topic(found[name], self._demands)
        self._known |= found
        self.counts[names.default] = self.default.partitions

    def _make(self, missing: list[str], there: Mapping[str, Topic]) -> None:
        replication = self._replication()
        tasks = there.get(self._names.default)
        wanted = tasks.partitions if tasks else self._demands.partitions or PARTITIONS_DEFAULT
        for name in missing:
            if name == self._names.default:
                partitions, config = wanted, task_topic_config()
            elif name == self._names.delay:
                partitions, config = wanted, delay_topic_config()
                if tasks is not None:
                    room = max(int(config["max.message.bytes"]), tasks.message_bytes_max + DELAY_BYTES)
                    config["max.message.bytes"] = str(room)
            else:
                partitions, config = 1, aside_topic_config()
            self._admin.create(name, partitions, replication, config | _in_sync(replication))

    def _replication(self) -> int:
        return self._demands.replication or min(REPLICATION_DEFAULT, self._admin.brokers())

    def of_queue(self, queue: str) -> Topic:
        """The topic of a queue, made if it is not there: like that of the default queue."""
        name = self._names.topic(queue)
        topic = self._known.get(name)
        if topic is None:
            found = self._admin.describe([name])
            if name not in found:
                config = task_topic_config() | _in_sync(self.default.replication)
                self._admin.create(name, self.default.partitions, self.default.replication, config)
                found = self._admin.describe_new([name])
            topic = found.get(name)
            if topic is None:
                raise LogUnusable(f"topic {name}: was created, and is not known yet: try again")
            # Its partitions may be fewer than those of the default queue: it can be anybody's.
            check_task_topic(topic, Demands(None, self._demands.replication, self._demands.retention_ms_min))
            self._names.number(name, 0)
            self._known[name] = topic
        return topic

    def forget(self, name: str) -> None:
        """Look again when it is used next."""
        if name != self._names.default:
            self._known.pop(name, None)

    def of_queues(self) -> dict[str, int]:
        """Every queue's topic that there is at the moment, and its partitions."""
        found = {
            name: count for name, count in self._admin.topics().items() if self._names.is_queue_topic(name)
        }
        for name in found:
            self._names.number(name, 0)  # met
        self.counts = found
        return found


def _in_sync(replication: int) -> dict[str, str]:
    """With three copies, two must have a record before it counts as stored."""
    return {"min.insync.replicas": str(max(1, replication - 1))} if replication >= 2 else {}


def owner(admin: Admin, reader: Reader, topic: str) -> tuple[str, bool]:
    """(whose log it is, whether every record says so)."""
    found: list[str] = []
    place = (topic, 0)
    offset, end = admin.lows([place])[place], admin.ends([place])[place]
    while offset < end:
        records, offset = reader.read(topic, 0, offset, 1000, 1 << 20)
        found += [
            (record.value() or b"").decode(errors="replace") for record in records if record.key() == _KEY
        ]
        if not records:
            break
    return (found[0] if found else ""), len(set(found)) <= 1


def claim(admin: Admin, reader: Reader, sender: Sender, topic: Topic, cluster_id: str, create: bool) -> None:
    """The log is this cluster's from now on; LogUnusable if it is another's."""
    standing, agreed = owner(admin, reader, topic.name)
    if not standing and create:
        _write(sender, topic, cluster_id)
        standing, agreed = owner(admin, reader, topic.name)
    if not agreed:
        _write(sender, topic, standing)
    if standing and standing != cluster_id:
        raise LogUnusable(
            f"topic {topic.name}: the log belongs to cluster {standing}, not to {cluster_id}: "
            "give another prefix (kafka://HOST:PORT/PREFIX)"
        )


def _write(sender: Sender, topic: Topic, cluster_id: str) -> None:
    record = {"topic": topic.name, "partition": 0, "key": _KEY, "value": cluster_id.encode()}
    sender.send_each([record], topic.message_bytes_max)
