"""Worker processes, simulated: what they do to the world, and what their work journal says of it.

The pools, the crew, the slots and the work journal of a node (node/workers/) are the real ones. Simulated are the
processes in the slots: each runs tasks as a row of steps in virtual time, and may die between any two of them:

    lease? -> start mark -> … -> effect, at the sink -> … -> finish mark -> … -> report

A journal's bytes live in the machine's memory (``MemoryJournal``): they outlive the process, not the machine. The
guard is a timer on the lease. A worker whose node died lives on for some milliseconds, as in reality.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chaos.simulation import workload
from chaos.simulation.loop import Actor, ProcessLoop, current
from chaos.simulation.machine import LifeRecord, Machine
from node.workers import journal as layout
from node.workers.crew import DOUBTS, Crew
from node.workers.frames import Down, Hello, Job, Reported, Stop
from node.workers.journal import Journal, State
from node.workers.port import Ended, Mode, Part, Report
from node.workers.slot import Slot
from node.workers.testimony import Evidence, Manifest, Unsound, weigh

JOURNAL_BYTES = layout.DATA_AT + 16 * 1024
THREADS = 4
ORPHAN_S = 0.008


def machine_here() -> Machine:
    """Whose code is running, on its loop or in a thread."""
    machine: Machine = current.loop.machine
    return machine


class MachineTime:
    """Stands in for the module ``time`` in node/workers: the clocks of the machine whose code is running."""

    CLOCK_BOOTTIME = 7

    @staticmethod
    def clock_gettime_ns(_: int) -> int:
        return int(machine_here().clock.time() * 1e9)

    @staticmethod
    def time_ns() -> int:
        return machine_here().clock.wall_ms() * 1_000_000

    @staticmethod
    def monotonic() -> float:
        return machine_here().clock.time()

    @staticmethod
    def time() -> float:
        return machine_here().clock.wall_ms() / 1000


class MemoryJournal(Journal):
    """The real layout and logic over plain memory."""

    def __init__(self, path: Path, incarnation: int, boot_id: str) -> None:
        size = JOURNAL_BYTES
        self.path = path
        self.data = bytearray(size)
        self._view = memoryview(self.data)
        self._words = self._view.cast("Q")
        self._entries = list(range(layout.ENTRY_COUNT - 1, -1, -1))
        self._space = layout.Space(layout.DATA_AT, size - size % layout.GRANULE)
        self.cells = self._words[layout.CELLS_AT // 8 : layout.CELLS_AT // 8 + 2 * layout.CELL_COUNT]
        self.data_bytes_max = size - size % layout.GRANULE - layout.DATA_AT
        header = layout.pack_header(size, incarnation, boot_id)
        self._view[: len(header)] = header
        self.holder: SimulatedWorker | None = None
        """Who has the lock on it."""

    @property
    def lease_ns(self) -> int:
        return int(self._words[layout.LEASE_AT // 8])

    def states(self, at: int, count: int) -> memoryview:
        return self._view[at : at + count]


class SimulatedCrew(Crew):
    """The real crew; its journals are in the machine's memory."""

    def _make_journals(self) -> None:
        machine = machine_here()
        names = [DOUBTS]
        life = machine.lives[self._incarnation] = LifeRecord()
        self.doubts = self._memory(life, DOUBTS)
        for kind, count in (("io", self._settings.io_workers), ("cpu", self._settings.cpu_workers)):
            for index in range(count):
                name = f"{kind}{index}.journal"
                names.append(name)
                self.slots[kind].append(Slot(kind, self._memory(life, name)))
        life.manifest = Manifest(1, self._incarnation, machine.boot_id, tuple(names))

    def _memory(self, life: LifeRecord, name: str) -> MemoryJournal:
        machine = machine_here()
        path = Path(f"/sim/{machine.name}/{self._incarnation}/{name}")
        journal = MemoryJournal(path, self._incarnation, machine.boot_id)
        life.journals[name] = machine.journals[str(path)] = journal
        return journal


