"""What the coordinator wants of the log's store of delayed tasks (oncekeeper/log/delayed.py), performed.

What is due is read on the loop, and what is written is written in the log's thread until it is done. Others may
have written too: on a log whose nodes see that a moment later, ``changed`` sees first and forgets then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from node import messages as m
from node.coordinator import Coordinator
from node.crashpoint import CrashPoint
from node.deferring import answer_of_store
from node.parts import Clock, LogPart
from node.patience import DISK_RETRY_MS, PatientLog
from oncekeeper.errors import LogUnusable
from oncekeeper.log.delayed import store_of

_log = logging.getLogger("oncekeeper.node")

POLL_MS = 5


class DelayKeeping:
    def __init__(
        self,
        log: LogPart,
        patient: PatientLog,
        coordinator: Coordinator,
        clock: Clock,
        crash: CrashPoint,
        notes: dict[str, str],
        feed: Callable[[m.Event], None],
    ) -> None:
        self._log = log
        self._patient = patient
        self._coordinator = coordinator
        self._clock = clock
        self._crash = crash
        self._notes = notes
        self._feed = feed
        self._writes = 0
        self._writing: set[int] = set()

    def watch(self) -> None:
        """From now on be told what others write."""
        if self._log.delay_index is not None:
            self._log.delay_index.watch(lambda partitions: self._feed(m.DelaysChanged(partitions)))

    def joined(self) -> None:
        """Who rescheduled while we had no session did not ask us."""
        if self._log.delay_index is not None:
            self._log.delay_index.expect()

    def look(self, effect: m.LoadDue | m.FetchDue | m.LookUp) -> None:
        try:
            event = answer_of_store(store_of(self._log.reader), effect)
        except LogUnusable as error:
            if "delays" not in self._notes:  # each partition asks
                _log.warning("delayed tasks cannot be read: %s; trying again", error)
            self._notes["delays"] = f"delayed tasks cannot be read: {error}"
            asyncio.get_running_loop().call_later(DISK_RETRY_MS / 1000, self.look, effect)
            return
        self._notes.pop("delays", None)
        self._crash.reached("after_fetch", isinstance(effect, m.FetchDue))
        self._feed(event)

    async def write(self, effect: m.Defer | m.MoveDelayed | m.EnqueueDue) -> None:
        """All of these may be repeated after a failure."""
        is_defer = isinstance(effect, m.Defer)
        self._crash.reached("before_defer", is_defer)
        self._writes += 1
        number = self._writes
        self._writing.add(number)
        event = await self._patient.run(lambda log: answer_of_store(store_of(log), effect))
        self._writing.discard(number)
        self._crash.reached("after_defer", is_defer)
        self._feed(event)

    async def changed(self, partitions: frozenset[int], timeout_ms: int) -> bool:
        """Forget what is known of these partitions' delayed tasks; whether nothing of it is being claimed still, or
        being appended to its queue."""
        if self._log.delay_index is not None:
            await self._log.delay_index.see(timeout_ms / 2000)
        self._feed(m.DelaysChanged(partitions))
        ticket, writing = self._coordinator.newest_ticket, frozenset(self._writing)
        until_ms = self._clock.monotonic_ms() + timeout_ms
        while not self._coordinator.answered_up_to(ticket) or not self._writing.isdisjoint(writing):
            if self._clock.monotonic_ms() > until_ms:
                return False
            await asyncio.sleep(POLL_MS / 1000)
        return True
