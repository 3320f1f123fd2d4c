"""Kafka among the plugins (opening.py)."""

from __future__ import annotations

import os

from oncekeeper.log.kafka import open_kafka
from oncekeeper.log.kafka_delay_follow import Follower
from oncekeeper.log.kafka_group import Group
from oncekeeper.log.kafka_names import Names, parse_url
from oncekeeper.log.kafka_settings import KafkaSettings, load
from oncekeeper.log.opening import LogPlugin, Place
from oncekeeper.log.port import TaskLog

ACKS = ("all", "1")
PROTOCOLS = ("auto", "consumer", "classic")
# Of the node's configuration (node/settings.py), and no settings of the client library.
_NODES_OWN = {"ONCEKEEPER_KAFKA_REPLICATION", "ONCEKEEPER_KAFKA_PROTOCOL"}


class KafkaPlugin:
    is_of_one_machine = False

    def check(self, place: Place) -> None:
        parse_url(place.url)
        if place.acks not in ACKS:
            raise ValueError(f"kafka_acks={place.acks!r} must be one of {', '.join(ACKS)}")
        if place.protocol not in PROTOCOLS:
            raise ValueError(f"kafka_protocol={place.protocol!r} must be one of {', '.join(PROTOCOLS)}")

    def open(self, place: Place, *, create: bool) -> TaskLog:
        index = None
        if place.index_dir is not None:
            place.index_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            index = place.index_dir / "aside.db"
        return open_kafka(
            place.url,
            cluster_id=place.cluster_id,
            create=create,
            partitions=place.partitions,
            replication=place.replication or None,
            settings=_settings(place),
            index_path=index,
        )

    def delays(self, place: Place) -> Follower | None:
        """What a process keeps delayed tasks with: not started, and none without a directory for its index."""
        if place.index_dir is None:
            return None
        place.index_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        address = parse_url(place.url)
        file = place.index_dir / "delays.db"
        return Follower(address, _settings(place), Names(address.prefix), place.cluster_id, file)

    def group(self, place: Place) -> Group:
        address = parse_url(place.url)
        return Group(
            _settings(place).consumer(address.servers), Names(address.prefix), protocol=place.protocol
        )


def _settings(place: Place) -> KafkaSettings:
    environ = {name: value for name, value in os.environ.items() if name not in _NODES_OWN}
    return load({"acks": place.acks}, place.settings_file or None, environ)


PLUGIN: LogPlugin = KafkaPlugin()
