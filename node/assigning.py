"""Which partitions are this node's, and from where: by the log's own group, or by the ledger's sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from node import messages as m
from node.config import NodeConfig
from node.ownership import owned_by
from node.parts import LogPart
from node.patience import DISK_RETRY_MS
from node.session import SessionKeeper
from oncekeeper.errors import LogUnusable
from raft.ledger import Ledger

_log = logging.getLogger("oncekeeper.node")


class Assigning:
    def __init__(
        self,
        config: NodeConfig,
        log: LogPart,
        ledger: Ledger,
        session: SessionKeeper,
        notes: dict[str, str],
        feed: Callable[[m.Event], None],
    ) -> None:
        self._config = config
        self._log = log
        self._ledger = ledger
        self._session = session
        self._notes = notes
        self._feed = feed

    def assign(self) -> None:
        """Sessions, or what the log assigns, may have changed: compute what is ours, and take it over from its
        committed positions."""
        takes_part = bool(self._session.session) and not self._session.fenced
        takes_part = takes_part and self._config.consumes and bool(self._config.app)
        if self._log.group is not None:
            # The log assigns; without a session we are no member of its group either.
            self._log.group.want(takes_part)
            self._feed(m.Assigned(dict(self._log.group.positions)))
            return
        owned: frozenset[int] = frozenset()
        if takes_part:
            consuming = sorted({s.node for s in self._ledger.sessions.values() if s.consumes})
            owned = owned_by(self._config.node_id, self._log.reader.partitions, consuming)
        try:
            committed = self._log.reader.committed() if owned else {}
        except LogUnusable as error:
            self._notes["read"] = f"the task log cannot be read: {error}"
            _log.error("%s; trying again", self._notes["read"])
            asyncio.get_running_loop().call_later(DISK_RETRY_MS / 1000, self.assign)
            return
        self._feed(m.Assigned({number: committed.get(number, 0) for number in owned}))
