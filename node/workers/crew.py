"""The crew: worker slots, the processes in them, the guard and the scan, without a thought of queues.

A process that dies is buried and replaced; what it did not report is told by its slot's journal. One that cannot
start is tried again, ever more slowly: a broken deployment must not become a spinning one.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from node.workers.events import (
    GuardRestarted,
    PoolEvent,
    PoolSettings,
    Printed,
    WorkerEnded,
    WorkerFailed,
    WorkerStarted,
    WorkerStartError,
)
from node.workers.frames import Hello, Reported, Stop
from node.workers.guard_link import GuardLink
from node.workers.journal import Journal, State, read_boot_id
from node.workers.port import Ended, HandlerInfo, Mode, Part, Report
from node.workers.process import WorkerProcess
from node.workers.slot import Handed, Slot, describe_end
from node.workers.testimony import write_manifest
from node.workers.worker import Spec

SCAN_S_MIN, SCAN_S_MAX = 0.05, 1.0
SCANS_PER_TTR = 20
MEMORY_LOOK_S = 1.0
RETIRE_S = 5.0  # what the neighbours of a hung task get to finish, before their process is killed
DOUBTS = "doubts.journal"


class Crew:
    """``on_reports`` is told what a live worker says, ``on_dead`` what the marks of a dead one say."""

    def __init__(
        self,
        spec: Spec,
        settings: PoolSettings,
        work_dir: Path,
        incarnation: int,
        on_hello: Callable[[dict[str, HandlerInfo]], None],
        on_reports: Callable[[Slot, Reported], None],
        on_dead: Callable[[Slot, list[tuple[Handed, Report]]], None],
        on_event: Callable[[PoolEvent], None],
    ) -> None:
        self.slots: dict[str, list[Slot]] = {"io": [], "cpu": []}
        self.restarts = 0
        self.doubts_dropped = False
        self._spec = spec
        self._settings = settings
        self._directory = work_dir / str(incarnation)
        self._incarnation = incarnation
        self._on_hello = on_hello
        self._on_reports = on_reports
        self._on_dead = on_dead
        self._on_event = on_event
        self._guard: GuardLink | None = None
        self._scan: asyncio.TimerHandle | None = None
        self._memory_seen_s = 0.0
        self._stopping = False
        self._hello_came = False
        self._lease_ns = 0

    @property
    def all(self) -> list[Slot]:
        return self.slots["io"] + self.slots["cpu"]

    @property
    def guard_pid(self) -> int:
        return 0 if self._guard is None else self._guard.pid

    # --- life --------------------------------------------------------------------------------------------------

    async def start(self, lease_ns: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[None] = self._loop.create_future()
        self._make_journals()
        self._guard = GuardLink(
            self._directory / "guard", lambda status: self._on_event(GuardRestarted(status))
        )
        self._guard.start()
        self.set_lease(lease_ns)
        for slot in self.slots["io"]:
            self._spawn(slot)
        await self._hello

    def _make_journals(self) -> None:
        """All files, then the manifest that names them, and only then any work."""
        if self._directory.exists():
            # Incarnations are unique in the ledger: this one never got as far as to work.
            shutil.rmtree(self._directory)
        self._directory.mkdir(parents=True)
        boot_id = read_boot_id()
        names = [DOUBTS]
        self.doubts = self._journal(DOUBTS, boot_id)
        for kind, count in (("io", self._settings.io_workers), ("cpu", self._settings.cpu_workers)):
            for index in range(count):
                name = f"{kind}{index}.journal"
                names.append(name)
                self.slots[kind].append(Slot(kind, self._journal(name, boot_id)))
        write_manifest(self._directory, self._incarnation, boot_id, tuple(names))

    def _journal(self, name: str, boot_id: str) -> Journal:
        return Journal(self._directory / name, self._incarnation, boot_id, self._settings.journal_bytes)

    async def stop(self, grace_s: float) -> None:
        """Let workers finish what they were handed, then kill what is left."""
        if self._guard is None:
            return
        self._stopping = True
        for slot in self.all:
            if slot.timer is not None:
                slot.timer.cancel()
            if slot.process is not None and slot.ready:
                slot.process.send(Stop())
            elif slot.process is not None:
                slot.process.kill("the node stopped")
        deadline = self._loop.time() + grace_s
        while any(slot.process is not None for slot in self.all):
            if self._loop.time() >= deadline:
                self.kill("the node stopped")
            await asyncio.sleep(0.01)
        if self._scan is not None:
            self._scan.cancel()
        self._guard.stop()

    def kill(self, why: str) -> None:
        """SIGKILL to all, at once; they are buried as the loop learns of their ends."""
        for slot in self.all:
            if slot.process is not None:
                slot.process.kill(why)

    def set_lease(self, until_ns: int) -> None:
        for slot in self.all:
            if not slot.retire_at_s:
                slot.journal.set_lease(until_ns)
        self._lease_ns = until_ns
        if self._guard is not None:
            self._guard.set_lease(until_ns)

    def keep_doubt(self, handed: Handed, part: Part) -> None:
        """Copy what is in doubt to where it stays as long as this incarnation's directory."""
        ids = handed.work.ids.part(part.at, part.count)
        if self.doubts.put(Mode.RUN, handed.work.fence, ids, part.count, State.STARTED) is None:
            # No room: from now on absence proves nothing, which costs certainty but never a second effect.
            self.doubts.set_lossy()
            self.doubts_dropped = True

    # --- processes ---------------------------------------------------------------------------------------------

    def _spawn(self, slot: Slot) -> None:
        assert self._guard is not None
        slot.timer = None
        slot.retire_at_s = 0.0
        slot.greeted = False
        slot.journal.reset_cells()
        slot.journal.set_lease(self._lease_ns)
        process = WorkerProcess(
            lambda hello: self._take_hello(slot, process, hello),
            lambda message: self._on_reports(slot, message),
            lambda task, line: self._on_event(Printed(process.pid, slot.kind, task, line)),
            self._guard.remove,
            lambda status: self._take_end(slot, process, status),
        )
        spec = msgspec.structs.replace(self._spec, kind=slot.kind, journal=str(slot.journal.path))
        try:
            process.spawn(spec)
        except OSError as error:
            # Out of processes, descriptors or memory: it is tried again like one that dies at its start.
            self._take_failure(slot, f"the process cannot be started: {error}")
            return
        self._guard.add(process.pid)
        slot.process = process
        limit_s = self._settings.start_timeout_s
        slot.timer = self._loop.call_later(
            limit_s, process.kill, f"it did not say hello in start_timeout_s={limit_s}"
        )

    def _take_hello(self, slot: Slot, process: WorkerProcess, hello: Hello) -> None:
        if hello.error:
            process.killed_why = hello.error
            return  # it leaves by itself; its end is taken as a failure to start
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None
        slot.ready = not self._stopping
        slot.greeted = True
        slot.failures = 0
        self._on_event(WorkerStarted(process.pid, slot.kind))
        if any(info.kind == "cpu" for info in hello.handlers):
            for other in self.slots["cpu"]:
                if other.process is None and other.timer is None and not self._stopping:
                    self._spawn(other)
        self._on_hello({info.name: info for info in hello.handlers})
        if not self._hello.done():
            self._hello.set_result(None)
            self._hello_came = True

    def _take_end(self, slot: Slot, process: WorkerProcess, status: int) -> None:
        slot.process = None
        slot.ready = False
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None
        why = describe_end(status, process.killed_why)
        if not slot.greeted:
            self._take_failure(slot, process.killed_why or why)
            return
        words = list(slot.last_words(process.pid, why))
        in_doubt = sum(
            part.count
            for _, report in words
            for part in report.parts
            if part.ended in (Ended.CRASHED, Ended.TIMED_OUT)
        )
        self._on_event(WorkerEnded(process.pid, slot.kind, why, in_doubt))
        self._on_dead(slot, words)
        if not self._stopping:
            self.restarts += 1
            self._spawn(slot)

    def _take_failure(self, slot: Slot, error: str) -> None:
        if not self._hello.done():
            self._hello.set_exception(WorkerStartError(error))
        if self._stopping or not self._hello_came:
            return
        settings = self._settings
        delay_s = min(settings.restart_delay_s_max, settings.restart_delay_s * 2**slot.failures)
        slot.failures = min(slot.failures + 1, 30)
        slot.timer = self._loop.call_later(delay_s, self._spawn, slot)
        self._on_event(WorkerFailed(slot.kind, error, delay_s))

    # --- the scan ----------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Something was handed over: look after it until all of it has ended."""
        if self._scan is None:
            self._scan = self._loop.call_later(SCAN_S_MIN, self._look)

    def _look(self) -> None:
        """What outran its time-to-run, or its share of memory?"""
        self._scan = None
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        look_at_memory = self._loop.time() - self._memory_seen_s >= MEMORY_LOOK_S
        if look_at_memory:
            self._memory_seen_s = self._loop.time()
        wait_s = SCAN_S_MAX
        for slot in self.all:
            if slot.process is None or not (slot.handed or slot.retire_at_s):
                continue
            rss = slot.process.rss_bytes() if look_at_memory else 0
            if rss > self._settings.memory_bytes_max:
                why = f"{rss} bytes resident exceed memory_bytes_max={self._settings.memory_bytes_max}"
                slot.process.kill(why)
            elif (why := slot.overdue(now_ns)) or slot.retire_at_s:
                self._retire(slot, slot.process, why)
                wait_s = SCAN_S_MIN
            for handed in slot.handed.values():
                if handed.work.ttr_ms:
                    wait_s = min(wait_s, handed.work.ttr_ms / 1000 / SCANS_PER_TTR)
        if any(slot.handed or slot.retire_at_s for slot in self.all):
            self._scan = self._loop.call_later(max(SCAN_S_MIN, wait_s), self._look)

    def _retire(self, slot: Slot, process: WorkerProcess, why: str) -> None:
        """Kill a process in which something outran its time; but first let its neighbours finish.

        Killed at once they would all be in doubt, and for most handlers that means a check or a human each.
        """
        now_s = self._loop.time()
        if not slot.retire_at_s:
            slot.retire_at_s = now_s + RETIRE_S
            slot.ready = False
            slot.journal.set_lease(0)  # nothing more starts in it: what waits there comes back as not started
        hung = sum(handed.hung() for handed in slot.handed.values())
        if slot.kind == "cpu" or hung >= slot.tasks or now_s >= slot.retire_at_s:
            process.kill(why or "a task had outrun its time-to-run")
