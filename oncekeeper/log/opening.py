"""Which task log a cluster has, and how a process opens it: by the scheme of its URL.

``embedded`` and ``kafka://…`` are built in. Another package brings its own by an entry point of the group
``oncekeeper.logs``: the scheme is its name, and it loads to a ``LogPlugin``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec

from oncekeeper.errors import LogUnusable
from oncekeeper.log.port import TaskLog

_BUILT_IN = {"embedded": "oncekeeper.log.embedded_plugin", "kafka": "oncekeeper.log.kafka_plugin"}


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster's log, and what a process of the cluster or a client needs to open it."""

    url: str = "embedded"
    directory: Path
    """The cluster's data directory on this machine."""
    cluster_id: str = ""
    partitions: int = 12
    replication: int = 0
    """Copies of each partition; 0: as many as there are brokers, three at most."""
    acks: str = "all"
    settings_file: str = ""
    """The client library's own settings, secrets among them; no other user may read it."""
    protocol: str = "auto"
    index_dir: Path | None = None
    """A node's own directory, for what it derives from the log; None: in memory."""


class LogPlugin(Protocol):
    """What a scheme of task logs offers.

    One that keeps delayed tasks by an index in ``index_dir`` also has ``delays(place)``, as kafka_plugin.py does.
    """

    @property
    def is_of_one_machine(self) -> bool:
        """Whether who appends must wake the nodes, which all stand on this machine (node/wake.py)."""
        ...

    def check(self, place: Place) -> None:
        """Raise ValueError, naming field and rule, if it cannot be so. Opens nothing."""
        ...

    def open(self, place: Place, *, create: bool) -> TaskLog:
        """Raises LogUnusable."""
        ...

    def group(self, place: Place) -> Any:
        """A membership that assigns partitions (node/parts.py: GroupPart); None: they follow the ledger."""
        ...


def plugin_of(url: str) -> LogPlugin:
    """LogUnusable if no plugin of that scheme is installed, or if it cannot be loaded."""
    scheme = url.partition(":")[0]
    try:
        if scheme in _BUILT_IN:
            return cast(LogPlugin, import_module(_BUILT_IN[scheme]).PLUGIN)
        for entry in entry_points(group="oncekeeper.logs", name=scheme):
            return cast(LogPlugin, entry.load())
    except ImportError as error:
        hint = ": pip install 'oncekeeper[kafka]'" if scheme == "kafka" else ""
        raise LogUnusable(f"log={scheme!r} cannot be loaded ({error}){hint}") from error
    names = sorted({*_BUILT_IN, *entry_points(group="oncekeeper.logs").names})
    raise LogUnusable(f"log={url!r} names no task log that is installed (there are: {', '.join(names)})")


def open_place(place: Place, *, create: bool = False) -> TaskLog:
    """Open the log of a cluster. Raises LogUnusable."""
    return plugin_of(place.url).open(place, create=create)
