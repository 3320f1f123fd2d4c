"""The worker pools of a node, on its event loop.

Work waits here, in one queue a kind, and is written to a worker's journal and pipe only when that worker can
start it soon: what waits in a pipe behind a slow task is lost time, and what waits here was surely never started.
A worker is never trusted: what it reports is checked, and when it dies its marks in the journal speak for it.

A record is freed only by ``release``, after the settle was confirmed. Tasks in doubt are first copied to a
journal of their own (doubts): their settle says "suspect", and a suspect needs its evidence after the settle.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from dedup.ids import Ids
from node.workers.events import (
    GuardRestarted,
    HandlerStats,
    PoolEvent,
    PoolSettings,
    PoolStats,
    Printed,
    WorkerEnded,
    WorkerFailed,
    WorkerStarted,
    WorkerStartError,
    WorkerStats,
)
from node.workers.frames import WORK_BYTES_MAX, WORK_COUNT_MAX, Hello, Job, Reported, Stop
from node.workers.guard_link import GuardLink
from node.workers.journal import Journal, State, read_boot_id
from node.workers.port import Ended, HandlerInfo, Mode, Part, Report, Work
from node.workers.process import WorkerProcess
from node.workers.slot import Handed, Slot, describe_end
from node.workers.testimony import write_manifest
from node.workers.worker import Spec

PREFETCH_US = 20_000  # how much work may lie in a CPU worker's pipe
PREFETCH_WORKS = 16
GUESS_US = 1_000  # for a handler that never ran here
SCAN_S_MIN, SCAN_S_MAX = 0.05, 1.0
VALIDATE_TRIES = 3
DOUBTS = "doubts.journal"
_FAULTS = frozenset({Ended.RAISED, Ended.INVALID, Ended.CRASHED, Ended.TIMED_OUT})


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
        self._settings = settings
        self._directory = work_dir / str(incarnation)
        self._incarnation = incarnation
        self._on_reports = on_reports
        self._on_event = on_event
        self._spec = Spec(
            app_ref, app_dir, "", "", -1, 0,
            settings.io_threads, settings.async_tasks_max, settings.memory_bytes_max,
        )  # fmt: skip
        self._queues: dict[str, deque[Work]] = {"cpu": deque(), "io": deque()}
        self._queued = {"cpu": 0, "io": 0}  # tasks
        self._slots: dict[str, list[Slot]] = {"cpu": [], "io": []}
        self._handed: dict[int, Handed] = {}  # by Work number, until released
        self._stats: dict[str, HandlerStats] = {}
        self._restarts = 0
        self._lease_ns = 0
        self._dispatching = False
        self._scan: asyncio.TimerHandle | None = None
        self._memory_seen_s = 0.0
        self._stopping = False
        self._idle: list[asyncio.Future[None]] = []
        self._own_number = 0  # of validations: negative
        self._answers: dict[int, asyncio.Future[Part]] = {}
        self._doubts_dropped = False

    # --- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make the journals, start the workers; returns when the handlers are known. Raises WorkerStartError.

        To be called on the main thread: workers die with the thread that started them.
        """
        self._loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[None] = self._loop.create_future()
        self._make_journals()
        self._guard = GuardLink(
            self._directory / "guard", lambda status: self._on_event(GuardRestarted(status))
        )
        self._guard.start()
        self._guard.set_lease(self._lease_ns)
        for slot in self._slots["io"]:
            self._spawn(slot)
        try:
            await self._hello
        except WorkerStartError:
            await self.stop()
            raise

    def _make_journals(self) -> None:
        """All files, then the manifest that names them, and only then any work."""
        if self._directory.exists():
            # Incarnations are unique in the ledger: this one never got as far as to work.
            shutil.rmtree(self._directory)
        self._directory.mkdir(parents=True)
        boot_id = read_boot_id()
        counts = {"io": self._settings.io_workers, "cpu": self._settings.cpu_workers}
        names = [DOUBTS]
        for kind, count in counts.items():
            for index in range(count):
                name = f"{kind}{index}.journal"
                journal = Journal(
                    self._directory / name, self._incarnation, boot_id, self._settings.journal_bytes
                )
                self._slots[kind].append(Slot(index, kind, journal))
                names.append(name)
        self._doubts = Journal(
            self._directory / DOUBTS, self._incarnation, boot_id, self._settings.journal_bytes
        )
        write_manifest(self._directory, self._incarnation, boot_id, tuple(names))

    async def drain(self, timeout_s: float) -> bool:
        """Wait until all that was submitted is reported; whether that came about in time."""
        if self._is_idle():
            return True
        future: asyncio.Future[None] = self._loop.create_future()
        self._idle.append(future)
        done, _ = await asyncio.wait({future}, timeout=timeout_s)
        return bool(done)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Let workers finish what they have, then kill what is left; all of it is reported before this returns."""
        self._stopping = True
        if self._scan is not None and self._is_idle():
            self._scan.cancel()
        self._return_queues("the node stopped")
        deadline = self._loop.time() + grace_s
        for slot in self._all_slots():
            if slot.retry is not None:
                slot.retry.cancel()
            if slot.process is not None and slot.ready:
                slot.process.send(Stop())
            elif slot.process is not None:
                slot.process.kill("the node stopped")
        while any(slot.process is not None for slot in self._all_slots()):
            if self._loop.time() > deadline:
                for slot in self._all_slots():
                    if slot.process is not None:
                        slot.process.kill("the node stopped")
            await asyncio.sleep(0.01)
        if self._scan is not None:
            self._scan.cancel()
        self._guard.stop()

    def kill_all(self) -> None:
        """Fence this node off: no task runs after this returns. What ran is reported as its process is buried."""
        self.set_lease(0)
        for slot in self._all_slots():
            if slot.process is not None:
                slot.process.kill("the node's lease ran out")
        self._return_queues("the node's lease ran out")

    def set_lease(self, until_ns: int) -> None:
        """Until when (CLOCK_BOOTTIME) tasks may be started, and may run; 0 is never. Renew it in good time."""
        self._lease_ns = until_ns
        for slot in self._all_slots():
            slot.journal.set_lease(until_ns)
        if self._slots["io"]:
            self._guard.set_lease(until_ns)
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
        if self._doubts.needs(work.ids, count) > self._doubts.data_bytes_max:
            raise ValueError("the work does not fit the journal: split it")
        info = self.handlers.get(work.handler)
        if info is None:
            error = f"handler={work.handler!r} is unknown to {self._spec.app_ref}"
            self._loop.call_soon(self._report_whole, work, Ended.INVALID, error)
            return
        if not work.ttr_ms and info.ttr_ms:
            work = msgspec.structs.replace(work, ttr_ms=info.ttr_ms)
        kind = "io" if work.mode is not Mode.RUN or info.is_async else info.kind
        self._queues[kind].append(work)
        self._queued[kind] += count
        self._wake()

    def release(self, number: int, at: int, count: int) -> None:
        """The settle of these positions was confirmed: their marks may go.

        Positions that ended NOT_STARTED, and checks, are released by themselves; once more does no harm.
        """
        handed = self._handed.get(number)
        if handed is not None and handed.release(at, count):
            handed.journal.free(handed.record)
            del self._handed[number]
            if self._queued["cpu"] or self._queued["io"]:
                self._wake()  # it may be the journal's room that they wait for

    async def validate(self, handler: str, bodies: Sequence[bytes]) -> tuple[int, str] | None:
        """The first body that does not fit the handler's types, and why; None if all do.

        Raises WorkerStartError if no worker lives long enough to say.
        """
        if handler not in self.handlers:
            return 0, f"handler={handler!r} is unknown to {self._spec.app_ref}"
        for _ in range(VALIDATE_TRIES):
            self._own_number -= 1
            answer = self._answers[self._own_number] = self._loop.create_future()
            ids = Ids(((1, len(bodies)),))
            info = self.handlers[handler]
            self.submit(Work(self._own_number, Mode.VALIDATE, handler, ids, 0, 0, info.ttr_ms, tuple(bodies)))
            part = await answer
            if part.ended is Ended.DONE:
                return None
            if part.ended is Ended.INVALID:
                return part.at, part.error
        raise WorkerStartError(f"no worker could validate: {part.error}")

    @property
    def guard_pid(self) -> int:
        """The process that kills the workers when this one cannot."""
        return self._guard.pid

    def slots(self, kind: str, is_async: bool = False) -> int:
        """How many tasks can run at once."""
        ready = sum(slot.ready for slot in self._slots[kind])
        return ready * self._capacity(kind, is_async)

    def free(self, kind: str, is_async: bool = False) -> int:
        """How many more tasks would start at once."""
        taken = self._queued[kind] + sum(slot.tasks for slot in self._slots[kind] if slot.ready)
        return max(0, self.slots(kind, is_async) - taken)

    def stats(self) -> PoolStats:
        workers = tuple(
            WorkerStats(
                slot.process.pid, slot.kind, slot.ready, slot.tasks, slot.process.rss_bytes()
            )
            for slot in self._all_slots()
            if slot.process is not None
        )  # fmt: skip
        return PoolStats(dict(self._stats), workers, dict(self._queued), self._restarts, self._doubts_dropped)

    # --- dispatch ----------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._dispatching:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        if time.clock_gettime_ns(time.CLOCK_BOOTTIME) >= self._lease_ns:
            return  # set_lease or kill_all goes on from here
        for kind, queue in self._queues.items():
            while queue:
                slot = self._choose(kind, queue[0])
                if slot is None or not self._hand_over(slot, queue[0]):
                    break  # a report, a hello or a release goes on from here
                self._queued[kind] -= len(queue.popleft().bodies)
        if self._scan is None and any(slot.handed for slot in self._all_slots()):
            self._scan = self._loop.call_later(SCAN_S_MIN, self._look)

    def _choose(self, kind: str, work: Work) -> Slot | None:
        """The least loaded worker that would start this work soon."""
        ready = [slot for slot in self._slots[kind] if slot.ready]
        if not ready:
            return None
        slot = min(ready, key=lambda slot: slot.tasks)
        if slot.tasks == 0:
            return slot
        info = self.handlers[work.handler]
        if kind == "io":
            return slot if slot.tasks < self._capacity("io", info.is_async) else None
        if info.length == "long" or len(slot.handed) >= PREFETCH_WORKS or slot.has_long:
            return None
        waiting_us = sum(handed.untold * self._run_us(handed.work.handler) for handed in slot.handed.values())
        return slot if waiting_us < PREFETCH_US else None

    def _hand_over(self, slot: Slot, work: Work) -> bool:
        count = len(work.bodies)
        record = slot.journal.put(work.mode, work.fence, work.ids, count)
        if record is None or slot.process is None:
            return False
        info = self.handlers[work.handler]
        handed = Handed(work, record, slot.journal, info.is_async)
        self._handed[work.number] = slot.handed[work.number] = handed
        slot.tasks += count
        slot.has_long += info.length == "long"
        slot.process.send(Job(record.entry, record.states_at, work))
        return True

    def _capacity(self, kind: str, is_async: bool) -> int:
        if kind == "cpu":
            return 1
        return self._settings.async_tasks_max if is_async else self._settings.io_threads

    def _run_us(self, handler: str) -> float:
        stats = self._stats.get(handler)
        return stats.run_us if stats is not None and stats.tasks else GUESS_US

    # --- reports -----------------------------------------------------------------------------------------------

    def _take_reports(self, slot: Slot, message: Reported) -> None:
        told = []
        for report in message.reports:
            handed = slot.handed.get(report.number)
            try:
                if handed is None:
                    raise ValueError(f"work {report.number} is not its own")
                self._take(slot, handed, report)
            except ValueError as error:
                if slot.process is not None:
                    slot.process.kill(f"it reported nonsense: {error}")
                break
            told.append(report)
        self._tell(told)

    def _take(self, slot: Slot, handed: Handed, report: Report) -> None:
        """Book a report, from a worker or about a dead one."""
        number = report.number
        count = errors = 0
        for part in report.parts:
            handed.take(part)
            count += part.count
            if part.ended in _FAULTS:
                errors += part.count
            if part.ended in (Ended.CRASHED, Ended.TIMED_OUT):
                self._keep_doubt(handed, part)
            if part.ended is Ended.NOT_STARTED or handed.work.mode is not Mode.RUN:
                # Never handed over, as far as anybody may tell: the same as no record.
                self.release(number, part.at, part.count)
        slot.tasks -= count
        if handed.work.mode is Mode.RUN and count:
            self._stats.setdefault(handed.work.handler, HandlerStats()).add(count, errors, report.busy_us)
        if handed.untold == 0:
            del slot.handed[number]
            slot.has_long -= self.handlers[handed.work.handler].length == "long"

    def _keep_doubt(self, handed: Handed, part: Part) -> None:
        ids = handed.work.ids.part(part.at, part.count)
        if self._doubts.put(Mode.RUN, handed.work.fence, ids, part.count, State.STARTED) is None:
            # No room: from now on absence proves nothing, which costs certainty but never a second effect.
            self._doubts.set_lossy()
            self._doubts_dropped = True

    def _tell(self, reports: list[Report]) -> None:
        outside = []
        for report in reports:
            if report.number in self._answers:
                answer = self._answers.pop(report.number)
                worst = next((part for part in report.parts if part.ended is not Ended.DONE), report.parts[0])
                if not answer.done():
                    answer.set_result(worst)
            else:
                outside.append(report)
        if outside:
            self._on_reports(outside)
        if self._queued["cpu"] or self._queued["io"]:
            self._wake()
        elif self._idle and self._is_idle():
            for future in self._idle:
                if not future.done():
                    future.set_result(None)
            self._idle.clear()

    def _report_whole(self, work: Work, ended: Ended, error: str) -> None:
        now_ms = time.time_ns() // 1_000_000
        part = Part(0, len(work.bodies), ended, None, error)
        self._tell([Report(work.number, (part,), now_ms, now_ms, 0, 0)])

    def _return_queues(self, why: str) -> None:
        for kind, queue in self._queues.items():
            for work in queue:
                self._loop.call_soon(self._report_whole, work, Ended.NOT_STARTED, why)
            queue.clear()
            self._queued[kind] = 0

    # --- processes ---------------------------------------------------------------------------------------------

    def _spawn(self, slot: Slot) -> None:
        slot.retry = None
        slot.journal.reset_cells()
        process = WorkerProcess(
            lambda hello: self._take_hello(slot, process, hello),
            lambda message: self._take_reports(slot, message),
            lambda task, line: self._on_event(Printed(process.pid, slot.kind, task, line)),
            self._guard.remove,
            lambda status: self._take_end(slot, process, status),
        )
        spec = msgspec.structs.replace(self._spec, kind=slot.kind, journal=str(slot.journal.path))
        try:
            process.spawn(spec)
        except OSError as error:
            self._take_failure(slot, f"the process cannot be started: {error}")
            return
        self._guard.add(process.pid)
        slot.process = process
        slot.started_s = self._loop.time()
        slot.retry = self._loop.call_later(
            self._settings.start_timeout_s,
            process.kill,
            f"it did not say hello in start_timeout_s={self._settings.start_timeout_s}",
        )

    def _take_hello(self, slot: Slot, process: WorkerProcess, hello: Hello) -> None:
        if hello.error:
            process.killed_why = hello.error
            return  # it leaves by itself; its end is taken as a failure to start
        if slot.retry is not None:
            slot.retry.cancel()
            slot.retry = None
        slot.ready = True
        slot.failures = 0
        self.handlers = {info.name: info for info in hello.handlers}
        self._on_event(WorkerStarted(process.pid, slot.kind))
        if any(info.kind == "cpu" and not info.is_async for info in hello.handlers):
            for other in self._slots["cpu"]:
                if other.process is None and other.retry is None and not self._stopping:
                    self._spawn(other)
        if not self._hello.done():
            self._hello.set_result(None)
        self._wake()

    def _take_end(self, slot: Slot, process: WorkerProcess, status: int) -> None:
        was_ready = slot.ready
        slot.process = None
        slot.ready = False
        if slot.retry is not None:
            slot.retry.cancel()
            slot.retry = None
        why = describe_end(status, process.killed_why)
        if not was_ready:
            self._take_failure(slot, process.killed_why or why)
            return
        reports = []
        in_doubt = 0
        for handed, report in slot.last_words(process.pid, why):
            self._take(slot, handed, report)
            reports.append(report)
            in_doubt += sum(
                part.count for part in report.parts if part.ended in (Ended.CRASHED, Ended.TIMED_OUT)
            )
        self._on_event(WorkerEnded(process.pid, slot.kind, why, in_doubt))
        if not self._stopping:
            self._restarts += 1
            self._spawn(slot)
        if reports:
            self._tell(reports)

    def _take_failure(self, slot: Slot, error: str) -> None:
        if self._stopping:
            return
        if not self._hello.done():
            self._hello.set_exception(WorkerStartError(error))
            return
        settings = self._settings
        delay_s = min(settings.restart_delay_s_max, settings.restart_delay_s * 2**slot.failures)
        slot.failures = min(slot.failures + 1, 30)
        slot.retry = self._loop.call_later(delay_s, self._spawn, slot)
        self._on_event(WorkerFailed(slot.kind, error, delay_s))

    def _look(self) -> None:
        """While anything runs: what outran its time-to-run, or its share of memory?"""
        self._scan = None
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        now_s = self._loop.time()
        look_at_memory = now_s - self._memory_seen_s >= 1.0
        if look_at_memory:
            self._memory_seen_s = now_s
        wait_s = SCAN_S_MAX
        busy = [slot for slot in self._all_slots() if slot.handed and slot.process is not None]
        for slot in busy:
            assert slot.process is not None
            why = slot.overdue(now_ns)
            if not why and look_at_memory:
                rss = slot.process.rss_bytes()
                if rss > self._settings.memory_bytes_max:
                    why = f"{rss} bytes resident exceed memory_bytes_max={self._settings.memory_bytes_max}"
            if why:
                slot.process.kill(why)
            ttrs = [handed.work.ttr_ms for handed in slot.handed.values() if handed.work.ttr_ms]
            wait_s = min([wait_s, *(ttr / 20_000 for ttr in ttrs)])
        if busy:
            self._scan = self._loop.call_later(max(SCAN_S_MIN, wait_s), self._look)

    def _all_slots(self) -> list[Slot]:
        return [*self._slots["io"], *self._slots["cpu"]]

    def _is_idle(self) -> bool:
        return not (
            self._queued["cpu"] or self._queued["io"] or any(slot.tasks for slot in self._all_slots())
        )
