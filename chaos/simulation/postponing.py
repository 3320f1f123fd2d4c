"""Clients with delayed tasks: they submit some, far ahead or soon, move them earlier and later, and cancel some.

A reschedule passes through what the HTTP API calls, to any node, and that node asks the others (process.py). What a
client was told about it makes a promise (``Promises``), which a start must keep. A task that is due in an hour, and
was moved into the run, is one that ends in the run: a move that was acknowledged and forgotten leaves it open. In
the end each of these is moved, or found started or ended.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chaos.checkers.life import TERMINAL, State
from chaos.simulation.clients import Unreached
from dedup.ids import Ids, TaskId, id_text
from node.http.delays import _refusal, _reschedule
from node.http.status import fresh
from node.http.wire import ApiError
from node.rescheduling import Rescheduled
from node.running import RunningNode
from oncekeeper.envelope import TaskBatch
from raft import commands as c

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster
    from chaos.simulation.witness import Witness

FAR_MS = 3_600_000
HANDLERS = ("count", "post", "mail", "pay", "slow", "bad")
SHORT_S, LONG_S = 2.0, 6.0
"""How long a client waits for its reschedule: some give up before it is known."""
AGAIN_S = 0.15
MOVED, REFUSED, UNKNOWN, NO_SUCH = "moved", "refused", "unknown", "no such task"


@dataclass
class _Due:
    """One of these is the earliest that a task may start."""

    times: set[int]
    asked: dict[int, int] = field(default_factory=dict)
    """By number: what was asked for, and is not known yet."""
    mixed: set[int] = field(default_factory=set)
    """Of those asked for: which overlapped with another, so that their order is not known."""


class Promises:
    """Before which time no task may start, by what its clients were told."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._due: dict[TaskId, _Due] = {}
        self._numbers = 0
        self._revived: set[TaskId] = set()
        self.far: list[TaskId] = []
        """Those that are due in an hour by their messages."""

    def submitted(self, task_id: TaskId, due_ms: int) -> None:
        self._due.setdefault(task_id, _Due({due_ms}))

    def earliest_ms(self, task_id: TaskId) -> int:
        """0: at once."""
        due = self._due.get(task_id) if task_id not in self._revived else None
        return min((*due.times, *due.asked.values())) if due is not None else 0

    def exactly_ms(self, task_id: TaskId) -> int:
        """When it is due, if that is sure; else 0."""
        due = self._due[task_id]
        return min(due.times) if task_id not in self._revived and len(due.times) == 1 and not due.asked else 0

    def waits_for_long(self, task_id: TaskId) -> bool:
        """Whether it is cancelled, and by its message due long after the run."""
        life = self._witness.lives.get(task_id)
        return task_id in self.far and life is not None and life.state is State.CANCELLED

    def asked(self, task_id: TaskId, due_ms: int) -> int:
        due = self._due[task_id]
        self._numbers += 1
        if due.asked:
            due.mixed.update(due.asked, (self._numbers,))
        due.asked[self._numbers] = due_ms
        return self._numbers

    def told(self, task_id: TaskId, number: int, what: str) -> None:
        """What became of it, by the node's own word. Without one it may happen at any later time."""
        due = self._due[task_id]
        wanted = due.asked.pop(number)
        if what == MOVED and number not in due.mixed:
            due.times = {wanted}
        elif what != REFUSED:
            due.times.add(wanted)
        self._witness.reached.add(f"reschedule {what}")

    def revived(self, task_id: TaskId) -> None:
        """Somebody wants it after all, and by its message, which is appended again: it may stand at two places, and
        nothing is promised of when it starts."""
        self._revived.add(task_id)


