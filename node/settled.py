"""Who waits until a task is closed: the callers of results."""

from __future__ import annotations

import asyncio

from dedup.ids import TaskId, ids_of
from raft.commands import Outcome
from raft.ledger import Ledger

POLL_MS = (
    20  # after something was applied: a busy ledger is asked for all waiters at once, and not by each entry
)


class SettledWaiters:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiters: dict[TaskId, list[asyncio.Future[bool]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def applied(self) -> None:
        """The ledger has changed."""
        if self._waiters and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(POLL_MS / 1000, self._tell)

    def _tell(self) -> None:
        self._timer = None
        for task_id in list(self._waiters):
            if self._is_settled(task_id):
                for waiter in self._waiters.pop(task_id):
                    if not waiter.done():
                        waiter.set_result(True)

    def _is_settled(self, task_id: TaskId) -> bool:
        outcome = self._ledger.classify(ids_of([task_id]))[0].outcome
        return outcome in (Outcome.EXECUTED, Outcome.DEAD, Outcome.CANCELLED)

    async def wait(self, task_id: TaskId, timeout_ms: int) -> bool:
        """Until the ledger has it executed, dead or cancelled; whether it has."""
        if self._is_settled(task_id):
            return True
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(task_id, [])
        waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await waiter
        except TimeoutError:
            waiters.remove(waiter)
            if not waiters:
                self._waiters.pop(task_id, None)
            return False
