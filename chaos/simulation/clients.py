"""Clients: they submit, hear or do not hear, submit again, cancel, revive, rule for humans, and read.

They run on a loop of their own, which never dies. What they ask of a node passes through a node's ``RunningNode``,
which is what the HTTP API calls; the request or its answer may be lost with the node. Tasks they write to the log
themselves, as clients on the machine do, and where the answer is unknown they write the same again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from chaos.checkers.life import Life, State
from chaos.simulation.loop import Clock, ProcessLoop
from chaos.simulation.workload import POLICY
from dedup.ids import Ids, TaskId, ids_of, keyed_id
from node.facade import OutcomeUnknown, Unavailable
from node.http import kept
from node.http.steer import _lay_aside
from node.http.wire import ApiError
from node.running import RunningNode
from oncekeeper.envelope import TaskBatch
from oncekeeper.errors import LogUnusable
from oncekeeper.log.port import UnknownAppend, Unsent
from raft import commands as c

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster
    from chaos.simulation.planners import Planner
    from chaos.simulation.postponing import Postponer
    from chaos.simulation.process import Process

REQUEST_S = 2.5
CLIENTS = 3
NAMES = ("pay", "pay", "mail", "mail", "slow", "count", "crunch", "post", "wire", "bad", "bad")


class Unreached(Exception):
    """No node could be asked, or none answered: the outcome is unknown unless ``surely_not``.

    ``ended``: the node said so itself, and does nothing more about it.
    """

    def __init__(self, text: str, surely_not: bool = False, ended: bool = False) -> None:
        super().__init__(text)
        self.surely_not = surely_not
        self.ended = ended or surely_not


class Clients:
    def __init__(self, world: Cluster) -> None:
        self.world = world
        self.random = world.random
        clock = Clock(world.scheduler, 1.0, 1_700_000_000_000)
        self.loop = ProcessLoop(world.scheduler, clock, 2, "client", world.callback_raised)
        self.busy = 0
        self._keys = 0
        self.planners: list[Planner] = []
        self.postponers: list[Postponer] = []

    @property
    def quiet(self) -> bool:
        return self.busy == 0 and all(planner.quiet for planner in self.planners)

    def start(self) -> None:
        world = self.world
        for number in range(CLIENTS):
            self.busy += 1
            world.scheduler.after(0.4, self.loop, self.loop.enter, self._begin, number)
        for person in (*self.planners, *self.postponers):
            self.busy += 1
            world.scheduler.after(0.45, self.loop, self.loop.enter, self._begin_person, person)
        world.scheduler.after(1.0, self.loop, self.loop.enter, self._begin_human)

    def _begin(self, number: int) -> None:
        self._run(self._client(number))

    def _begin_person(self, person: Planner | Postponer) -> None:
        self._run(self._person(person))

    async def _person(self, person: Planner | Postponer) -> None:
        await person.work()
        await person.end()
        self.busy -= 1
        await person.guard()

    def _begin_human(self) -> None:
        self._run(self._human())
        self._run(self._slow_human())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """A client that ended of a defect of its own would leave everybody waiting for it."""

        def ended(task: Any) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self.world.callback_raised(self.loop, error)

        self.loop.create_task(work).add_done_callback(ended)

    # --- asking a node ------------------------------------------------------------------------------------------

    async def ask(
        self, act: Callable[[RunningNode], Awaitable[Any]], within_s: float = REQUEST_S, name: str = ""
    ) -> Any:
        """Ask that node, or some node; raises Unreached, or ApiError where it refuses."""
        world = self.world
        process = world.processes[name or self.random.choice(world.names)]
        service = process.service
        if not process.alive or service is None:
            raise Unreached(f"{process.name} is down", surely_not=True)
        answer: asyncio.Future[Any] = self.loop.create_future()
        world.scheduler.after(0.0002, process.loop, process.loop.enter, self._serve, process, act, answer)
        done, _ = await asyncio.wait([answer], timeout=within_s)
        if not done:
            raise Unreached(f"{process.name} does not answer")
        try:
            return answer.result()
        except Unavailable as error:
            raise Unreached(str(error), surely_not=True) from error
        except OutcomeUnknown as error:
            raise Unreached(str(error), ended=True) from error
        except ApiError as error:
            if error.body.get("unknown"):
                raise Unreached(str(error), ended=True) from error
            raise

    def _serve(
        self, process: Process, act: Callable[[RunningNode], Awaitable[Any]], answer: asyncio.Future[Any]
    ) -> None:
        service = process.service
        assert service is not None

        async def serve() -> None:
            try:
                result, error = await act(service.face), None
            except (Unavailable, OutcomeUnknown, ApiError) as raised:
                result, error = None, raised
            except LogUnusable as raised:  # as node/http/server.py
                result, error = None, Unavailable(str(raised))
            except (Unsent, UnknownAppend) as raised:
                result, error = None, OutcomeUnknown(str(raised))
            self.world.scheduler.after(
                0.0002, self.loop, self.loop.enter, self._answered, answer, result, error
            )

        process.loop.create_task(serve())

    @staticmethod
    def _answered(answer: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)

    # --- what they do -------------------------------------------------------------------------------------------

    async def _client(self, number: int) -> None:
        world, draw = self.world, self.random
        until = world.faults.healed_s - 0.5
        while world.scheduler.now < until:
            await asyncio.sleep(0.05 + 0.5 * draw.random())
            if world.reviving and draw.random() < 0.3:
                await self._revive()
                continue
            choice = draw.random()
            if choice < 0.58:
                await self._submit_run()
            elif choice < 0.74:
                await self._submit_key()
            elif choice < 0.82:
                await self._cancel()
            elif choice < 0.92:
                await self._revive()
            elif choice < 0.95:
                await self._pause()
            else:
                await self._read()
        await self.resume()
        self.busy -= 1

    async def _submit_run(self) -> None:
        draw, name = self.random, self._handler()
        count = draw.choice((1, 1, 2, 3, 5, 8))
        try:
            answers = await self.ask(lambda face: face.propose((c.AllocateIds(count),), 1500))
        except Unreached:
            # As the client library does: a random keyed id, so that submitting survives.
            ids = Ids((), tuple(draw.getrandbits(128).to_bytes(16, "big") for _ in range(count)))
        else:
            ids = Ids(((answers[0].start, count),))
        due_ms = 0
        if draw.random() < (0.5 if self.world.walls_wrong else 0.12):
            due_ms = self.loop.clock.wall_ms() + draw.randrange(200, 1500)
        batch = TaskBatch(queue="default", handler=name, ids=ids, bodies=(b"{}",) * count, due_ms=due_ms)
        if due_ms % 2:
            # Far ahead of an unknown time: it is kept in the log's store.
            await self.append(msgspec.structs.replace(batch, then="enqueue" if due_ms % 4 == 1 else ""))
        else:
            await self.append(msgspec.structs.replace(batch, submitted_ms=self.loop.clock.wall_ms()))

    def _handler(self) -> str:
        favoured = self.world.favoured
        if favoured and self.random.random() < 0.5:
            return self.random.choice(favoured)
        return self.random.choice(NAMES)

    async def _submit_key(self) -> None:
        if self.random.random() < 0.5 or not self._keys:
            self._keys += 1
        key = f"order-{self._keys}"
        name = NAMES[self._keys % len(NAMES)]
        ids = Ids((), (keyed_id("default", key),))
        await self.append(TaskBatch(queue="default", handler=name, ids=ids, bodies=(b"{}",), keys=(key,)))

    async def append(self, batch: TaskBatch) -> None:
        world, witness = self.world, self.world.witness
        for task_id in batch.ids:
            if batch.due_ms:
                witness.promises.submitted(task_id, batch.due_ms)
            witness.note("client", "SUBMIT", task_id, batch.handler)
        # Recorded before it is written: from here on its outcome is unknown until it is known.
        witness.history.submit(batch.ids, POLICY[batch.handler], acknowledged=False, t_ns=witness.t_ns)
        for _ in range(4):
            await asyncio.sleep(0.002)
            draw = self.random.random()
            stored = draw >= world.log_fails / 2
            if stored:
                appended = world.append([batch])
                world.wake(frozenset(place.partition for place in appended))
            if draw >= world.log_fails:
                witness.history.submit(batch.ids, POLICY[batch.handler], acknowledged=True, t_ns=witness.t_ns)
                for task_id in batch.ids:
                    witness.note("client", "SUBMITTED", task_id)
                return
            await asyncio.sleep(0.1)  # Unsent, or unknown: the same ids again
        witness.reached.add("unknown submit")

    def _some(self, state: State | None = None) -> TaskId | None:
        witness = self.world.witness
        known = [
            each
            for each in witness.history.submitted
            if state is None or ((life := witness.lives.get(each)) is not None and life.state is state)
        ]
        return self.random.choice(known) if known else None

    async def _cancel(self) -> None:
        """Half of them right after the submit, so that some are in time."""
        recent = list(self.world.witness.history.submitted)[-4:]
        task_id = self.random.choice(recent) if recent and self.random.random() < 0.6 else self._some()
        if task_id is not None:
            await self.cancel(task_id)

    async def cancel(self, task_id: TaskId) -> None:
        async def act(face: RunningNode) -> c.Outcome:
            """As node/http/steer.py: first the ledger's word, and then its row is dropped."""
            answers = await face.propose((c.Cancel(ids_of([task_id]), "client"),), 1500)
            outcome: c.Outcome = answers[0].spans[0].outcome  # type: ignore[union-attr]
            if outcome is c.Outcome.SETTLED:
                await face.with_log(lambda log: kept.forget(log, task_id))
            return outcome

        try:
            outcome = await self.ask(act)
        except Unreached:
            return
        if outcome is c.Outcome.SETTLED:
            witness = self.world.witness
            witness.note("client", "CANCELLED", task_id)
            witness.reached.add("cancel")
            life = witness.lives.get(task_id)
            if life is not None and life.state is State.CANCELLED:
                witness.cancelled.add(task_id)

    async def _revive(self) -> None:
        task_id = self._some(State.DEAD if self.random.random() < 0.7 else State.CANCELLED)
        if task_id is None or self.world.witness.promises.waits_for_long(task_id):
            return  # what nobody wanted any more, and is due in an hour, would outlast the run
        self.world.witness.note("client", "REVIVE", task_id)
        self.world.witness.cancelled.discard(task_id)

        async def retry(face: RunningNode) -> None:
            """As node/http/steer.py: the message is made sure of first."""
            await face.with_log(lambda log: _lay_aside(log, task_id))
            await face.propose((c.Revive(ids_of([task_id]), "client"),), 1500)

        try:
            await self.ask(retry)
        except (Unreached, ApiError):  # it was cancelled, and never stored: there is no message
            return

    async def _pause(self) -> None:
        if await self.pause():
            await asyncio.sleep(0.3 * self.random.random())
            await self.resume()

    async def pause(self) -> bool:
        try:
            await self.ask(lambda face: face.propose((c.PutQueue("default", True, "client"),), 1500))
        except Unreached:
            return False
        return True

    async def resume(self) -> None:
        while True:
            try:
                await self.ask(lambda face: face.propose((c.PutQueue("default", False, "client"),), 1500))
            except Unreached:
                await asyncio.sleep(0.2)
            else:
                return

    async def _read(self) -> None:
        """A linearizable read: what was applied anywhere before is known to who passed the barrier."""
        witness = self.world.witness
        highest = witness.highest

        async def read(face: RunningNode) -> int:
            await face.barrier(1500)
            return face.ledger.applied_index

        try:
            index = await self.ask(read)
        except Unreached:
            return
        witness.reached.add("barrier")
        if index < highest:
            witness.violated(
                3, f"a read behind a barrier sees index {index}, and {highest} was applied before"
            )

    # --- the human ----------------------------------------------------------------------------------------------

    async def _human(self) -> None:
        """Rules what is held, by what the sink says, now and then."""
        world, witness = self.world, self.world.witness
        while True:
            await asyncio.sleep(0.8)
            if world.scheduler.now < world.humans_away_until:
                continue
            # People think before they rule, and what they saw may have changed by then.
            seen = [(life, life.fence) for life in self._held()]
            await asyncio.sleep(self.random.choice((0.0, 0.5, 2.0)))
            for life, fence in seen:
                verdict = c.Verdict.EXECUTED if world.effects[life.id] else c.Verdict.NOT_EXECUTED
                if await self._rule(life.id, verdict, fence):
                    witness.reached.add("human ruling")

    async def _slow_human(self) -> None:
        """Another one, who rules by what was true long ago: often on a claim that came after."""
        world = self.world
        while True:
            await asyncio.sleep(0.3)
            held = self._held()
            if not held or world.scheduler.now < world.humans_away_until:
                continue
            life = self.random.choice(held)
            fence = life.fence
            verdict = c.Verdict.EXECUTED if world.effects[life.id] else c.Verdict.NOT_EXECUTED
            for _ in range(30):
                await asyncio.sleep(0.1)
                if life.fence != fence and life.state is State.SUSPECT:
                    world.witness.reached.add("ruling on a claim of before")
                    break
            await self._rule(life.id, verdict, fence)

    async def _rule(self, task_id: TaskId, verdict: c.Verdict, fence: int) -> bool:
        rule = c.Rule(ids_of([task_id]), verdict, "human:sim", "looked at the sink", fence)
        self.world.witness.note("client", "RULES", task_id, f"{verdict.name} under {fence}")
        try:
            await self.ask(self._proposing(rule))
        except Unreached:
            return False
        return True

    def _held(self) -> list[Life]:
        return [
            life
            for life in list(self.world.witness.lives.values())
            if life.state is State.SUSPECT and self._is_held(life.id)
        ]

    @staticmethod
    def _proposing(command: c.Command) -> Callable[[RunningNode], Awaitable[Any]]:
        return lambda face: face.propose((command,), 1500)

    def _is_held(self, task_id: TaskId) -> bool:
        for process in self.world.processes.values():
            if process.alive and process.service is not None:
                return bool(process.service.ledger.describe(task_id).held_by)
        return False
