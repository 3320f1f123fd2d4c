"""Whole clusters of coordinators in one thread: one ledger, one log, workers that run when they are told to.

Everything but the coordinator and the ledger is a few lines here: the journal of a node's workers is a dict, an
effect is a counter. A seeded schedule decides what happens next: a step of a worker, an answer of the ledger, the
death of a node, time. After it, the books must balance.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass, field

from dedup.ids import Ids, TaskId, ids_of
from node import messages as m
from node.coordinator import Coordinator
from node.deferring import answer_of_store
from node.views import CoordinatorSettings
from node.workers.port import Ended, HandlerInfo, Mode, Part, Report, Work
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.memory import MemoryLog
from raft.commands import (
    Advance,
    Allocated,
    AllocateIds,
    Answer,
    Command,
    Fact,
    Heartbeat,
    Join,
    Joined,
    Proposal,
    SessionClosed,
    SessionOpened,
    Testify,
    Testimony,
)
from raft.ledger import Ledger

PARTITIONS = 4
TIMEOUT_MS = 3_000


def handler(name: str, on_doubt: str = "check", retries: int = 3) -> HandlerInfo:
    return HandlerInfo(name, "cpu", "short", False, 10_000, retries, 50, 500, on_doubt, "default")


@dataclass
class World:
    """What all nodes share, and what stands outside of the system."""

    seed: int
    handlers: dict[str, HandlerInfo]
    log: MemoryLog = field(default_factory=lambda: MemoryLog(PARTITIONS))
    ledger: Ledger = field(default_factory=lambda: Ledger(1))
    effects: Counter[TaskId] = field(default_factory=Counter)
    starts: Counter[TaskId] = field(default_factory=Counter)
    now_ms: int = 1_000
    wall_ahead_ms: int = 0
    started: list[tuple[TaskId, int]] = field(default_factory=list)  # each start, by the wall clock
    index: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._sequence = itertools.count(1)
        self.nodes: dict[str, FakeNode] = {}

    def propose(self, commands: tuple[Command, ...]) -> tuple[Answer, ...]:
        self.index += 1
        effects = self.ledger.apply_proposal(self.index, Proposal(1, next(self._sequence), commands))
        if any(isinstance(event, SessionOpened | SessionClosed) for event in effects.events):
            for node in list(self.nodes.values()):
                node.assign()
        return effects.answers

    @property
    def wall_ms(self) -> int:
        return self.now_ms + self.wall_ahead_ms

    def submit(
        self,
        name: str,
        count: int,
        queue: str = "default",
        due_ms: int = 0,
        then: str = "",
        submitted_ms: int = 0,
    ) -> Ids:
        (answer,) = self.propose((AllocateIds(count),))
        assert isinstance(answer, Allocated)
        ids = Ids(((answer.start, count),))
        batch = TaskBatch(
            queue=queue,
            handler=name,
            ids=ids,
            bodies=(b"{}",) * count,
            due_ms=due_ms,
            then=then,
            submitted_ms=submitted_ms,
        )
        self.log.append([batch])
        return ids

    def submit_keys(self, name: str, keys: list[bytes]) -> Ids:
        ids = Ids((), tuple(keys))
        self.log.append([TaskBatch(queue="default", handler=name, ids=ids, bodies=(b"{}",) * len(keys))])
        return ids

    def start(self, name: str) -> FakeNode:
        incarnation = self.nodes[name].incarnation + 1 if name in self.nodes else 1
        facts = self.nodes[name].marks if name in self.nodes else {}
        node = self.nodes[name] = FakeNode(self, name, incarnation)
        node.marks = facts  # journals are kept until nothing asks for them
        node.join()
        node.testify(facts)
        return node

    def pass_time(self, ms: int) -> None:
        """Ledger time and node time go on together; live nodes beat."""
        self.now_ms += ms
        self.propose((Advance("t", ms),))
        for node in self.nodes.values():
            if node.alive:
                self.propose((Heartbeat(node.session),))
                node.feed(m.Tick())

    def unsettled(self) -> int:
        committed = self.log.committed()
        passed = sum(end - committed.get(number, 0) for number, end in self.log.ends().items())
        return passed + sum(self.log.delays.counts().values())


class FakeNode:
    """One coordinator with workers that do one step at a time."""

    def __init__(self, world: World, name: str, incarnation: int) -> None:
        self.world = world
        self.name = name
        self.incarnation = incarnation
        self.alive = True
        self.session = 0
        self.coordinator = Coordinator(
            world.ledger,
            CoordinatorSettings(node=name, testimony_wait_ms=500, work_tasks_max=8, delays=True),
        )
        self.asked: deque[m.Propose] = deque()
        self.works: deque[tuple[Work, int]] = deque()
        self.marks: dict[tuple[int, TaskId], Fact] = {}
        self._events: deque[m.Event] = deque()
        self._feeding = False
        self.attempts: list[object] = []

    def join(self) -> None:
        (answer,) = self.world.propose((Join(self.name, self.incarnation, TIMEOUT_MS),))
        assert isinstance(answer, Joined)
        self.session = answer.session
        self.feed(m.HandlersKnown(self.world.handlers, {"cpu": 2}))
        self.feed(m.SessionOpened(self.session))
        self.assign()

    def testify(self, marks: dict[tuple[int, TaskId], Fact]) -> None:
        """As a restarted node does: marks of the former life, and "never started" for claims without one."""
        for run in self.world.ledger.suspects_of(self.name):
            for task_id in run.ids:
                fact = marks.get((run.suspect.fence, task_id), Fact.NEVER_STARTED)
                testimony = Testimony(run.suspect.fence, ids_of([task_id]), fact)
                self.world.propose((Testify(self.name, self.incarnation, (testimony,)),))

    def assign(self) -> None:
        if not self.alive or not self.session:
            return
        names = sorted({s.node for s in self.world.ledger.sessions.values()})
        committed = self.world.log.committed()
        mine = [p for p in range(PARTITIONS) if names and names[p % len(names)] == self.name]
        self.feed(m.Assigned({number: committed.get(number, 0) for number in mine}))

    def feed(self, event: m.Event) -> None:
        self._events.append(event)
        if self._feeding or not self.alive:
            return
        self._feeding = True
        while self._events:
            for effect in self.coordinator.on(self._events.popleft(), self.world.now_ms, self.world.wall_ms):
                self.perform(effect)
        self._feeding = False

    def perform(self, effect: m.Effect) -> None:
        match effect:
            case m.Propose():
                self.asked.append(effect)
            case m.Dispatch(work):
                self.works.append((work, 0))
            case m.Read(partition, epoch, offset, tasks_max):
                items = self.world.log.read(partition, offset, tasks_max, 1 << 20)
                end = offset
                for item in items:
                    end = item.end
                self._events.append(m.WasRead(partition, epoch, tuple(items), end, not items))
            case m.StoreAside(ticket, tasks):
                self.world.log.put_aside(tasks)
                self._events.append(m.AsideStored(ticket))
            case m.Confirm(ticket):
                self._events.append(m.Confirmed(ticket))
            case m.Remember(attempts):
                self.attempts.extend(attempts)
            case m.Defer() | m.MoveDelayed() | m.EnqueueDue() | m.LoadDue() | m.FetchDue() | m.LookUp():
                self._events.append(answer_of_store(self.world.log.delays, effect))
            case m.Release():
                pass

    def answer_one(self) -> None:
        """The ledger answers the oldest proposal."""
        effect = self.asked.popleft()
        self.feed(m.Answers(effect.ticket, self.world.propose(effect.commands)))

    def commit(self) -> None:
        self.world.log.commit(self.coordinator.commit_positions())
        self.world.log.delays.drop(self.coordinator.delayed_drops())

    def work_one(self, die_before_report: bool = False) -> None:
        """A worker runs one task of the oldest Work: mark, effect, mark, report."""
        work, at = self.works.popleft()
        task_id = list(work.ids)[at]
        if work.mode is Mode.CHECK:
            ended = Ended.TRUE if self.world.effects[task_id] else Ended.FALSE
        else:
            self.marks[work.fence, task_id] = Fact.STARTED
            self.world.starts[task_id] += 1
            self.world.started.append((task_id, self.world.wall_ms))
            ended = self._run(work, task_id)
        if die_before_report:
            return
        if at + 1 < len(work.bodies):
            self.works.appendleft((work, at + 1))
        now = self.world.now_ms
        self.feed(m.Reported((Report(work.number, (Part(at, 1, ended),), now, now, 100, 1),)))

    def _run(self, work: Work, task_id: TaskId) -> Ended:
        draw = self.world.random.random()
        if work.handler.endswith("flaky") and draw < 0.3:
            self.marks[work.fence, task_id] = Fact.FAILED
            return Ended.RAISED
        if draw < 0.02:
            return Ended.CRASHED  # before its effect
        self.world.effects[task_id] += 1
        if draw < 0.04:
            return Ended.CRASHED  # after it
        self.marks[work.fence, task_id] = Fact.FINISHED
        return Ended.DONE

    def kill(self) -> None:
        self.alive = False


def run_schedule(world: World, steps: int, kills: float) -> None:
    """A seeded schedule of everything that can happen."""
    rnd = world.random
    for _ in range(steps):
        node = rnd.choice(list(world.nodes.values()))
        draw = rnd.random()
        if not node.alive:
            if draw < 0.05:
                world.start(node.name)
            elif draw < 0.5:
                world.pass_time(rnd.randrange(1, 200))
        elif draw < kills:
            if node.works and draw < kills / 2:
                node.work_one(die_before_report=True)
            node.kill()
        elif draw < 0.45 and node.works:
            node.work_one()
        elif draw < 0.85 and node.asked:
            node.answer_one()
        elif draw < 0.9:
            node.commit()
        elif draw > 0.97:
            world.pass_time(rnd.randrange(1, 100))


def settle_all(world: World, rounds: int = 5_000) -> None:
    """No more faults: everybody is started, and runs until nothing is unsettled."""
    for name, node in list(world.nodes.items()):
        if not node.alive:
            world.start(name)
    for _ in range(rounds):
        for node in list(world.nodes.values()):
            while node.asked:
                node.answer_one()
            while node.works:
                node.work_one()
            node.commit()
        if world.unsettled() == 0:
            return
        world.pass_time(100)
    raise AssertionError(f"{world.unsettled()} tasks are still unsettled: {world.ledger.counts()}")