class SimulatedGuard:
    """node/workers/guard_link.py, and the guard behind it."""

    def __init__(self, path: Path, on_restart: Callable[[int], None]) -> None:
        self.pid = 1
        self._machine = machine_here()
        self._lease_ns = self._killed_for = 0
        self._workers: list[int] = []
        self._armed = False

    def start(self) -> None:
        self._machine.guards.append(self)

    def set_lease(self, until_ns: int) -> None:
        self._lease_ns = until_ns
        self._arm()

    def _arm(self) -> None:
        if self._armed or not self._lease_ns or self._lease_ns == self._killed_for:
            return
        self._armed = True
        machine = self._machine
        left_s = self._lease_ns / 1e9 - machine.clock.time()
        late_s = 0.002 * machine.scheduler.random.random()
        machine.scheduler.after(max(0.0, left_s / machine.clock.rate) + late_s, machine.kernel, self._look)

    def _look(self) -> None:
        self._armed = False
        if self._lease_ns and self._lease_ns != self._killed_for:
            if self._machine.clock.time() * 1e9 >= self._lease_ns:
                self._killed_for = self._lease_ns
                self.kill()
            self._arm()

    def kill(self) -> None:
        for pid in list(self._workers):
            worker = self._machine.workers.get(pid)
            if worker is not None:
                worker.die(-9)

    def add(self, group: int) -> None:
        self._workers.append(group)

    def remove(self, group: int) -> None:
        if group in self._workers:
            self._workers.remove(group)

    def stop(self) -> None:
        self._workers.clear()


class SimulatedWorker(Actor):
    """The process itself: threads that take tasks from a queue, one step after the other."""

    def __init__(self, machine: Machine, pid: int, kind: str, journal: MemoryJournal) -> None:
        super().__init__(pid)
        self.machine = machine
        self.pid = pid
        self.kind = kind
        self.journal = journal
        self.process: WorkerProcess | None = None
        self.tasks: deque[tuple[Job, int]] = deque()
        self.leaving = False
        self._idle = list(range(1 if kind == "cpu" else THREADS))
        self._running = 0

    # --- life ---------------------------------------------------------------------------------------------------

    def after(self, delay_s: float, act: Callable[..., None], *args: Any) -> None:
        self.machine.scheduler.after(delay_s, self, act, *args)

    def begin(self) -> None:
        """It waits for the lock on its journal: until the slot's former process is gone."""
        holder = self.journal.holder
        if holder is not None and not holder.dead:
            self.after(0.002, self.begin)
            return
        self.journal.holder = self
        self.after(0.005 + 0.01 * self.machine.random.random(), self._hello)

    def _hello(self) -> None:
        self._say(Hello(self.pid, self.machine.world.handlers))

    def die(self, status: int) -> None:
        """A signal does not end who sleeps in the kernel, uninterruptibly; but no code of it runs any more."""
        machine, now = self.machine, self.machine.scheduler.now
        if status == -9 and machine.workers_hang_until > now:
            if self.held_until <= now:
                self.hold(now, machine.workers_hang_until)
                machine.scheduler.at(machine.workers_hang_until - 1e-9, machine.kernel, self.end, status)
            return
        self.end(status)

    def end(self, status: int) -> None:
        if self.dead:
            return
        self.dead = True
        self.machine.workers.pop(self.pid, None)
        if self.process is not None:
            self.process.ended(status)

    def _say(self, message: Any) -> None:
        if self.process is not None:
            self.process.hear(message)

    # --- work ---------------------------------------------------------------------------------------------------

    def take(self, message: Down) -> None:
        if isinstance(message, Stop):
            self.leaving = True
        else:
            self.tasks.extend((message, position) for position in range(len(message.work.bodies)))
        self._next()

    def _next(self) -> None:
        while self.tasks and self._idle:
            thread = self._idle.pop()
            job, position = self.tasks.popleft()
            self._running += 1
            steps = (
                self._check(job, position)
                if job.work.mode is Mode.CHECK
                else self._run(job, position, thread)
            )
            self._step(steps, thread)
        if self.leaving and not self.tasks and not self._running:
            self.after(0.001, self.die, 0)

    def _step(self, steps: Iterator[float], thread: int) -> None:
        wait_s = next(steps, None)
        if self.dead:
            return
        if wait_s is not None:
            self.after(wait_s, self._step, steps, thread)
            return
        self._running -= 1
        self._idle.append(thread)
        self._next()

    def _report(self, job: Job, position: int, ended: Ended, busy_us: int, error: str = "") -> None:
        now_ms = self.machine.clock.wall_ms()
        part = Part(position, 1, ended, None, error)
        self._say(Reported((Report(job.work.number, (part,), now_ms, now_ms, busy_us, self.pid),)))

    def _may_start(self) -> bool:
        return self.machine.clock.time() * 1e9 < self.journal.lease_ns

    def _run(self, job: Job, position: int, thread: int) -> Iterator[float]:
        world, work = self.machine.world, job.work
        states = self.journal.states(job.states_at, len(work.bodies))
        if not self._may_start():
            self._report(job, position, Ended.NOT_STARTED, 0, "the node's lease ran out")
            return
        task_id = next(iter(work.ids.part(position, 1)))
        plan = workload.plan(world, work)
        cell = 2 * (thread if self.kind == "io" else 0)
        self.journal.cells[cell + 1] = job.entry << 32 | position
        self.journal.cells[cell] = int(self.machine.clock.time() * 1e9)
        states[position] = State.STARTED
        world.started(self.machine, work, task_id)
        if plan.crash == "before":
            self.die(-11)
            return
        yield plan.before_s
        if plan.raises:
            states[position] = State.FAILED
            self.journal.cells[cell] = 0
            yield 0.0002
            self._report(job, position, Ended.RAISED, int(plan.before_s * 1e6) + 1, "ValueError: as planned")
            return
        world.effect(self.machine, work, task_id, self.pid)
        if plan.crash == "after":
            self.die(-11)
            return
        yield plan.after_s
        states[position] = State.FINISHED
        self.journal.cells[cell] = 0
        if plan.crash == "finished":
            self.die(-11)
            return
        yield plan.tell_s
        self._report(job, position, Ended.DONE, int((plan.before_s + plan.after_s) * 1e6) + 1)

    def _check(self, job: Job, position: int) -> Iterator[float]:
        world, work = self.machine.world, job.work
        states = self.journal.states(job.states_at, len(work.bodies))
        if not self._may_start():
            self._report(job, position, Ended.NOT_STARTED, 0, "the node's lease ran out")
            return
        states[position] = State.STARTED
        yield 0.002
        ended = world.check(work, next(iter(work.ids.part(position, 1))))
        states[position] = State.FINISHED
        yield 0.001
        self._report(job, position, ended, 1000)


