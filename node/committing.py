"""What the log may forget, told to it a few times a second: moved positions, and delayed tasks that are closed.

By time and not by task, because each is a write. Nothing rests on how soon: what is told late is read or falls due
once more, and the ledger says that it ran.
"""

from __future__ import annotations

import asyncio

from node.coordinator import Coordinator
from node.crashpoint import CrashPoint
from node.patience import PatientLog
from node.witness import Witness
from oncekeeper.log.delayed import store_of

COMMIT_MS = 200


class Committing:
    def __init__(
        self, coordinator: Coordinator, log: PatientLog, crash: CrashPoint, witness: Witness
    ) -> None:
        self._coordinator = coordinator
        self._log = log
        self._crash = crash
        self._witness = witness

    async def run(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_MS / 1000)
            await self.commit()

    async def commit(self) -> None:
        if positions := self._coordinator.commit_positions():
            self._crash.reached("before_commit")
            await self._log.run(lambda log: log.commit(positions))
            self._witness.committed(positions)
            self._crash.reached("after_commit")
        if drops := self._coordinator.delayed_drops():
            self._crash.reached("before_drop")
            await self._log.run(lambda log: store_of(log).drop(drops))
            self._crash.reached("after_drop")