class Postponer:
    def __init__(self, world: Cluster) -> None:
        self.world = world
        self.random = world.random
        self.promises = world.witness.promises
        self._soon: list[TaskId] = []

    async def work(self) -> None:
        world, draw = self.world, self.random
        while world.scheduler.now < world.faults.healed_s - 0.3:
            await asyncio.sleep(0.1 + 0.7 * draw.random())
            choice = draw.random()
            task_id = self._some()
            if choice < (0.4 if world.moving else 0.08):
                await self._move_what_waits()
            elif task_id is None or (choice < 0.35 and len(self.promises.far) < 6):
                await self._submit()
            elif choice < 0.8:
                await self._move(task_id)
            elif choice < 0.9:
                await asyncio.gather(self._move(task_id), self._move(task_id))
            else:
                await asyncio.gather(self._cancel(task_id), self._move(task_id))

    async def end(self) -> None:
        """What is due in an hour is moved to now. What was moved for sure is not asked for again: it must come."""
        for task_id in self.promises.far:
            while not self._has_ended(task_id) and not self._is_soon(task_id):
                if await self._reschedule(task_id, self._now_ms() + 100) == NO_SUCH:
                    break
                await asyncio.sleep(AGAIN_S)

    async def guard(self) -> None:
        """Nothing comes up again."""

    def _is_soon(self, task_id: TaskId) -> bool:
        due_ms = self.promises.exactly_ms(task_id)
        return bool(due_ms) and due_ms < self._now_ms() + FAR_MS // 8

    def _now_ms(self) -> int:
        return self.world.clients.loop.clock.wall_ms()

    def _has_ended(self, task_id: TaskId) -> bool:
        life = self.world.witness.lives.get(task_id)
        return life is not None and life.state in TERMINAL

    def _some(self) -> TaskId | None:
        tasks = [each for each in (*self.promises.far, *self._soon[-3:]) if not self._has_ended(each)]
        return self.random.choice(tasks) if tasks else None

    async def _submit(self) -> None:
        draw = self.random
        is_far = draw.random() < 0.6
        count = draw.choice((1, 1, 3))
        ids = Ids((), tuple(draw.getrandbits(128).to_bytes(16, "big") for _ in range(count)))
        if draw.random() < 0.5:
            try:
                answers = await self.world.clients.ask(
                    lambda face: face.propose((c.AllocateIds(count),), 1500)
                )
                ids = Ids(((answers[0].start, count),))
            except Unreached:
                pass  # as the client library does: random ids
        now_ms = self._now_ms()
        due_ms = now_ms + (FAR_MS if is_far else draw.randrange(150, 2600))
        batch = TaskBatch(
            queue="default",
            handler=draw.choice(HANDLERS),
            ids=ids,
            bodies=(b"{}",) * count,
            due_ms=due_ms,
            submitted_ms=now_ms,
            then="enqueue" if draw.random() < 0.3 else "",
        )
        await self.world.clients.append(batch)
        (self.promises.far if is_far else self._soon).extend(ids)

    async def _move_what_waits(self) -> None:
        """It falls due while its queue is paused, is moved, and then the queue goes on."""
        clients, draw = self.world.clients, self.random
        if not await clients.pause():
            return
        await self._submit()
        for task_id in self._soon[-3:]:
            await self._reschedule(task_id, self._now_ms() + draw.choice((50, 100, 200)))
        await asyncio.sleep(0.3 + 0.2 * draw.random())
        for task_id in self._soon[-3:]:
            await self._reschedule(task_id, self._now_ms() + draw.choice((900, 1500)))
        await clients.resume()

    async def _move(self, task_id: TaskId) -> None:
        """Earlier or later; some not into the run at all."""
        draw = self.random
        ahead_ms = draw.choice((-500, 50, 400, 900, 2000))
        if task_id in self.promises.far and draw.random() < 0.4:
            ahead_ms = FAR_MS // draw.choice((1, 2, 4))
        await self._reschedule(task_id, self._now_ms() + ahead_ms)

    async def _reschedule(self, task_id: TaskId, due_ms: int) -> str:
        witness = self.world.witness

        async def act(face: RunningNode) -> None:
            """As node/http/delays.py: post_reschedule."""
            await fresh(face)
            result = await _reschedule(face, task_id, due_ms)
            if not isinstance(result, Rescheduled):
                raise _refusal(face, task_id, result)

        number = self.promises.asked(task_id, due_ms)
        witness.note("client", "RESCHEDULE", task_id, f"{number}: to {due_ms}")
        try:
            await self.world.clients.ask(act, self.random.choice((SHORT_S, LONG_S, LONG_S)))
        except Unreached as error:
            what, why = REFUSED if error.surely_not else UNKNOWN, str(error)
            if not error.ended:
                witness.note("client", "UNANSWERED", task_id, f"{number}: {why}")
                return UNKNOWN
        except ApiError as error:
            what, why = REFUSED, str(error)
            if error.status == 404:
                what = self._unknown_id(task_id)
        else:
            what, why = MOVED, ""
        witness.note("client", what.upper(), task_id, f"{number}: {why}")
        self.promises.told(task_id, number, REFUSED if what == NO_SUCH else what)
        return what

    def _unknown_id(self, task_id: TaskId) -> str:
        if self.world.witness.history.submitted[task_id].acknowledged:
            self.world.witness.violated(
                12,
                f"{id_text(task_id)} was acknowledged, and nobody can reschedule it: it is not known",
                task_id,
            )
        return NO_SUCH

    async def _cancel(self, task_id: TaskId) -> None:
        await self.world.clients.cancel(task_id)
