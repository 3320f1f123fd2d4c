"""What the coordinator wants to read of the task log: on the loop, between whose turns Raft is served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from node import messages as m
from node.parts import LogReader, RecordsPart
from node.patience import DISK_RETRY_MS
from oncekeeper.errors import LogUnusable
from oncekeeper.log.cut import ROW_BYTES_MAX
from oncekeeper.log.port import Fetched, Item, Undecodable

_log = logging.getLogger("oncekeeper.node")

HISTORY_WAIT_MS = 100
READ_BYTES_MAX = 8 << 20
SMALL_READ_TASKS = 64


class Reading:
    def __init__(
        self,
        log: LogReader,
        records: RecordsPart,
        notes: dict[str, str],
        *,
        wants: Callable[[m.Read], bool],
        feed: Callable[[m.Event], None],
    ) -> None:
        """``wants``: whether the partition is still owned as it was when the read was asked for."""
        self._log = log
        self._records = records
        self._notes = notes
        self._wants = wants
        self._feed = feed

    def perform(self, effect: m.Read) -> None:
        """Now, or when it can be; the answer is fed."""
        if not self._wants(effect):
            return  # the partition was given up meanwhile: a log forgets what lies below the last read
        if not self._records.room:
            # The history's disk is behind. What is in hand goes on; no more is taken until it has caught up.
            self._again(effect, HISTORY_WAIT_MS)
            return
        try:
            items = self._log.read(effect.partition, effect.offset, effect.tasks_max, READ_BYTES_MAX)
        except LogUnusable as error:
            self._notes["read"] = f"the task log cannot be read: {error}"
            _log.error("%s; trying again", self._notes["read"])
            self._again(effect, DISK_RETRY_MS)
            return
        self._notes.pop("read", None)
        next_offset = items[-1].end if items else effect.offset
        exhausted = _saw_the_end(items, effect.tasks_max)
        self._feed(m.WasRead(effect.partition, effect.epoch, tuple(items), next_offset, exhausted))

    def _again(self, effect: m.Read, after_ms: int) -> None:
        asyncio.get_running_loop().call_later(after_ms / 1000, self.perform, effect)


def _saw_the_end(items: Sequence[Item], tasks_max: int) -> bool:
    """A read of a few small tasks was not cut short by its bounds, and need not be tried again before somebody
    wakes us. (Should a row be so large that it was cut all the same: service.LOOK_MS.)"""
    count = size = 0
    for item in items:
        tasks = item.end - item.base
        if isinstance(item, Undecodable):
            size += len(item.raw)
        elif isinstance(item, Fetched) and tasks < SMALL_READ_TASKS:
            size += sum(map(len, item.batch.bodies))
        count += tasks
    return count < min(SMALL_READ_TASKS, tasks_max) and size < ROW_BYTES_MAX
