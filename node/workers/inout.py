"""The I/O worker: synchronous handlers and all checks on threads, asynchronous handlers on the event loop.

The loop's thread reads jobs and sends reports; handler threads take single tasks from a queue. What ended is
gathered and sent by the loop in one frame for all that ended meanwhile.

Nothing is cancelled here at its time-to-run, not even a coroutine: what it left in threads, tasks and connections
could still take effect after a check had said that it did not. The node kills this process instead (crew.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any

from dedup.ids import TaskId
from node.workers.calls import Calls, encode_result, one_line, raised, short_trace
from node.workers.cpu import NULL
from node.workers.frames import REPORT_BYTES_MAX, Job
from node.workers.journal import CELL_COUNT, State, WorkerJournal
from node.workers.port import Ended, Mode, Part, Report, Work
from oncekeeper.context import CurrentTask
from oncekeeper.errors import AlreadyExecuted

ASYNC_TASKS_MAX = CELL_COUNT - 128  # cells are shared with the threads
THREADS_MAX = 128
_CHECKED = {True: Ended.TRUE, False: Ended.FALSE, None: Ended.UNSURE}


class Batch:
    """One job in this worker."""

    __slots__ = ("calls", "entry", "ids", "left", "on_threads", "states", "work")

    def __init__(self, job: Job, calls: Calls, states: memoryview) -> None:
        self.work = job.work
        self.entry = job.entry
        self.calls = calls
        self.ids: list[TaskId] = list(job.work.ids)
        self.states = states
        self.left = len(job.work.bodies)
        self.on_threads = False


class End:
    """How one position ended."""

    __slots__ = ("batch", "busy_ns", "ended", "ended_ns", "error", "position", "text", "trace")

    def __init__(
        self,
        batch: Batch,
        position: int,
        ended: Ended,
        text: bytes | None = None,
        error: str = "",
        trace: str = "",
    ) -> None:
        self.batch = batch
        self.position = position
        self.ended = ended
        self.text = text
        self.error = error
        self.trace = trace
        self.ended_ns = time.time_ns()
        self.busy_ns = 0


class InOutRunner:
    """Runs jobs on the running event loop; ``send`` gets reports, on the loop's thread."""

    def __init__(
        self,
        handlers: Mapping[str, Calls],
        journal: WorkerJournal,
        send: Callable[[tuple[Report, ...]], None],
        threads: int,
        async_tasks_max: int,
    ) -> None:
        self._handlers = handlers
        self._journal = journal
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[tuple[Batch, int]] = SimpleQueue()
        self._ended: deque[End] = deque()
        self._waking = False
        self._threads_max = threads
        self._threads = 0
        self._load = 0  # tasks given to threads and not reported yet
        self._waiting: deque[tuple[Batch, int]] = deque()
        self._free_cells = list(range(threads, threads + async_tasks_max))
        self._tasks: set[asyncio.Task[None]] = set()
        self._batches: set[Batch] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def drained(self) -> None:
        await self._idle.wait()

    def submit(self, job: Job) -> None:
        work = job.work
        count = len(work.bodies)
        states = self._journal.states(job.states_at, count)
        calls = self._handlers.get(work.handler)
        if calls is None:
            states[:] = bytes((State.FAILED,)) * count
            error = f"handler={work.handler!r} is unknown to this worker"
            now_ms = time.time_ns() // 1_000_000
            part = Part(0, count, Ended.INVALID, None, error)
            self._send((Report(work.number, (part,), now_ms, now_ms, 0, os.getpid()),))
            return
        batch = Batch(job, calls, states)
        self._batches.add(batch)
        self._idle.clear()
        if work.mode is Mode.VALIDATE:
            for position in range(count):
                self._end(self._validated(batch, position))
        elif work.mode is Mode.RUN and calls.info.is_async:
            self._waiting.extend((batch, position) for position in range(count))
            self._start_coroutines()
        else:
            batch.on_threads = True
            self._load += count
            self._start_threads()
            for position in range(count):
                self._calls.put((batch, position))

    # --- threads -----------------------------------------------------------------------------------------------

    def _start_threads(self) -> None:
        # As many as were ever needed at once, up to the bound. They are never ended: at rest one costs little.
        for index in range(self._threads, min(self._threads_max, self._load)):
            threading.Thread(target=self._run_thread, args=(index,), daemon=True).start()
            self._threads = index + 1

    def _run_thread(self, cell: int) -> None:
        while True:
            batch, position = self._calls.get()
            end = self._run(batch, position, cell)
            self._end(end)

    def _run(self, batch: Batch, position: int, cell: int) -> End:
        begun = self._begin(batch, position, cell)
        if isinstance(begun, End):
            return begun
        task, arguments, started_ns = begun
        call = batch.calls.check if batch.work.mode is Mode.CHECK else batch.calls.run
        try:
            value = call(task, arguments)
        except BaseException as error:  # noqa: BLE001 - SystemExit too: a handler must not end its worker
            return self._raised(batch, position, cell, started_ns, error)
        return self._returned(batch, position, cell, started_ns, value)

    # --- coroutines --------------------------------------------------------------------------------------------

    def _start_coroutines(self) -> None:
        while self._waiting and self._free_cells:
            batch, position = self._waiting.popleft()
            task = self._loop.create_task(self._run_coroutine(batch, position, self._free_cells.pop()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run_coroutine(self, batch: Batch, position: int, cell: int) -> None:
        end = await self._await(batch, position, cell)
        self._free_cells.append(cell)
        self._end(end)
        self._start_coroutines()

    async def _await(self, batch: Batch, position: int, cell: int) -> End:
        begun = self._begin(batch, position, cell)
        if isinstance(begun, End):
            return begun
        task, arguments, started_ns = begun
        try:
            value = await batch.calls.run(task, arguments)
        except BaseException as error:  # noqa: BLE001 - as above, and a CancelledError of the handler's own making
            return self._raised(batch, position, cell, started_ns, error)
        return self._returned(batch, position, cell, started_ns, value)

    # --- one task ----------------------------------------------------------------------------------------------

    def _begin(self, batch: Batch, position: int, cell: int) -> tuple[CurrentTask, object, int] | End:
        """Decode, look at the lease, mark the start; an End if it may not start."""
        work = batch.work
        try:
            arguments = batch.calls.decode(work.bodies[position])
        except Exception as error:  # noqa: BLE001 - decoding calls foreign hooks; the task is invalid
            batch.states[position] = State.FAILED
            ended = Ended.UNSURE if work.mode is Mode.CHECK else Ended.INVALID
            return End(batch, position, ended, None, one_line(error))
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        if now >= self._journal.lease[0]:
            return End(batch, position, Ended.NOT_STARTED, None, "the node's lease ran out")
        queue = batch.calls.info.queue
        task = CurrentTask(batch.ids[position], work.handler, work.fence, work.attempt, queue, work.due_ms)
        cells = self._journal.cells
        cells[2 * cell + 1] = batch.entry << 32 | position
        cells[2 * cell] = now
        batch.states[position] = State.STARTED
        return task, arguments, now

    def _returned(self, batch: Batch, position: int, cell: int, started_ns: int, value: Any) -> End:
        batch.states[position] = State.FINISHED
        self._journal.cells[2 * cell] = 0
        if batch.work.mode is Mode.CHECK:
            return self._timed(End(batch, position, _CHECKED[value]), started_ns)
        text, dropped = encode_result(batch.calls, value)
        return self._timed(End(batch, position, Ended.DONE, text, dropped), started_ns)

    def _raised(self, batch: Batch, position: int, cell: int, started_ns: int, error: BaseException) -> End:
        if batch.work.mode is Mode.CHECK:
            end = End(batch, position, Ended.UNSURE, None, one_line(error), short_trace(error))
            batch.states[position] = State.FAILED
        elif isinstance(error, AlreadyExecuted):
            batch.states[position] = State.FINISHED
            end = End(batch, position, Ended.DONE)
        else:
            batch.states[position] = State.FAILED
            end = End(batch, position, raised(error), None, one_line(error), short_trace(error))
        self._journal.cells[2 * cell] = 0
        return self._timed(end, started_ns)

    def _timed(self, end: End, started_ns: int) -> End:
        end.busy_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - started_ns
        return end

    def _validated(self, batch: Batch, position: int) -> End:
        try:
            batch.calls.decode(batch.work.bodies[position])
        except Exception as error:  # noqa: BLE001 - as in _begin
            return End(batch, position, Ended.INVALID, None, one_line(error))
        return End(batch, position, Ended.DONE)

    # --- reports -----------------------------------------------------------------------------------------------

    def _end(self, end: End) -> None:
        """From any thread. The flag is read after appending and cleared before emptying, so that none is lost."""
        self._ended.append(end)
        if not self._waking:
            self._waking = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is leaving
                self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._waking = False
        gathered: dict[Batch, list[End]] = {}
        while self._ended:
            end = self._ended.popleft()
            gathered.setdefault(end.batch, []).append(end)
        for batch, ends in gathered.items():
            for some in _by_size(ends):
                self._send((_report(batch.work, some),))
            batch.left -= len(ends)
            if batch.on_threads:
                self._load -= len(ends)
            if batch.left == 0:
                self._batches.discard(batch)
        if not self._batches:
            self._idle.set()


def _by_size(ends: list[End]) -> Iterator[list[End]]:
    """Lists that fit a frame."""
    some: list[End] = []
    size = 0
    for end in ends:
        some.append(end)
        size += len(end.text or b"") + len(end.error) + len(end.trace)
        if size > REPORT_BYTES_MAX:
            yield some
            some, size = [], 0
    if some:
        yield some


def _report(work: Work, ends: list[End]) -> Report:
    ends.sort(key=lambda end: end.position)
    parts: list[Part] = []
    stretch: list[End] = []
    for end in ends:
        if stretch and not (end.position == stretch[-1].position + 1 and _alike(end, stretch[-1])):
            parts.append(_part(stretch))
            stretch = []
        stretch.append(end)
    parts.append(_part(stretch))
    started_ns = min(end.ended_ns - end.busy_ns for end in ends)
    ended_ns = max(end.ended_ns for end in ends)
    busy_us = sum(end.busy_ns for end in ends) // 1000
    return Report(
        work.number, tuple(parts), started_ns // 1_000_000, ended_ns // 1_000_000, busy_us, os.getpid()
    )


def _alike(one: End, other: End) -> bool:
    return one.ended is other.ended and one.error == other.error and one.trace == other.trace


def _part(ends: list[End]) -> Part:
    first = ends[0]
    results = None
    if any(end.text is not None for end in ends):
        results = tuple(NULL if end.text is None else end.text for end in ends)
    return Part(first.position, len(ends), first.ended, results, first.error, first.trace)
