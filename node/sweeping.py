"""When the leader sweeps what lies aside (node/sweeper.py): at each event that frees tasks, when it becomes leader,
and once a minute over all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from dedup.ids import Ids
from node import sweeper
from node.patience import PatientLog
from oncekeeper.log.port import Aside
from raft.ledger import Ledger

SWEEP_MS = 60_000
KINDS = ("dead", "suspect")


class Sweeping:
    def __init__(
        self,
        ledger: Ledger,
        log: PatientLog,
        *,
        is_leader: Callable[[], bool],
        barrier: Callable[[], Awaitable[bool]],
        wake: Callable[[set[int]], None],
    ) -> None:
        """``barrier``: whether the ledger here is surely not behind. ``wake``: told of partitions that grew; in
        the log's thread."""
        self._ledger = ledger
        self._log = log
        self._is_leader = is_leader
        self._barrier = barrier
        self._wake = wake

    async def run(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_MS / 1000)
            if self._is_leader():
                await self.all()

    async def all(self) -> None:
        for kind in KINDS:
            after = 0
            while page := await self._log.run(lambda log: sweeper.all_aside(log, kind, after)):  # noqa: B023
                after = page[-1][0]
                await self._sweep([task for _, task in page])

    async def those(self, ids: Ids) -> None:
        """These may run again."""
        if tasks := await self._log.run(lambda log: sweeper.aside_of(log, ids)):
            await self._sweep(tasks)

    async def _sweep(self, tasks: list[Aside]) -> None:
        # What lies aside was claimed before it was put there. A ledger that is behind, as a new leader's or a
        # deposed one's may be, would take it for free, and bring back what its holder is just giving up.
        while not await self._barrier():
            if not self._is_leader():
                return  # whoever leads next sweeps everything
        again, drop = sweeper.Verdicts(self._ledger).split(tasks)
        if again:
            await self._log.run(lambda log: sweeper.append_again(log, again, self._wake))
        if drop:
            await self._log.run(lambda log: log.drop_aside(drop))
