"""Rows of delayed tasks that outlive their tasks, found and dropped by the leader.

A task that is closed leaves the store at once: whoever cancels it drops its row, and whoever ran it does. Two
races leave a row all the same. A cancel comes while the task is on its way into the store, and whoever put it
there has not heard of the cancel; or a new owner reads a task again that was moved to now and has run since. Such a
row does no harm when it falls due, as long as the ledger remembers what became of the task: it is dropped then. But
the ledger remembers cancelled ids and executed keyed ids for weeks, and a row may wait for a year.

So the leader passes over all rows in due order, some hundreds a second, and drops what the ledger has closed.
Ten million rows take half a day; the ledger remembers for 35. A replica that is behind takes a closed task for
open, and never an open one for closed: what it misses, the next pass finds. A task that was cancelled and is
revived meanwhile was appended anew, so a row that goes is no loss.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from node.patience import PatientLog
from oncekeeper.errors import LogUnusable
from oncekeeper.log.delayed import Delayed, DelayStore, Place, delays_of
from oncekeeper.log.port import Fetched, TaskLog, Undecodable, UnknownAppend, Unsent
from raft.commands import Outcome
from raft.ledger import Ledger

T = TypeVar("T")

_log = logging.getLogger("oncekeeper.node")

FIRST_MS = 600_000
"""After the start of a node or of a pass that had to be given up."""
PASS_MS = 6 * 3_600_000
"""From the end of a pass to the next one."""
STEP_MS = 1_000
PAGE_ROWS, STEP_ROWS = 2_048, 256
_FOR_EVER_MS = 1 << 60
_CLOSED = (Outcome.EXECUTED, Outcome.CANCELLED)


def closed_places(ledger: Ledger, found: Iterable[tuple[Delayed, Fetched | Undecodable]]) -> list[Place]:
    """Of what waits in these rows, the places of tasks that are executed or cancelled."""
    places: list[Place] = []
    for row, item in found:
        if isinstance(item, Undecodable):
            continue  # dead letters get it when it is due
        offset = row.offset
        for span in ledger.classify(item.batch.ids):
            if span.outcome in _CLOSED:
                places.append(Place(row.partition, offset, span.count))
            offset += span.count
    return places


class _Unreadable(Exception):
    pass


class Leftovers:
    def __init__(
        self, ledger: Ledger, log: PatientLog, *, is_leader: Callable[[], bool], step_ms: int = STEP_MS
    ) -> None:
        self._ledger = ledger
        self._log = log
        self._is_leader = is_leader
        self._step_ms = step_ms
        self.dropped = 0
        """Tasks whose rows were dropped, since the start."""

    async def run(self) -> None:
        wait_ms = FIRST_MS
        while True:
            await asyncio.sleep(wait_ms / 1000)
            wait_ms = PASS_MS if self._is_leader() and await self.sweep() else FIRST_MS

    async def sweep(self) -> bool:
        """One pass; False if it was given up: another node leads, or the store cannot be read now."""
        try:
            for partition in await self._ask(lambda store: sorted(store.counts())):
                after: Delayed | None = None
                while page := await self._page(partition, after):
                    for at in range(0, len(page), STEP_ROWS):
                        if not self._is_leader():
                            return False
                        await self._step(page[at : at + STEP_ROWS])
                    after = page[-1]
        except _Unreadable as error:
            _log.info("looking for rows that outlived their tasks was given up: %s", error)
            return False
        return True

    async def _page(self, partition: int, after: Delayed | None) -> list[Delayed]:
        return await self._ask(lambda store: store.due((partition,), _FOR_EVER_MS, after, PAGE_ROWS))

    async def _step(self, rows: Sequence[Delayed]) -> None:
        await asyncio.sleep(self._step_ms / 1000)
        found = await self._ask(lambda store: store.fetch(rows))
        if places := closed_places(self._ledger, found):
            self.dropped += await self._ask(lambda store: store.drop(places))

    async def _ask(self, question: Callable[[DelayStore], T]) -> T:
        """In the log's thread. There is no hurry: what fails now is for the next pass."""

        def asked(log: TaskLog) -> T | _Unreadable:
            store = delays_of(log)
            if store is None:
                return _Unreadable("this log keeps no delayed tasks")
            try:
                return question(store)
            except (LogUnusable, Unsent, UnknownAppend) as error:
                return _Unreadable(str(error))

        answer = await self._log.run(asked)
        if isinstance(answer, _Unreadable):
            raise answer
        return answer
