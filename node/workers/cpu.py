"""The CPU worker's loop: one task at a time, one Work after the other.

The order of stores is the testimony: the start mark comes after the body was decoded and the lease was found
valid, right before the call; the end mark right after it. What the node was not told yet when this process dies
is found by these marks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from node.workers.calls import Calls, encode_result, one_line, raised, short_trace
from node.workers.frames import REPORT_BYTES_MAX, Job
from node.workers.journal import SOME_POSITION, State, WorkerJournal
from node.workers.port import Ended, Mode, Part, Report, Work
from oncekeeper.context import CurrentTask
from oncekeeper.errors import AlreadyExecuted

FLUSH_NS = 5_000_000
NULL = b"null"


class Tally:
    """What ended in one Work since the last report: neighbours that were done make one part."""

    def __init__(self, work: Work, send: Callable[[Report], None]) -> None:
        self._number = work.number
        self._send = send
        self._pid = os.getpid()
        self._parts: list[Part] = []
        self._at = 0  # where the stretch of done ones began
        self._results: list[bytes] | None = None
        self._result_bytes = 0
        # Wall time once a Work; the rest is counted from it by the lease clock.
        self._boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._epoch_ms = time.time_ns() // 1_000_000
        self._sent_ns = self._boot_ns

    def result(self, position: int, text: bytes | None) -> bool:
        """Note the result of a done task; True when enough was gathered to be sent."""
        if self._results is None:
            if text is None:
                return False
            self._results = [NULL] * (position - self._at)
        self._results.append(NULL if text is None else text)
        self._result_bytes += len(text) if text else 4
        return self._result_bytes > REPORT_BYTES_MAX

    def stretch_ends(self, end: int) -> None:
        """All before ``end`` that no part names yet were done."""
        if end > self._at:
            results = None if self._results is None else tuple(self._results)
            self._parts.append(Part(self._at, end - self._at, Ended.DONE, results))
        self._at = end
        self._results = None

    def add(self, position: int, count: int, ended: Ended, error: str = "", trace: str = "") -> None:
        self.stretch_ends(position)
        self._parts.append(Part(position, count, ended, None, error, trace))
        self._at = position + count

    def flush(self, end: int, now_ns: int) -> None:
        self.stretch_ends(end)
        if self._parts:
            started_ms = self._epoch_ms + (self._sent_ns - self._boot_ns) // 1_000_000
            ended_ms = self._epoch_ms + (now_ns - self._boot_ns) // 1_000_000
            busy_us = (now_ns - self._sent_ns) // 1000
            self._send(Report(self._number, tuple(self._parts), started_ms, ended_ms, busy_us, self._pid))
        self._parts = []
        self._result_bytes = 0
        self._sent_ns = now_ns


class CpuRunner:
    """Runs jobs; ``send`` gets reports as they are due."""

    def __init__(
        self, handlers: Mapping[str, Calls], journal: WorkerJournal, send: Callable[[Report], None]
    ) -> None:
        self._handlers = handlers
        self._journal = journal
        self._send = send

    def run(self, job: Job) -> None:
        """Run all tasks of a Work, marking each; reports go out at the end, and every few ms before."""
        work = job.work
        count = len(work.bodies)
        states = self._journal.states(job.states_at, count)
        tally = Tally(work, self._send)
        calls = self._handlers.get(work.handler)
        if calls is None or work.mode is not Mode.RUN or calls.info.is_async:
            states[:] = bytes((State.FAILED,)) * count
            tally.add(0, count, Ended.INVALID, f"handler={work.handler!r} is unknown to this worker")
            tally.flush(count, time.clock_gettime_ns(time.CLOCK_BOOTTIME))
            return
        # Everything that the loop touches is local: this is the part that runs a hundred thousand times a second.
        clock, boot = time.clock_gettime_ns, time.CLOCK_BOOTTIME
        lease, cells = self._journal.lease, self._journal.cells
        decode, call = calls.decode, calls.run
        handler, queue, fence, attempt = work.handler, calls.info.queue, work.fence, work.attempt
        due_ms = work.due_ms
        started, finished, failed = int(State.STARTED), int(State.FINISHED), int(State.FAILED)
        cells[1] = job.entry << 32 | SOME_POSITION
        now = clock(boot)
        flush_at = now + FLUSH_NS
        position = -1
        for position, (task_id, body) in enumerate(zip(work.ids, work.bodies, strict=True)):
            if now >= flush_at:
                tally.flush(position, now)
                flush_at = now + FLUSH_NS
            if now >= lease[0]:
                tally.add(position, count - position, Ended.NOT_STARTED, "the node's lease ran out")
                break
            try:
                arguments = decode(body)
            except Exception as error:  # noqa: BLE001 - decoding calls foreign hooks; the task is invalid
                states[position] = failed
                tally.add(position, 1, Ended.INVALID, one_line(error))
                continue
            task = CurrentTask(task_id, handler, fence, attempt, queue, due_ms)
            cells[0] = now
            states[position] = started
            try:
                value = call(task, arguments)
            except AlreadyExecuted:
                value = None
            except BaseException as error:  # noqa: BLE001 - SystemExit too: a handler must not end its worker
                states[position] = failed
                cells[0] = 0
                tally.add(position, 1, raised(error), one_line(error), short_trace(error))
                now = clock(boot)
                continue
            states[position] = finished
            now = clock(boot)
            text, dropped = (None, "") if value is None else encode_result(calls, value)
            if dropped:
                tally.add(position, 1, Ended.DONE, dropped)
            elif tally.result(position, text):
                flush_at = now
        cells[0] = 0
        tally.flush(count, clock(boot))
