"""A whole cluster under virtual time: machines, nodes, workers, log, clients, and what happens to them, by seed.

    report = run_seed(7)        # everything follows from the seed

What runs is the node's own code (chaos/simulation/process.py); what is simulated is below it: the event loop, the
links, the disks, the clocks, the worker processes, the bytes of the task log. See docs/simulation.md.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chaos import history as h
from chaos.checkers import judge
from chaos.checkers.life import TERMINAL, State
from chaos.simulation.aimed_times import ALL_DOWN, FIRING, MOVING
from chaos.simulation.clients import Clients
from chaos.simulation.disk import Loss
from chaos.simulation.faults import Faults
from chaos.simulation.loop import Actor, Clock, ProcessLoop, Scheduler, current
from chaos.simulation.machine import Machine
from chaos.simulation.network import Network
from chaos.simulation.planners import Planner, watch_schedules
from chaos.simulation.postponing import FAR_MS, Postponer
from chaos.simulation.process import Process, build_parts
from chaos.simulation.seams import kept_from, seams
from chaos.simulation.timetables import SCHEDULES
from chaos.simulation.watchdog import Hung, watching
from chaos.simulation.witness import Violation, Witness
from chaos.simulation.workload import CODED, HANDLERS, with_schedule
from dedup.ids import TaskId, id_text
from node.service import Service
from node.workers.events import WorkerStartError
from node.workers.port import Ended, HandlerInfo, Work
from oncekeeper.log.delayed import Delayed
from oncekeeper.log.memory import MemoryLog
from raft.journal import JournalFailed
from raft.ledger_state import LedgerCorrupt

PARTITIONS = 6
EPOCH_MS = 1_700_000_000_000
HEALED_S = 40.0
"""How long after the last fault was healed everything must have ended."""
GONE_S = 3.0
"""How long a node that failed may take to end: to kill its workers, and to leave its session if it can."""
LOOK_S = 0.1
COLLECT_EVERY = 8
SESSIONS = ((2200, 1100, 350), (1300, 300, 300))
"""Of a run: session timeout, fence margin, heartbeat, in ms. The short one lapses while a run still has time."""
LATE_MS = (500, 1500, 30_000)
"""Of a run: how late a firing may be and still not be missed."""
STEPS_MAX = 200_000
"""A run takes some thousands; one that is stuck for its 40 s some ten thousands."""


@dataclass(frozen=True)
class Options:
    nodes: int = 0
    """0: three, and in every fourth seed five."""
    faults: bool = True
    only_faults: tuple[int, ...] | None = None
    """Of the faults that the seed draws, only these, by number: to find out which ones it takes."""
    fault: str = ""
    """Instead of what the seed draws, one fault of this kind."""


@dataclass
class Report:
    seed: int
    nodes: int
    violations: list[Violation]
    digest: str
    virtual_s: float
    steps: int
    tasks: int
    effects: int
    faults: list[str]
    reached: set[str] = field(default_factory=set)
    events: list[tuple[int, str, str, TaskId | None, str]] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return bool(self.violations)


class Cluster:
    def __init__(self, seed: int, options: Options) -> None:
        self.seed = seed
        self.options = options
        self.scheduler = Scheduler(seed)
        self.random = self.scheduler.random
        count = options.nodes or (5 if seed % 4 == 3 else 3)
        self.names = [f"n{number + 1}" for number in range(count)]
        self.handlers: tuple[HandlerInfo, ...] = HANDLERS
        self.log = MemoryLog(PARTITIONS, lambda: EPOCH_MS + int(self.scheduler.now * 1000))
        self.late_ms = self.random.choice(LATE_MS)
        self.witness = Witness(self.scheduler, self.log, self.late_ms)
        self.witness.happened = self.happened
        self.network = Network(self.scheduler, self.names, on_wire=seed % 8 == 1)
        self.driver = Actor(1)
        self.compact_entries = self.random.choice((40, 90, 400))
        self.tail_entries = self.random.choice((5, 20))
        self.log_fails = 0.0
        self.history_full = False
        self.walls_jumped = False
        self.walls_wrong = 0
        """How many faults of wall clocks are on."""
        self.crashy = self.random.choice((0.0, 0.01, 0.05))
        self.session_ms, self.margin_ms, self.heartbeat_ms = self.random.choice(SESSIONS)
        self.long_work = 0
        """How many faults want tasks to take long now."""
        self.favoured: list[str] = []
        """Handlers that clients want more often now."""
        self.reviving = int(self.random.random() < 0.25)
        """Above 0: clients bring back what was given up, again and again."""
        self.pausing = self.moving = 0
        """Above 0: people pause their schedules, or move delayed tasks, more often now."""
        self.humans_away_until = 0.0
        self.watchers: dict[str, list[Callable[..., None]]] = {}
        self.stalls: dict[str, float] = {}
        self.crash_at: dict[str, str] = {}
        self.kill_after_write = ""
        """The next node that does this to the log dies right after it."""
        self.effects: Counter[TaskId] = Counter()
        self.machines: dict[str, Machine] = {}
        for number, name in enumerate(self.names, 1):
            rate = 1.0 + self.random.choice((0.0, 1e-4, -1e-4, 5e-3, -5e-3)) * self.random.random()
            self.machines[name] = Machine(self, name, number, Clock(self.scheduler, rate, EPOCH_MS))
        self.processes: dict[str, Process] = self.witness.processes
        self.graveyard: list[Process] = []
        self.lives = 0
        self.stay_down: set[str] = set()
        """Whom the supervisor does not start again for now."""
        self.done = False
        self.clients = Clients(self)
        self._settle_people()
        self.faults = Faults(self)

    # --- processes ----------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        old = self.processes.get(name)
        if old is not None and old.alive:
            return
        self.lives += 1
        process = self.processes[name] = Process(self, self.machines[name], self.lives)
        self.witness.note(name, "BOOT", None, f"life {self.lives}")
        process.start()

    def make_service(self, process: Process) -> Service:
        service = Service(build_parts(process))
        watch_schedules(process, service.schedules)
        return service

    def _settle_people(self) -> None:
        """Some runs have schedules, of the code's or by hand, and some have delayed tasks that are moved."""
        draw = self.random
        names = draw.choice(((), (), ("a",), ("a", "b"))) if draw.random() < 0.6 else ()
        if draw.random() < 0.12:
            self.deploy()
            names = (*names, CODED)
        if self.options.fault in (FIRING, ALL_DOWN):
            names = ("a", "b")
        self.clients.planners = [Planner(self, name) for name in names]
        self.clients.postponers = (
            [Postponer(self)] if draw.random() < 0.3 or self.options.fault == MOVING else []
        )

    def deploy(self) -> None:
        """Another version of the code, with another schedule in it: for nodes that start from now on."""
        self.handlers = with_schedule(self.random)

    def wall_peak_ms(self) -> int:
        """The latest that any wall clock ever showed."""
        return max(machine.clock.wall_peak_ms() for machine in self.machines.values())

    def process_ended(self, process: Process, power: bool) -> None:
        self.graveyard.append(process)
        if not power:
            process.machine.process_died()
        self.restart_later(process.name)

    def restart_later(self, name: str) -> None:
        if name not in self.stay_down:
            delay = 0.05 + 0.4 * self.random.random()
            self.scheduler.after(delay, self.driver, self._supervise, name)

    def _supervise(self, name: str) -> None:
        if name not in self.stay_down:
            self.start(name)

    def power_off(self, name: str, loss: Loss = Loss.RANDOM) -> None:
        process = self.processes.get(name)
        self.witness.note(name, "POWER", None, f"lost; of what was unsynced: {loss.value}")
        if process is not None and process.alive:
            process.die(power=True)
        self.machines[name].power_lost(loss)

    def replica_failed(self, process: Process, error: BaseException) -> None:
        """A disk that fails stops a replica; nothing else may."""
        self.witness.note(process.name, "FATAL", None, f"{type(error).__name__}: {error}")
        self.happened("replica failed", process)
        if not isinstance(error, JournalFailed | OSError):
            self.witness.violated(
                11, f"the replica of {process.name} stopped: {type(error).__name__}: {error}"
            )

    def node_failed(self, process: Process, error: BaseException) -> None:
        """A disk that fails stops a node, and soon; a defect of its own is a finding."""
        self.scheduler.after(GONE_S, self.driver, self._must_be_gone, process)
        if not isinstance(error, JournalFailed | OSError | WorkerStartError):
            text = f"{process.name} stops: {type(error).__name__}: {error}{_where(error)}"
            self.witness.violated(13, text)

    def _must_be_gone(self, process: Process) -> None:
        held_until = max(process.loop.held_until, process.machine.workers_hang_until)
        if process.alive and held_until < self.scheduler.now - GONE_S:
            self.witness.violated(13, f"{process.name} lingers for {GONE_S} s after it had failed")

    def process_failed(self, process: Process, error: BaseException) -> None:
        self.witness.note(process.name, "EXIT", None, f"{type(error).__name__}: {error}")
        if not isinstance(error, JournalFailed | OSError):
            self.witness.violated(13, f"{process.name} does not start: {type(error).__name__}: {error}")

    def callback_raised(self, loop: ProcessLoop, error: BaseException) -> None:
        text = f"a callback of {loop.name} raised {type(error).__name__}: {error}{_where(error)}"
        self.witness.violated(13, text)

    # --- what faults are aimed by -------------------------------------------------------------------------------

    def watch(self, kind: str, act: Callable[..., None]) -> Callable[[], None]:
        """Calls ``act`` at every event of the kind, until the answer is called."""
        self.watchers.setdefault(kind, []).append(act)

        def end() -> None:
            if act in self.watchers[kind]:
                self.watchers[kind].remove(act)

        return end

    def happened(self, kind: str, *args: Any) -> None:
        watchers = self.watchers.get(kind)
        if watchers:
            for act in list(watchers):
                act(*args)

    # --- what workers do to the world ---------------------------------------------------------------------------

    def started(self, machine: Machine, work: Work, task_id: TaskId) -> None:
        self.witness.started(machine, work, task_id, self.witness.promises.earliest_ms(task_id))
        self.happened("start", machine, work)

    def effect(self, machine: Machine, work: Work, task_id: TaskId, pid: int) -> None:
        self.effects[task_id] += 1
        self.witness.effect(machine, work, task_id, pid)
        self.happened("effect", machine, work)

    def check(self, work: Work, task_id: TaskId) -> Ended:
        """A sound check: it looks at the effects themselves, and sometimes cannot."""
        if self.random.random() < 0.05:
            return Ended.UNSURE
        return Ended.TRUE if self.effects[task_id] else Ended.FALSE

    # --- the task log -------------------------------------------------------------------------------------------

    def append(self, batches: Any) -> Any:
        return self.seen_appended(lambda: self.log.append(batches))

    def seen_appended(self, act: Callable[[], Any]) -> Any:
        before = {number: len(rows) for number, rows in enumerate(self.log._rows)}
        appended = act()
        for number, rows in enumerate(self.log._rows):
            for base, count, _, _ in rows[before[number] :]:
                (item,) = self.log.read(number, base, count, 1 << 30)[:1]
                batch = getattr(item, "batch", None)
                if batch is not None:
                    self.witness.timetables.appended(batch)
                    self.witness.placed(number, base, batch.part(0, count).ids)
        return appended

    def wake(self, partitions: frozenset[int]) -> None:
        for process in list(self.processes.values()):
            on_wake = process.on_wake
            if process.alive and on_wake is not None and self.random.random() < 0.95:
                self.scheduler.after(0.0001, process.loop, process.loop.enter, on_wake, partitions)

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        for name in self.names:
            self.start(name)
        self.clients.start()
        self.faults.start()
        self._look(0.0)
        try:
            with watching(lambda: self.scheduler.steps):
                self.scheduler.run(self.faults.healed_s + HEALED_S + 1.0)
        except Hung as error:
            self.witness.violated(13, f"something spins: {error}")
        except Exception as error:  # noqa: BLE001  # a bug that was planted may show itself anywhere
            self.witness.violated(13, f"a step raised {type(error).__name__}: {error}{_where(error)}")
        if not self.witness.violations:
            self._judge()
        events = repr([event[:3] for event in self.witness.events])
        self.close()
        return Report(
            seed=self.seed,
            nodes=len(self.names),
            violations=self.witness.violations,
            digest=f"{self.scheduler.trace:016x}-{_crc(events):08x}",
            virtual_s=self.scheduler.now,
            steps=self.scheduler.steps,
            tasks=len(self.witness.history.submitted),
            effects=sum(self.effects.values()),
            faults=self.faults.names,
            reached=self.witness.reached,
            events=self.witness.events,
        )

    def _look(self, _: float) -> None:
        """Whether all has ended; the run ends then, or with the bound."""
        now = self.scheduler.now
        if self.scheduler.steps > STEPS_MAX:
            self.witness.violated(13, f"{self.scheduler.steps:,} steps in {now:.1f} s: something spins")
            return
        if now > self.faults.healed_s and self.clients.quiet:
            open_ids = self._open()
            if not open_ids and not self.witness.timetables.owed and self._caught_up():
                self.done = True
                self.scheduler.clear()
                return
            if now > self.faults.healed_s + HEALED_S:
                self._stuck(open_ids)
                return
        elif now > self.faults.healed_s + HEALED_S:
            text = f"{HEALED_S:.0f} s after healing {self.clients.busy} clients still wait for an answer"
            self.witness.violated(13, text)
            return
        self.scheduler.after(LOOK_S, self.driver, self._look, now)

    def _open(self) -> list[TaskId]:
        lives = self.witness.lives
        return [
            submitted.id
            for submitted in self.witness.history.submitted.values()
            if submitted.acknowledged
            and ((life := lives.get(submitted.id)) is None or life.state not in TERMINAL)
        ]

    def _caught_up(self) -> bool:
        services = [each.service for each in self.processes.values()]
        if not all(each.alive for each in self.processes.values()) or not all(services):
            return False
        if self.log.committed() != self.log.ends() or self._kept():
            return False
        return len({service.ledger.applied_index for service in services if service is not None}) == 1

    def _kept(self) -> list[Delayed]:
        """What waits in the store. A row may outlive its task: it was cancelled, or moved to now, while it was put
        there once more. It is dropped when it is due, and where that is long after the run nobody waits for it."""
        rows, until_ms = [], self.clients.loop.clock.wall_ms() + FAR_MS // 8
        for row in self.log.delays.due(range(PARTITIONS), 1 << 50, None, 1000):
            ids = [task_id for _, item in self.log.delays.fetch([row]) for task_id in item.batch.ids]  # type: ignore[union-attr]
            lives = [self.witness.lives.get(each) for each in ids]
            if row.due_ms > until_ms and all(life is not None and life.state in TERMINAL for life in lives):
                self.witness.reached.add("a row outlives its task")
            else:
                rows.append(row)
        return rows

    def _stuck(self, open_ids: list[TaskId]) -> None:
        lives = self.witness.lives
        if open_ids:
            states = [
                f"{id_text(each)} {lives[each].state.value if each in lives else 'new'}" for each in open_ids
            ]
            text = f"{HEALED_S:.0f} s after healing {len(open_ids)} tasks are open: {', '.join(states[:8])}"
            self.witness.violated(13, text, *open_ids[:8])
            return
        if owed := sorted(self.witness.timetables.owed):
            text = f"{HEALED_S:.0f} s after healing firings that were decided are not in the log: {owed[:8]}"
            self.witness.violated(SCHEDULES, text)
            return
        ledgers = {
            name: each.service.ledger.applied_index if each.service is not None else None
            for name, each in self.processes.items()
        }
        behind = {
            number: (position, end)
            for (number, position), end in zip(
                self.log.committed().items(), self.log.ends().values(), strict=True
            )
            if position != end
        }
        self.witness.violated(
            13,
            f"{HEALED_S:.0f} s after healing: applied {ledgers}; positions short of their ends: {behind}; "
            f"delayed: {self._kept()}",
        )

    def _judge(self) -> None:
        witness = self.witness
        for name, process in self.processes.items():
            assert process.service is not None
            ledger = process.service.ledger
            if ledger.applied_index < witness.highest:
                text = (
                    f"{name} applied up to {ledger.applied_index}, and {witness.highest} was applied before"
                )
                witness.violated(11, text)
                return
            witness.digest(name, ledger.applied_index, ledger)
            try:
                ledger.check_invariants()
            except LedgerCorrupt as error:
                witness.violated(10, f"the ledger of {name} contradicts itself: {error}")
                return
            witness.timetables.compare(name, ledger.schedules, ledger.firings)
            counts = ledger.counts()
            witness.history.counted = h.Counted(
                counts.executed, counts.dead, counts.cancelled, counts.suspect
            )
        aside = {task.id for kind in ("dead", "suspect") for _, task in self.log.aside(kind, 0, 10**6)}
        witness.history.aside = aside
        for found in judge(witness.history):
            for sentence in found.wrong:
                ids = tuple(each for each in witness.history.submitted if id_text(each) in sentence)
                witness.violated(found.invariant.number, sentence, *ids)
        for task_id, life in witness.lives.items():
            count = self.effects[task_id]
            unseen = life.state is State.EXECUTED and count == 0 and life.by != "policy:skip"
            if unseen and task_id in witness.history.submitted:
                witness.violated(2, f"{id_text(task_id)} is executed, and never took effect", task_id)

    def close(self) -> None:
        for process in [*self.graveyard, *self.processes.values()]:
            process.loop.close_all()
        self.clients.loop.close_all()


def _where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return f" at {last[0].filename.rsplit('/', 1)[-1]}:{last[0].lineno}" if last else ""


def _crc(text: str) -> int:
    return zlib.crc32(text.encode())


def run_seed(seed: int, options: Options | None = None, plant: Callable[[], Any] | None = None) -> Report:
    """One run. ``plant``: a context manager that puts a bug into the code for the time of the run."""
    collecting = gc.isenabled()
    gc.disable()  # when memory is collected must not depend on what ran before
    try:
        planted = plant() if plant is not None else contextlib.nullcontext()
        with seams(), kept_from(seed), planted:
            return Cluster(seed, options or Options()).run()
    finally:
        current.end()
        if collecting:
            gc.enable()
        if seed % COLLECT_EVERY == 0:
            gc.collect()  # a cluster is one large knot, which nothing else would untie in time