class WorkerProcess:
    """node/workers/process.py, as the crew uses it."""

    def __init__(
        self,
        on_hello: Callable[[Hello], None],
        on_reports: Callable[[Reported], None],
        on_line: Callable[[str, str], None],
        on_exit: Callable[[int], None],
        on_end: Callable[[int], None],
    ) -> None:
        self.pid = 0
        self.killed_why = ""
        self._on_hello, self._on_reports = on_hello, on_reports
        self._on_exit, self._on_end = on_exit, on_end
        self._machine = machine_here()
        self._loop = asyncio.get_running_loop()
        self._worker: SimulatedWorker | None = None

    def spawn(self, spec: Any) -> None:
        machine = self._machine
        self.pid = machine.next_pid()
        journal = machine.journals[spec.journal]
        worker = self._worker = SimulatedWorker(machine, self.pid, spec.kind, journal)
        worker.process = self
        machine.workers[self.pid] = worker
        worker.after(0.003, worker.begin)

    def _later(self, act: Callable[..., Any], *args: Any) -> None:
        """Through the socket, or by the kernel: to the node's process, when it runs."""
        scheduler, loop = self._machine.scheduler, self._loop
        delay = 0.00005 + 0.0002 * scheduler.random.random()
        assert isinstance(loop, ProcessLoop)
        # In order: the socket is a stream.
        self._at = max(getattr(self, "_at", 0.0), scheduler.now + delay)
        scheduler.at(self._at, loop, loop.enter, act, *args)

    def send(self, message: Down) -> None:
        worker = self._worker
        if worker is not None and not worker.dead:
            worker.after(0.0001, worker.take, message)

    def hear(self, message: Any) -> None:
        self._later(self._on_hello if isinstance(message, Hello) else self._on_reports, message)

    def ended(self, status: int) -> None:
        self._later(self._bury, status)

    def _bury(self, status: int) -> None:
        self._on_exit(self.pid)
        self._on_end(status)

    def kill(self, why: str) -> None:
        self.killed_why = self.killed_why or why
        if self._worker is not None:
            self._worker.die(-9)

    def rss_bytes(self) -> int:
        return 0


class SimulatedEvidence:
    """node/assembly.py: WorkJournals. What is weighed, and how, is node/workers/testimony.py's."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def lives(self) -> tuple[int, ...]:
        return tuple(sorted(self._machine.lives))

    async def read(self, life: int) -> Evidence:
        record = self._machine.lives.get(life)
        if record is None:
            return Evidence(False, (), "the manifest is missing")
        deadline = self._machine.clock.time() + 10.0
        while any(j.holder is not None and not j.holder.dead for j in record.journals.values()):
            if self._machine.clock.time() > deadline:
                break
            await asyncio.sleep(0.01)
        return await asyncio.get_running_loop().run_in_executor(None, self._weigh, record)

    def _weigh(self, record: LifeRecord) -> Evidence:
        if record.manifest is None:
            return Evidence(False, (), "the manifest is missing")

        def read(name: str) -> bytes:
            journal = record.journals.get(name)
            if journal is None:
                raise Unsound("it is missing")
            if journal.holder is not None and not journal.holder.dead:
                raise Unsound("a worker of that incarnation is still running")
            return bytes(journal.data)

        return weigh(record.manifest, self._machine.boot_id, read)

    def forget(self, life: int) -> None:
        self._machine.lives.pop(life, None)
