"""One node of an in-memory cluster: a real coordinator, and workers that run one task when they are told to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, assert_never

from dedup.ids import TaskId, ids_of
from node import messages as m
from node.coordinator import Coordinator
from node.deferring import answer_of_store
from node.ownership import owned_by
from node.testify import testimonies
from node.views import CoordinatorSettings
from node.workers.calls import encode_result, one_line, raised, short_trace
from node.workers.port import Ended, Mode, Part, Report, Work
from node.workers.testimony import Evidence
from oncekeeper.context import CurrentTask
from oncekeeper.errors import AlreadyExecuted
from raft.commands import Fact, Heartbeat, Join, Joined, Testify, Testimony

if TYPE_CHECKING:
    from chaos.testing.cluster import InMemoryCluster

SLOTS = {"cpu": 2, "io": 4}
READ_BYTES_MAX = 1 << 20
FOR_EVER_MS = 1 << 47
_CHECKED = {True: Ended.TRUE, False: Ended.FALSE, None: Ended.UNSURE}

Marks = dict[tuple[int, TaskId], Fact]


class WorkerDied(BaseException):
    """The process that ran the handler is gone: nothing of it reports."""


class NodeDied(WorkerDied):
    """And the node with it."""


class Member:
    """A node from its start to its death; the one that is started again under its name has its journals."""

    def __init__(self, cluster: InMemoryCluster, name: str, incarnation: int, marks: Marks) -> None:
        self._cluster = cluster
        self.name = name
        self.incarnation = incarnation
        self.alive = True
        self.session = 0
        self.coordinator = Coordinator(cluster.ledger, CoordinatorSettings(node=name, delays=True))
        self.marks = marks  # the work journal: how far each claimed task came in a worker
        self._asked: deque[m.Propose] = deque()
        self._works: deque[tuple[Work, int]] = deque()
        self._handed: dict[int, Work] = {}
        self._events: deque[m.Event] = deque()
        self._feeding = False

    def join(self) -> None:
        timeout_ms = self._cluster.session_timeout_ms
        (answer,) = self._cluster.propose((Join(self.name, self.incarnation, timeout_ms),))
        assert isinstance(answer, Joined)
        self.session = answer.session
        self.know_handlers()
        self.feed(m.SessionOpened(self.session))
        self.assign()
        self._testify()

    def know_handlers(self) -> None:
        self.feed(m.HandlersKnown(self._cluster.infos, SLOTS))

    def _testify(self) -> None:
        """As a node does that was started again: say what the journals of its former lives know."""
        facts = tuple(
            Testimony(fence, ids_of([task_id]), fact) for (fence, task_id), fact in self.marks.items()
        )
        suspects = self._cluster.ledger.suspects_of(self.name)
        evidence = {run.suspect.incarnation: Evidence(True, facts) for run in suspects}
        for batch in testimonies(suspects, evidence):
            self._cluster.propose((Testify(self.name, self.incarnation, batch),))

    def assign(self) -> None:
        log, ledger = self._cluster.log, self._cluster.ledger
        nodes = sorted({session.node for session in ledger.sessions.values()})
        owned = owned_by(self.name, log.partitions, nodes) if self.session else frozenset()
        committed = log.committed()
        self.feed(m.Assigned({number: committed[number] for number in owned}))

    def beat(self) -> None:
        self._cluster.propose((Heartbeat(self.session),))

    def tick(self) -> None:
        self.feed(m.Tick())

    def commit(self) -> None:
        if positions := self.coordinator.commit_positions():
            self._cluster.log.commit(positions)
        if drops := self.coordinator.delayed_drops():
            self._cluster.log.delays.drop(drops)

    # --- the coordinator --------------------------------------------------------------------------------------

    def feed(self, event: m.Event) -> None:
        self._events.append(event)
        if self._feeding or not self.alive:
            return
        self._feeding = True
        try:
            while self._events:
                now_ms, wall_ms = self._cluster.now_ms, self._cluster.wall_ms
                for effect in self.coordinator.on(self._events.popleft(), now_ms, wall_ms):
                    self._perform(effect)
        finally:
            self._feeding = False

    def _perform(self, effect: m.Effect) -> None:
        match effect:
            case m.Propose():
                self._asked.append(effect)
            case m.Dispatch(work):
                self._works.append((work, 0))
                self._handed[work.number] = work
            case m.Read():
                self._read(effect)
            case m.StoreAside(ticket, tasks):
                self._cluster.log.put_aside(tasks)
                self._events.append(m.AsideStored(ticket))
            case m.Confirm(ticket):
                self._events.append(m.Confirmed(ticket))
            case m.Remember(attempts):
                self._cluster.attempts.extend(attempts)
            case m.Defer() | m.MoveDelayed() | m.EnqueueDue() | m.LoadDue() | m.FetchDue() | m.LookUp():
                self._events.append(answer_of_store(self._cluster.log.delays, effect))
            case m.Release(number, at, count):
                work = self._handed[number]
                for task_id in work.ids.part(at, count):
                    self.marks.pop((work.fence, task_id), None)
            case _:
                assert_never(effect)

    def _read(self, effect: m.Read) -> None:
        items = self._cluster.log.read(effect.partition, effect.offset, effect.tasks_max, READ_BYTES_MAX)
        end = items[-1].end if items else effect.offset
        self._events.append(m.WasRead(effect.partition, effect.epoch, tuple(items), end, not items))

    # --- what it does when it is its turn ---------------------------------------------------------------------

    def step(self) -> bool:
        """Have one proposal answered, or one task run; False: there is nothing to do now."""
        if self._asked:
            self._hear()
            return True
        if self._works:
            self._work_one()
            return True
        return False

    def hear_all(self) -> None:
        """Have all answered that it has asked the ledger."""
        while self._asked and self.alive:
            self._hear()

    def _hear(self) -> None:
        asked = self._asked.popleft()
        self.feed(m.Answers(asked.ticket, self._cluster.propose(asked.commands)))

    def _work_one(self) -> None:
        work, at = self._works.popleft()
        if at + 1 < len(work.bodies):
            self._works.appendleft((work, at + 1))
        started_ms = self._cluster.wall_ms
        try:
            part = self._run(work, at)
        except NodeDied:
            self._cluster.kill(self.name)
            return
        except WorkerDied:
            part = Part(at, 1, Ended.CRASHED, None, "the worker was killed by the test")
            started_ms = 0
        self.feed(m.Reported((Report(work.number, (part,), started_ms, self._cluster.wall_ms, 1, 0),)))

    def _run(self, work: Work, at: int) -> Part:
        calls = self._cluster.calls[work.handler]
        task_id = next(iter(work.ids.part(at, 1)))
        checking = work.mode is Mode.CHECK
        try:
            arguments = calls.decode(work.bodies[at])
        except Exception as error:  # noqa: BLE001 - decoding calls foreign hooks; the task is invalid
            return Part(at, 1, Ended.UNSURE if checking else Ended.INVALID, None, one_line(error))
        task = CurrentTask(task_id, work.handler, work.fence, work.attempt, calls.info.queue, work.due_ms)
        if checking:
            try:
                return Part(at, 1, _CHECKED[self._cluster.check(task, calls, arguments)])
            except Exception as error:  # noqa: BLE001 - a check that raises cannot tell
                return Part(at, 1, Ended.UNSURE, None, one_line(error), short_trace(error))
        mark = work.fence, task_id
        self.marks[mark] = Fact.STARTED
        self._cluster.starts[task_id] += 1
        try:
            value = self._cluster.call(task, calls, arguments)
        except WorkerDied:
            raise
        except AlreadyExecuted:
            value = None
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a handler must not end its worker
            self.marks[mark] = Fact.FAILED
            return Part(at, 1, raised(error), None, one_line(error), short_trace(error))
        self.marks[mark] = Fact.FINISHED
        text, dropped = encode_result(calls, value)
        return Part(at, 1, Ended.DONE, None if text is None else (text,), dropped)

    @property
    def looks(self) -> Iterator[int]:
        """When it wants to look again at what waits by time."""
        if not self.alive:
            return
        if (at_ms := self.coordinator.next_look_ms()) is not None:
            yield at_ms
        cluster = self._cluster
        later = cluster.log.delays.due(range(cluster.log.partitions), FOR_EVER_MS, None, 1_000)
        soonest = next((row.due_ms for row in later if row.due_ms > cluster.wall_ms), None)
        if soonest is not None:  # beyond what the coordinator has loaded
            yield cluster.now_ms + soonest - cluster.wall_ms
