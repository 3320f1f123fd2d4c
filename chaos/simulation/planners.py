"""People with schedules: each puts one, changes it, pauses and resumes it, fires it by hand, and deletes it.

What they ask passes through what the HTTP API calls (node/http/schedules.py). In the end, when all was healed, each
looks whether its schedule has caught up, and takes it away for good: a run could not end else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from chaos.simulation.clients import Unreached
from chaos.simulation.timetables import SCHEDULES, Known
from chaos.simulation.workload import CATCH_UPS, EVERY_MS, POLICY
from node.http.schedules import BY_HAND, by_hand, change, clock_ms
from node.http.status import fresh
from node.http.wire import ApiError
from node.running import RunningNode
from node.schedules import DECLARED
from oncekeeper.envelope import TaskBatch, batches_of
from raft import commands as c

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster
    from chaos.simulation.process import Process
    from node.schedules import ScheduleDriver

HANDLERS = ("count", "post", "mail", "pay")
LOOK_S = 0.1
WITHIN_S = 4.0
BEHIND_MS = 300
"""So much a clock may be behind, and a firing be under way, when people look whether all were decided."""
Act = Callable[[RunningNode], Awaitable[Any]]


class Planner:
    def __init__(self, world: Cluster, name: str) -> None:
        self.world = world
        self.name = name
        self.random = world.random
        self.timetables = world.witness.timetables
        self._asked = 0

    @property
    def quiet(self) -> bool:
        """Whether nothing of it will fire any more."""
        known = self.timetables.known.get(self.name)
        return known is None or (known.owner == DECLARED and known.paused)

    async def work(self) -> None:
        world = self.world
        while world.scheduler.now < world.faults.healed_s - 0.2:
            await asyncio.sleep(
                (0.1 if world.pausing else 0.2) + (0.4 if world.pausing else 1.2) * self.random.random()
            )
            await self._act(self.timetables.known.get(self.name))

    async def end(self) -> None:
        """Nothing that was due may be missing; then it is taken away, as often as it comes up again."""
        world, name = self.world, self.name
        while world.scheduler.now < world.faults.healed_s + LOOK_S:
            await asyncio.sleep(LOOK_S)
        wall_ms = world.clients.loop.clock.wall_ms() - BEHIND_MS
        until = world.scheduler.now + 30
        while self.timetables.behind(name, wall_ms):
            if world.scheduler.now > until:
                world.witness.violated(
                    SCHEDULES,
                    f"schedule {name} owes what was due up to {wall_ms}: {self.timetables.known[name]}",
                )
                return
            await asyncio.sleep(LOOK_S)

    async def guard(self) -> None:
        while True:
            if not self.quiet:
                is_coded = self.timetables.known[self.name].owner == DECLARED
                await (self._pause(True) if is_coded else self._delete())
            await asyncio.sleep(LOOK_S)

    async def _act(self, known: Known | None) -> None:
        draw = self.random.random()
        if known is None:
            if self.name not in POLICY:  # that of a handler is for the code to declare
                await self._put(self._timetable())
        elif draw < (0.7 if self.world.pausing else 0.3):
            await self._pause(not known.paused)
        elif known.paused and draw < 0.6:
            await self._pause(False)
        elif draw < 0.45:
            await self._fire(known)
        elif known.owner == DECLARED:
            self.world.deploy()
        elif draw < 0.75:
            await self._put(self._timetable())
        elif draw < 0.85:
            await self._put(known.timetable)
        else:
            await self._delete()

    def _timetable(self) -> c.Timetable:
        draw = self.random
        when, handler = f"every {draw.choice(EVERY_MS)}ms", draw.choice(HANDLERS)
        body = b'{"n": %d}' % draw.randrange(9)
        return c.Timetable(when, "", handler, "default", body, 0, draw.choice(CATCH_UPS))

    def _by(self) -> str:
        self._asked += 1
        return f"planner of {self.name}, {self._asked}"

    async def _change(self, by: str, command: Callable[[], c.Command]) -> None:
        async def act(face: RunningNode) -> None:
            await fresh(face)
            await change(face, self.name, command())

        self.world.witness.note("planner", "ASKS", None, by)
        if await self._told(act):
            self.world.witness.note("planner", "TOLD", None, by)
            self.timetables.told(by)

    async def _told(self, act: Act) -> bool:
        try:
            await self.world.clients.ask(act, WITHIN_S)
        except Unreached:
            return False
        except ApiError as error:
            self.world.witness.note("planner", "REFUSED", None, str(error))
            return False
        return True

    async def _put(self, timetable: c.Timetable) -> None:
        by = self._by()
        await self._change(by, lambda: c.PutSchedule(self.name, timetable, BY_HAND, by, clock_ms()))

    async def _pause(self, paused: bool) -> None:
        by = self._by()
        await self._change(by, lambda: c.PauseSchedule(self.name, paused, by, clock_ms()))

    async def _delete(self) -> None:
        by = self._by()
        await self._change(by, lambda: c.DeleteSchedule(self.name, BY_HAND, by))

    async def _fire(self, known: Known) -> None:
        """Now, and once, whatever its times are: under an id of its own, asked for again until it is known."""
        task_id = self.random.getrandbits(128).to_bytes(16, "big")
        message = by_hand(self.name, known.timetable, task_id, "planner")
        history, t_ns = self.world.witness.history, self.world.witness.t_ns
        policy = POLICY[message.handler]
        history.submit([task_id], policy, acknowledged=False, t_ns=t_ns)
        for _ in range(2):
            if await self._told(lambda face: face.append(batches_of([message]))):
                history.submit([task_id], policy, acknowledged=True, t_ns=self.world.witness.t_ns)
                return


def watch_schedules(process: Process, driver: ScheduleDriver) -> None:
    """Whatever the driver decides and does is told: to the witness, and to whoever aims a fault by it."""
    world, propose, append = process.world, driver._propose, driver._append

    async def proposing(commands: tuple[c.Command, ...]) -> tuple[c.Answer, ...]:
        world.witness.timetables.proposing(process.name, commands, process.machine.clock.wall_ms())
        world.happened(f"schedule: {type(commands[0]).__name__}", process)
        return await propose(commands)

    async def appending(batches: Sequence[TaskBatch]) -> object:
        world.happened("schedule: append", process)
        return await append(batches)

    driver._propose, driver._append = proposing, appending
