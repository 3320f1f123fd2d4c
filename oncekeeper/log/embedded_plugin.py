"""The embedded log among the plugins (opening.py)."""

from __future__ import annotations

from oncekeeper.log.embedded import PARTITIONS_MAX, open_log
from oncekeeper.log.opening import LogPlugin, Place
from oncekeeper.log.port import TaskLog


class EmbeddedPlugin:
    is_of_one_machine = True

    def check(self, place: Place) -> None:
        if place.url != "embedded":
            raise ValueError(f"log={place.url!r} must be just embedded: its place is the cluster's directory")
        if not 1 <= place.partitions <= PARTITIONS_MAX:
            raise ValueError(f"partitions={place.partitions} must be from 1 to {PARTITIONS_MAX}")

    def open(self, place: Place, *, create: bool) -> TaskLog:
        return open_log(
            place.directory,
            create=create,
            partitions=place.partitions if create else None,
            cluster_id=place.cluster_id,
        )

    def group(self, place: Place) -> None:
        return None


PLUGIN: LogPlugin = EmbeddedPlugin()
