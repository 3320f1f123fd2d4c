"""Letting a delayed task be due at another time, exactly, by any node: the steps, without the I/O.

A reschedule must not be overtaken by the old due time: by then the message may lie in a node's hands, waiting for
its turn. So:

1. ``Hold``: nobody is granted the task for HOLD_MS, again and again until this ends. The answer says whether it had
   started; that is the truth.
2. The task's row in the log's store gets the new time, durably. A task that is not there, because it is due soon or
   was not read yet, is put there: whoever finds it in its queue looks there before it starts it (deferring.py).
3. Every node with a live session forgets what it fetched before, and says so once the ledger and the store have
   answered all that it had asked for. A node that does not answer holds things up until its lease is over. Who
   opens a session later finds the new time; so those are asked who have one after the second step (``barrier``).
4. The hold is taken back; the answer says once more that it had not started. It is believed if the hold had not run
   out on the way.

A task that takes its turn when it is due (``then="enqueue"``) may have been appended to its queue while its row was
moved: on a log that cannot do both or neither (Kafka) both may stand. So before the fourth step it is made sure
that it does not: if it stands in its queue it goes by that, and the answer says so.

A crash before the second step leaves a task that is HOLD_MS late at most, and after it, one that is rescheduled.
All of it may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from dedup.ids import TaskId, ids_of
from node.facade import OutcomeUnknown, Unavailable
from node.pieces import is_delayed
from oncekeeper.envelope import ENQUEUED
from oncekeeper.errors import LogUnusable
from oncekeeper.log.delayed import ENQUEUE, RUN, Deferral, Delayed, Place, delays_of, store_of
from oncekeeper.log.port import Located, TaskLog, Unsent
from raft.commands import Answer, Answered, Command, Hold, Outcome
from raft.ledger import Ledger

T = TypeVar("T")

HOLD_MS = 5_000
PROPOSE_MS = 5_000
TELL_S = 14.0  # above a session's timeout
TELL_PAUSE_S = 0.1


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
class Overdue:
    """It took so long that the task may have started by its old time. Asking again is safe."""


@dataclass(frozen=True, slots=True)
class NoStore:
    """The log keeps no delayed tasks."""


Result = Rescheduled | NoSuchTask | NotDelayed | TooLate | Untold | Overdue | NoStore
Propose = Callable[[tuple[Command, ...], int], Awaitable[tuple[Answer, ...]]]


class WithLog(Protocol):
    def __call__(self, work: Callable[[TaskLog], T], /) -> Awaitable[T]: ...


class Rescheduling:
    def __init__(
        self,
        ledger: Ledger,
        *,
        propose: Propose,
        barrier: Callable[[int], Awaitable[None]],
        with_log: WithLog,
        tell: Callable[[str, frozenset[int]], Awaitable[bool]],
        wall_ms: Callable[[], int],
    ) -> None:
        """``propose`` and ``barrier`` within milliseconds; as NodeFacade's, they raise Unavailable or
        OutcomeUnknown. ``tell`` a node, this one too, that delayed tasks of these partitions were moved: whether it
        said that nothing of them is in a claim any more (NodeFacade.delays_changed)."""
        self._ledger = ledger
        self._propose = propose
        self._barrier = barrier
        self._with_log = with_log
        self._tell = tell
        self._wall_ms = wall_ms

    async def reschedule(self, task_id: TaskId, due_ms: int) -> Result:
        """What came of it. Unavailable, Unsent and LogUnusable: surely nothing. OutcomeUnknown and UnknownAppend:
        perhaps it was, and it may be asked for again."""
        known = await self._with_log(lambda log: _known(log, task_id))
        if (refused := self._refused(task_id, known)) is not None:
            return refused
        hold = _Hold(self._ledger, self._propose, task_id)
        try:
            return await hold.take() or await self._under(hold, known.places, task_id, due_ms)
        except Exception:
            await hold.drop()
            raise
        finally:
            hold.stop()

    def _refused(self, task_id: TaskId, known: _Known) -> Result | None:
        """Why it is not even tried: Hold would keep the ledger busy with what is no delayed task."""
        if not known.has_store:
            return NoStore()
        if known.is_delayed:
            return None
        is_known = known.places or self._ledger.describe(task_id).state not in ("new", "unallocated")
        return NotDelayed() if is_known else NoSuchTask()

    async def _under(self, hold: _Hold, places: list[Located], task_id: TaskId, due_ms: int) -> Result:
        kept = await self._with_log(lambda log: _keep(log, places, task_id, due_ms))
        if not kept.stands:
            late = await hold.give_back()
            await asyncio.gather(*(self._tell(name, kept.partitions) for name in sorted(self._live())))
            return late if isinstance(late, TooLate) else NotDelayed()
        try:
            await self._barrier(PROPOSE_MS)
            if silent := await self._untold(kept.partitions):
                return Untold(
                    silent
                )  # they may start it by its old time, but not before the hold has run out
            # What was claimed before may have been brought back from dead letters, and takes its turn by that.
            may_stand_in_queue = kept.takes_turn or self._ledger.describe(task_id).fence > 0
            goes_by_it = not may_stand_in_queue or await self._with_log(
                lambda log: _goes_by(log, task_id, due_ms, self._wall_ms())
            )
            late = await hold.give_back()
        except (Unavailable, Unsent, LogUnusable) as error:
            raise OutcomeUnknown(f"it was moved, and not everybody knows: {error}") from error
        return late or (Rescheduled() if goes_by_it else NotDelayed())

    def _live(self) -> set[str]:
        return {session.node for session in self._ledger.sessions.values() if session.consumes}

    async def _untold(self, partitions: frozenset[int]) -> frozenset[str]:
        """Who has a live session, and did not say in time that it has forgotten what it knew of them."""
        told: set[str] = set()
        until = asyncio.get_running_loop().time() + TELL_S
        while True:
            missing = sorted(self._live() - told)
            if not missing or asyncio.get_running_loop().time() > until:
                return frozenset(missing)
            answers = await asyncio.gather(*(self._tell(name, partitions) for name in missing))
            told.update(name for name, clear in zip(missing, answers, strict=True) if clear)
            if not all(answers):
                await asyncio.sleep(TELL_PAUSE_S)


class _Hold:
    """Nobody is granted a task, for HOLD_MS of ledger time; asked for again until it ends, so that the death of who
    holds it costs no more than that."""

    def __init__(self, ledger: Ledger, propose: Propose, task_id: TaskId) -> None:
        self._ledger = ledger
        self._propose = propose
        self._task_id = task_id
        self._until_ms = 0
        self._ran_out = False
        self._ended = asyncio.Event()
        self._renewing: asyncio.Task[None] | None = None

    async def take(self) -> TooLate | None:
        late = await self._ask(HOLD_MS)
        if late is None:
            self._renewing = asyncio.get_running_loop().create_task(self._renew())
        return late

    async def give_back(self) -> TooLate | Overdue | None:
        """None: it had not started, and could not have in all this time."""
        self.stop()
        if self._renewing is not None:
            await self._renewing  # one that came after what follows would hold it once more
        return await self._ask(0) or (Overdue() if self._ran_out else None)

    async def drop(self) -> None:
        """It came to nothing: let go of the task, if that can be done."""
        if self._renewing is not None:
            with contextlib.suppress(Unavailable, OutcomeUnknown):
                await self.give_back()

    def stop(self) -> None:
        """Ask for no more; it runs out."""
        self._ended.set()

    async def _renew(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOLD_MS / 3000):
                    await self._ended.wait()
                return
            with contextlib.suppress(Unavailable, OutcomeUnknown):  # then it runs out perhaps, and is seen to
                await self._ask(HOLD_MS)

    async def _ask(self, hold_ms: int) -> TooLate | None:
        # The ledger here may be behind, so this is at most when the command will be applied, and what it says
        # afterwards at least that.
        until_ms = self._ledger.now_ms + hold_ms
        (answer,) = await self._propose((Hold(ids_of([self._task_id]), hold_ms),), PROPOSE_MS)
        if not isinstance(answer, Answered):
            raise Unavailable(f"the ledger refused to hold it: {answer!r}")
        outcome = answer.spans[0].outcome
        if outcome is not Outcome.SETTLED:
            return TooLate(outcome)
        if self._until_ms and self._ledger.now_ms >= self._until_ms:
            self._ran_out = True
        if hold_ms:
            self._until_ms = until_ms
            if self._ledger.describe(self._task_id).due_ms < until_ms:
                self._ran_out = True  # another reschedule of the same task gave it back
        return None


# --- in the log's thread ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Known:
    has_store: bool = True
    in_store: bool = False
    places: list[Located] = field(default_factory=list)
    """Where it stands in the log, if it is not in the store: to find out costs a log without an index much."""

    @property
    def is_delayed(self) -> bool:
        in_queue = any(place.batch.then == ENQUEUED for place in self.places)
        return self.in_store or (not in_queue and any(is_delayed(place.batch) for place in self.places))


def _known(log: TaskLog, task_id: TaskId) -> _Known:
    delays = delays_of(log)
    if delays is None:
        return _Known(has_store=False)
    if delays.find(task_id):
        return _Known(in_store=True)
    return _Known(places=log.find(task_id))


@dataclass(frozen=True, slots=True)
class _Kept:
    partitions: frozenset[int]
    stands: bool = False
    """In the store, and by its new time."""
    takes_turn: bool = False


def _keep(log: TaskLog, places: list[Located], task_id: TaskId, due_ms: int) -> _Kept:
    """Let it wait in the store for this time: where it waits there, or else at these places of the log."""
    delays = store_of(log)
    rows = delays.find(task_id)
    if not rows:
        delays.defer([_deferral(place, due_ms) for place in places if is_delayed(place.batch)])
        rows = delays.find(task_id)  # its owner may have been quicker, with its own time
    others = [Place(row.partition, row.offset) for row in rows if row.due_ms != due_ms]
    stands = bool(rows) and (not others or delays.move(others, due_ms) > 0)
    partitions = {row.partition for row in rows} | {place.partition for place in places}
    return _Kept(frozenset(partitions), stands, any(row.then == ENQUEUE for row in rows))


def _deferral(place: Located, due_ms: int) -> Deferral:
    way = ENQUEUE if place.batch.then == ENQUEUE else RUN
    return Deferral(place.partition, place.offset, due_ms, way, place.batch)


def _in_queue(log: TaskLog, task_id: TaskId, rows: list[Delayed]) -> list[Located]:
    """Where it was appended to its queue, and waits; nowhere, if it waits in the store for a retry of that."""
    copies = [place for place in log.find(task_id) if place.batch.then == ENQUEUED]
    retries = any(
        row.partition == copy.partition and row.offset <= copy.offset < row.end
        for copy in copies
        for row in rows
    )
    return [] if retries else copies


def _goes_by(log: TaskLog, task_id: TaskId, due_ms: int, wall_ms: int) -> bool:
    """Whether it waits for this time, and not for its turn by the time of before. It is held, and not granted."""
    delays = store_of(log)
    rows = [row for row in delays.find(task_id) if row.due_ms == due_ms]
    if wall_ms >= due_ms:
        return True  # by whichever time it takes its turn, it starts after this one
    copies = _in_queue(log, task_id, rows)
    if not copies:
        return bool(rows)
    if any(copy.batch.due_ms == due_ms for copy in copies):
        return True  # the clock of who has it is ahead of this one's: it was due there, by this time
    delays.drop([Place(row.partition, row.offset) for row in rows if row.then == ENQUEUE])
    return False
