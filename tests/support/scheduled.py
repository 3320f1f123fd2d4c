"""Leaders that come and go over one ledger and one log, killed between any two steps of the schedule driver."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from dedup.ids import TaskId
from node.schedules import ScheduleDriver, firing_id
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.memory import MemoryLog
from raft.codec import encode_proposal
from raft.commands import Answer, Command, Proposal, PutSchedule, Rejected, Timetable
from raft.ledger import Ledger

START_MS = 1_800_000_000_000


class Killed(BaseException):
    """The leader is gone, at this very step."""


class World:
    """What outlives a leader: the ledger, the log, and time."""

    def __init__(self) -> None:
        self.ledger = Ledger(1)
        self.log = MemoryLog(3, clock_ms=lambda: self.now_ms)
        self.now_ms = START_MS
        self.messages: dict[TaskId, TaskBatch] = {}
        self.appended = 0  # copies and all
        self.leaders = 0
        self._sequence = itertools.count(1)

    def apply(self, *commands: Command) -> tuple[Answer, ...]:
        payload = encode_proposal(Proposal(7, next(self._sequence), commands))
        answers = self.ledger.apply(self.ledger.applied_index + 1, payload).answers
        self.ledger.check_invariants()
        return answers

    def put(
        self, name: str, when: str, catch_up: str = "latest", zone: str = "", owner: str = "hand"
    ) -> None:
        timetable = Timetable(when, zone, "shop.tick", "default", b"{}", 0, catch_up)
        (answer,) = self.apply(PutSchedule(name, timetable, owner, "me", self.now_ms))
        assert not isinstance(answer, Rejected), answer

    def fired(self, name: str, every_ms: int) -> list[int]:
        """The times since the start for which it fired, by the ids in the log, as multiples of an interval."""
        first = START_MS - START_MS % every_ms
        times = range(first, self.now_ms + 1, every_ms)
        known = {firing_id(name, at_ms): at_ms for at_ms in times}
        return sorted(known[task_id] for task_id in self.messages if task_id in known)


class Leader:
    """A driver that can be killed: ``dies_at`` counts its steps."""

    def __init__(self, world: World, late_ms: int = 30_000) -> None:
        self.world = world
        self.dies_at: int | None = None
        self.steps = 0
        self.leads = True
        self.yields = False
        self.clock_ms: Callable[[], int] = lambda: world.now_ms
        self.notes: dict[str, str] = {}
        self.spawned: list[asyncio.Task[None]] = []
        world.leaders += 1
        self.driver = ScheduleDriver(
            world.ledger,
            node=f"n{world.leaders}",
            late_ms=late_ms,
            wall_ms=lambda: self.clock_ms(),
            is_leader=lambda: self.leads,
            barrier=self._barrier,
            propose=self._propose,
            append=self._append,
            spawn=self._spawn,
            notes=self.notes,
            reached=lambda step: self._step(),
        )

    def _step(self) -> None:
        self.steps += 1
        if self.steps == self.dies_at:
            raise Killed

    async def _barrier(self) -> bool:
        return True

    async def _propose(self, commands: tuple[Command, ...]) -> tuple[Answer, ...]:
        self._step()  # before it was sent
        if self.yields:
            await asyncio.sleep(0)
        answers = self.world.apply(*commands)
        self._step()  # decided, and the leader has not heard of it
        return answers

    async def _append(self, batches: Sequence[TaskBatch]) -> None:
        self._step()
        if self.yields:
            await asyncio.sleep(0)
        self.world.log.append(batches)
        for batch in batches:
            self.world.appended += len(batch)
            for task_id in batch.ids:
                self.world.messages.setdefault(task_id, batch)
        self._step()  # stored, and the leader has not heard of it

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.spawned.append(asyncio.get_running_loop().create_task(work))
