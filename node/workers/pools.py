"""The worker pools of a node, on its event loop.

Work waits here, in one queue a lane, and is written to a worker's journal and pipe only when that worker can
start it soon: what waits in a pipe behind a slow task is lost time, and what waits here was surely never started.
A worker is never trusted: what it reports is checked, and when it dies its marks in the journal speak for it.

A record is freed only by ``release``, after the settle was confirmed. Tasks in doubt are first copied to a
journal of their own (crew.py: doubts): their settle says "suspect", and a suspect needs its evidence after it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from dedup.ids import Ids
from node.workers.crew import Crew
from node.workers.events import (
    HandlerStats,
    PoolEvent,
    PoolSettings,
    PoolStats,
    WorkerStartError,
    WorkerStats,
)
from node.workers.frames import WORK_BYTES_MAX, WORK_COUNT_MAX, Job, Reported
from node.workers.port import Ended, HandlerInfo, Mode, Part, Report, Work
from node.workers.slot import Handed, Slot
from node.workers.worker import Spec

PREFETCH_US = 20_000  # how much work may lie in a CPU worker's pipe
PREFETCH_WORKS = 16
GUESS_US = 1_000  # a task of a handler that never ran here
VALIDATE_TRIES = 3
STOPPED = "the node stopped"
LEASE_OVER = "the node's lease ran out"
_FAULTS = frozenset({Ended.RAISED, Ended.INVALID, Ended.CRASHED, Ended.TIMED_OUT})


class Lane:
    """Work that waits for one kind of worker."""

    __slots__ = ("kind", "needs_lease", "tasks", "works")

    def __init__(self, kind: str, needs_lease: bool) -> None:
        self.kind = kind
        self.needs_lease = needs_lease
        self.works: deque[tuple[Work, HandlerInfo]] = deque()
        self.tasks = 0

    def put(self, work: Work, info: HandlerInfo) -> None:
        self.works.append((work, info))
        self.tasks += len(work.bodies)

    def pop(self) -> Work:
        work, _ = self.works.popleft()
        self.tasks -= len(work.bodies)
        return work


class WorkerPools:
    """``on_reports`` gets every position of every submitted Work exactly once, never from within ``submit``."""

    def __init__(
        self,
        app_ref: str,
        app_dir: str,
        settings: PoolSettings,
        work_dir: Path,
        incarnation: int,
        on_reports: Callable[[list[Report]], None],
        on_event: Callable[[PoolEvent], None],
    ) -> None:
        self.handlers: dict[str, HandlerInfo] = {}
        self._app_ref = app_ref
        self._settings = settings
        self._on_reports = on_reports
        spec = Spec(
            app_ref=app_ref,
            app_dir=app_dir,
            threads=settings.io_threads,
            async_tasks_max=settings.async_tasks_max,
            memory_bytes_max=settings.memory_bytes_max,
        )
        self._crew = Crew(
            spec, settings, work_dir, incarnation, self._take_hello, self._take_reports, self._take_dead, on_event
        )  # fmt: skip
        # Validation takes no effect: a node without a lease may do it.
        self._lanes = {"cpu": Lane("cpu", True), "io": Lane("io", True), "validate": Lane("io", False)}
        self._handed: dict[int, Handed] = {}  # by Work number, until released
        self._stats: dict[str, HandlerStats] = {}
        self._lease_ns = 0
        self._dispatching = False
        self._stopping = False
        self._idle: list[asyncio.Future[None]] = []
        self._own_number = 0  # of validations: negative
        self._answers: dict[int, asyncio.Future[Part]] = {}

    # --- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make the journals, start the workers; returns when the handlers are known. Raises WorkerStartError.

        To be called on the main thread: workers die with the thread that started them.
        """
        try:
            await self._crew.start(self._lease_ns)
        except WorkerStartError:
            await self.stop()
            raise

    async def drain(self, timeout_s: float) -> bool:
        """Wait until all that was submitted is reported; whether that came about in time."""
        if self._is_idle():
            return True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(future)
        done, _ = await asyncio.wait({future}, timeout=timeout_s)
        return bool(done)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Let workers finish what they have, then kill what is left; all of it is reported before this returns."""
        self._stopping = True
        self._return_waiting(STOPPED)
        await self._crew.stop(grace_s)
        await asyncio.sleep(0)  # for what was returned above

    def kill_all(self) -> None:
        """Fence this node off: no task runs after this. What ran is reported as its process is buried."""
        self.set_lease(0)
        self._crew.kill(LEASE_OVER)
        self._return_waiting(LEASE_OVER)

    def set_lease(self, until_ns: int) -> None:
        """Until when (CLOCK_BOOTTIME) tasks may be started, and may run; 0 is never. Renew it in good time."""
        self._lease_ns = until_ns
        self._crew.set_lease(until_ns)
        self._wake()

    # --- work --------------------------------------------------------------------------------------------------

    def submit(self, work: Work) -> None:
        """Queue a Work. ValueError if it is beyond the bounds of a frame or of the journal."""
        count = len(work.bodies)
        size = sum(map(len, work.bodies))
        if count != len(work.ids) or not 1 <= count <= WORK_COUNT_MAX:
            raise ValueError(
                f"{count} bodies for {len(work.ids)} ids: 1 to {WORK_COUNT_MAX} of both must match"
            )
        if size > WORK_BYTES_MAX:
            raise ValueError(f"bodies of {size} bytes exceed work_bytes_max={WORK_BYTES_MAX}: split the work")
        doubts = self._crew.doubts
        if doubts.needs(work.ids, count) > doubts.data_bytes_max:
            raise ValueError("the work does not fit the journal: split it")
        info = self.handlers.get(work.handler)
        if info is None:
            self._return(work, Ended.INVALID, f"handler={work.handler!r} is unknown to {self._app_ref}")
        elif self._stopping:
            self._return(work, Ended.NOT_STARTED, STOPPED)
        else:
            if not work.ttr_ms and info.ttr_ms:
                work = msgspec.structs.replace(work, ttr_ms=info.ttr_ms)
            self._lane(work.mode, info).put(work, info)
            self._wake()

    def release(self, number: int, at: int, count: int) -> None:
        """The settle of these positions was confirmed: their marks may go.

        Positions that ended NOT_STARTED, and checks, are released by themselves; once more does no harm.
        """
        handed = self._handed.get(number)
        if handed is not None and handed.release(at, count):
            handed.journal.free(handed.record)
            del self._handed[number]
            self._wake()  # it may be the journal's room that work waits for

    async def validate(self, handler: str, bodies: Sequence[bytes]) -> tuple[int, str] | None:
        """The first body that does not fit the handler's types, and why; None if all do.

        Raises WorkerStartError if no worker lives long enough to say.
        """
        for _ in range(VALIDATE_TRIES):
            self._own_number -= 1
            answer = self._answers[self._own_number] = asyncio.get_running_loop().create_future()
            ids = Ids(((1, len(bodies)),))
            self.submit(Work(self._own_number, Mode.VALIDATE, handler, ids, 0, 0, 0, tuple(bodies)))
            part = await answer
            if part.ended is Ended.DONE:
                return None
            if part.ended is Ended.INVALID:
                return part.at, part.error
        raise WorkerStartError(f"no worker could validate: {part.error}")

    @property
    def guard_pid(self) -> int:
        """The process that kills the workers when this one cannot."""
        return self._crew.guard_pid

    def slots(self, kind: str, is_async: bool = False) -> int:
        """How many tasks can run at once."""
        return sum(slot.ready for slot in self._crew.slots[kind]) * self._capacity(kind, is_async)

    def free(self, kind: str, is_async: bool = False) -> int:
        """How many more tasks would start at once."""
        taken = self._lanes[kind].tasks + sum(slot.tasks for slot in self._crew.slots[kind])
        return max(0, self.slots(kind, is_async) - taken)

    def stats(self) -> PoolStats:
        workers = tuple(
            WorkerStats(slot.process.pid, slot.kind, slot.ready, slot.tasks, slot.process.rss_bytes())
            for slot in self._crew.all
            if slot.process is not None
        )
        queued = {name: lane.tasks for name, lane in self._lanes.items()}
        return PoolStats(dict(self._stats), workers, queued, self._crew.restarts, self._crew.doubts_dropped)

    # --- dispatch ----------------------------------------------------------------------------------------------

    def _lane(self, mode: Mode, info: HandlerInfo) -> Lane:
        if mode is Mode.VALIDATE:
            return self._lanes["validate"]
        # Checks mostly wait for databases. Without CPU workers their handlers run on threads.
        is_cpu = mode is Mode.RUN and info.kind == "cpu" and self._settings.cpu_workers > 0
        return self._lanes["cpu" if is_cpu else "io"]

    def _wake(self) -> None:
        if not self._dispatching and any(lane.works for lane in self._lanes.values()):
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        has_lease = time.clock_gettime_ns(time.CLOCK_BOOTTIME) < self._lease_ns
        for lane in self._lanes.values():
            if lane.needs_lease and not has_lease:
                continue  # set_lease or kill_all goes on from here
            while lane.works:
                work, info = lane.works[0]
                slot = self._choose(lane, info)
                if slot is None or not self._hand_over(slot, work, info):
                    break  # a report, a hello or a release goes on from here
                lane.pop()
                self._crew.watch()

    def _choose(self, lane: Lane, info: HandlerInfo) -> Slot | None:
        """The least loaded worker that would start this work soon."""
        ready = [slot for slot in self._crew.slots[lane.kind] if slot.ready]
        if not ready:
            return None
        slot = min(ready, key=lambda slot: slot.tasks)
        if slot.tasks == 0 or not lane.needs_lease:
            return slot
        if lane.kind == "io":
            return slot if slot.tasks < self._capacity("io", info.is_async) else None
        if info.length == "long" or len(slot.handed) >= PREFETCH_WORKS:
            return None
        waiting_us = 0.0
        for handed in slot.handed.values():
            if handed.info.length == "long":
                return None
            waiting_us += handed.untold * self._run_us(handed.work.handler)
        return slot if waiting_us < PREFETCH_US else None

    def _hand_over(self, slot: Slot, work: Work, info: HandlerInfo) -> bool:
        count = len(work.bodies)
        record = slot.journal.put(work.mode, work.fence, work.ids, count)
        if record is None or slot.process is None:
            return False
        self._handed[work.number] = slot.handed[work.number] = Handed(work, info, record, slot.journal)
        slot.tasks += count
        slot.process.send(Job(record.entry, record.states_at, work))
        return True

    def _capacity(self, kind: str, is_async: bool) -> int:
        if kind == "cpu":
            return 1
        return self._settings.async_tasks_max if is_async else self._settings.io_threads

    def _run_us(self, handler: str) -> float:
        stats = self._stats.get(handler)
        return stats.run_us if stats is not None and stats.tasks else GUESS_US

    # --- what the crew says ------------------------------------------------------------------------------------

    def _take_hello(self, handlers: dict[str, HandlerInfo]) -> None:
        self.handlers = handlers
        self._wake()

    def _take_reports(self, slot: Slot, message: Reported) -> None:
        told: list[Report] = []
        wrong = ""
        for report in message.reports:
            handed = slot.handed.get(report.number)
            if handed is None:
                wrong = wrong or f"work {report.number} is not its own"
                continue
            taken = self._take(slot, handed, report)
            if len(taken) < len(report.parts):
                wrong = wrong or f"work {report.number}: parts overlap or lie outside of it"
                report = msgspec.structs.replace(report, parts=taken)
            if taken:
                told.append(report)
        self._tell(told)
        if wrong and slot.process is not None:
            # What it said before stands; what it did not say, its marks will.
            slot.process.kill(f"it reported nonsense: {wrong}")

    def _take_dead(self, slot: Slot, words: list[tuple[Handed, Report]]) -> None:
        for handed, report in words:
            self._take(slot, handed, report)
        self._tell([report for _, report in words])

    def _take(self, slot: Slot, handed: Handed, report: Report) -> tuple[Part, ...]:
        """Book a report, from a worker or about a dead one; the parts of it that hold."""
        taken = []
        ran = errors = 0
        for part in report.parts:
            if not handed.take(part):
                break
            taken.append(part)
            slot.tasks -= part.count
            if part.ended in _FAULTS:
                errors += part.count
            if part.ended is not Ended.NOT_STARTED:
                ran += part.count
            if part.ended in (Ended.CRASHED, Ended.TIMED_OUT):
                self._crew.keep_doubt(handed, part)
            if part.ended is Ended.NOT_STARTED or handed.work.mode is not Mode.RUN:
                # Never handed over, as far as anybody may tell: the same as no record.
                self.release(report.number, part.at, part.count)
        if handed.work.mode is Mode.RUN and ran:
            self._stats.setdefault(handed.work.handler, HandlerStats()).add(ran, errors, report.busy_us)
        if handed.untold == 0:
            del slot.handed[report.number]
        return tuple(taken)

    def _tell(self, reports: list[Report]) -> None:
        outside = []
        for report in reports:
            answer = self._answers.get(report.number)
            if answer is None:
                outside.append(report)
                continue
            del self._answers[report.number]
            if not answer.done():
                parts = report.parts
                answer.set_result(next((part for part in parts if part.ended is not Ended.DONE), parts[0]))
        if outside:
            self._on_reports(outside)
        self._wake()
        if self._idle and self._is_idle():
            for future in self._idle:
                if not future.done():
                    future.set_result(None)
            self._idle.clear()

    def _return(self, work: Work, ended: Ended, error: str) -> None:
        """Report a whole Work that no worker has seen, in a turn of its own."""
        now_ms = time.time_ns() // 1_000_000
        report = Report(work.number, (Part(0, len(work.bodies), ended, None, error),), 0, now_ms, 0, 0)
        asyncio.get_running_loop().call_soon(self._tell, [report])

    def _return_waiting(self, why: str) -> None:
        for lane in self._lanes.values():
            while lane.works:
                self._return(lane.pop(), Ended.NOT_STARTED, why)

    def _is_idle(self) -> bool:
        return not any(lane.works for lane in self._lanes.values()) and not any(
            slot.handed for slot in self._crew.all
        )
