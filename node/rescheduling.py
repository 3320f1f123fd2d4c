"""Letting a delayed task be due at another time, exactly, by any node: the steps, without the I/O.

A reschedule must not be overtaken by the old due time: by then the message may lie in a node's hands, waiting for
its turn. So:

1. ``Hold``: nobody is granted the task for HOLD_MS. Its answer says whether it had started; that is the truth.
2. The row in the log's store is moved, durably: from now on that is when it is due, whoever asks.
3. Every node with a live session forgets what it fetched before, and says so once the ledger has answered all that
   it had asked for. A node that does not answer holds things up until its lease is over.
4. The hold is taken back; the answer says once more that it had not started.

A crash before the second step leaves a task that is HOLD_MS late at most, and after it, one that is rescheduled.
All of it may be repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from dedup.ids import TaskId, ids_of
from node.facade import Unavailable
from oncekeeper.envelope import ENQUEUED
from oncekeeper.log.delayed import Place, delays_of, store_of
from oncekeeper.log.port import TaskLog
from raft.commands import Answer, Answered, Command, Hold, Outcome
from raft.ledger import Ledger

T = TypeVar("T")

HOLD_MS = 20_000
PROPOSE_MS = 5_000
TELL_S = 14.0  # below HOLD_MS, and above a session's timeout
TELL_PAUSE_S = 0.1
FIND_S = 4.0
"""How long a task may need to come to the store: one that is due soon waits in memory, and comes when held."""
FIND_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Rescheduled:
    """It runs by its new time, and by no other."""


@dataclass(frozen=True, slots=True)
class NoSuchTask:
    pass


@dataclass(frozen=True, slots=True)
class NotDelayed:
    """It waits for no time: for its turn, or for a worker."""


@dataclass(frozen=True, slots=True)
class TooLate:
    """The ledger's answer: it has started, or ended."""

    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Untold:
    """It may start by its old time all the same, because these nodes did not answer. Asking again is safe."""

    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class NoStore:
    """The log keeps no delayed tasks."""


Result = Rescheduled | NoSuchTask | NotDelayed | TooLate | Untold | NoStore


class WithLog(Protocol):
    def __call__(self, work: Callable[[TaskLog], T], /) -> Awaitable[T]: ...


class Rescheduling:
    def __init__(
        self,
        ledger: Ledger,
        *,
        propose: Callable[[tuple[Command, ...], int], Awaitable[tuple[Answer, ...]]],
        with_log: WithLog,
        tell: Callable[[str, frozenset[int]], Awaitable[bool]],
    ) -> None:
        """``propose`` within milliseconds; raises Unavailable or OutcomeUnknown, which pass to the caller, as the
        log's errors from ``with_log`` do. ``tell`` a node, this one too, that delayed tasks of these partitions
        were moved: whether it said that nothing of them is in a claim any more (NodeFacade.delays_changed)."""
        self._ledger = ledger
        self._propose = propose
        self._with_log = with_log
        self._tell = tell

    async def reschedule(self, task_id: TaskId, due_ms: int) -> Result:
        """What came of it. Raises what ``propose`` and ``with_log`` raise: then it is not known, and may be asked
        again."""
        if (refused := await self._refused(task_id)) is not None:
            return refused
        if (late := await self._hold(task_id, HOLD_MS)) is not None:
            return late
        until = asyncio.get_running_loop().time() + FIND_S
        while not (partitions := await self._with_log(lambda log: _move(log, task_id, due_ms))):
            if asyncio.get_running_loop().time() > until:
                await self._hold(task_id, 0)
                return NotDelayed()
            await asyncio.sleep(FIND_PAUSE_S)
        if silent := await self._untold(partitions):
            return Untold(silent)
        return await self._hold(task_id, 0) or Rescheduled()

    async def _refused(self, task_id: TaskId) -> Result | None:
        """Why it is not even tried: Hold would keep the ledger busy with what is no delayed task."""
        known = await self._with_log(lambda log: _known(log, task_id))
        if known is None:
            return NoStore()
        if known.delayed:
            return None
        state = self._ledger.describe(task_id).state
        if state == "unallocated" or (state == "new" and not known.in_log):
            return NoSuchTask()
        return None if state == "waiting" else NotDelayed()

    async def _hold(self, task_id: TaskId, hold_ms: int) -> TooLate | None:
        (answer,) = await self._propose((Hold(ids_of([task_id]), hold_ms),), PROPOSE_MS)
        if not isinstance(answer, Answered):
            raise Unavailable(f"the ledger answered {answer!r}")
        outcome = answer.spans[0].outcome
        return None if outcome is Outcome.SETTLED else TooLate(outcome)

    async def _untold(self, partitions: frozenset[int]) -> frozenset[str]:
        """Who has a live session, and did not say in time that it has forgotten what it knew of them."""
        told: set[str] = set()
        until = asyncio.get_running_loop().time() + TELL_S
        while True:
            live = {session.node for session in self._ledger.sessions.values() if session.consumes}
            missing = sorted(live - told)
            if not missing or asyncio.get_running_loop().time() > until:
                return frozenset(missing)
            answers = await asyncio.gather(*(self._tell(name, partitions) for name in missing))
            told.update(name for name, clear in zip(missing, answers, strict=True) if clear)
            if len(told) < len(live):
                await asyncio.sleep(TELL_PAUSE_S)


# --- in the log's thread ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Known:
    delayed: bool  # it waits in the store, or was submitted with a due time and may come there
    in_log: bool


def _known(log: TaskLog, task_id: TaskId) -> _Known | None:
    delays = delays_of(log)
    if delays is None:
        return None
    if delays.find(task_id):
        return _Known(True, True)
    places = log.find(task_id)
    return _Known(any(place.batch.due_ms and place.batch.then != ENQUEUED for place in places), bool(places))


def _move(log: TaskLog, task_id: TaskId, due_ms: int) -> frozenset[int]:
    """Its partitions; none if it is not there."""
    delays = store_of(log)
    rows = delays.find(task_id)
    if not rows or not delays.move([Place(row.partition, row.offset) for row in rows], due_ms):
        return frozenset()
    return frozenset(row.partition for row in rows)
