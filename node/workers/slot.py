"""A worker slot: one journal, and the process that has it now. Processes come and go."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator

from node.workers.journal import SOME_POSITION, Journal, Record, State
from node.workers.port import Ended, HandlerInfo, Mode, Part, Report, Work
from node.workers.process import WorkerProcess

UNTOLD, TOLD, RELEASED = 0, 1, 2
_RELEASE = bytes.maketrans(bytes((TOLD,)), bytes((RELEASED,)))


class Handed:
    """A Work that was handed over, until its record is freed."""

    __slots__ = ("info", "journal", "record", "timed_out", "told", "untold", "work")

    def __init__(self, work: Work, info: HandlerInfo, record: Record, journal: Journal) -> None:
        self.work = work
        self.info = info
        self.journal = journal
        self.record = record
        self.told = bytearray(len(work.bodies))
        self.untold = len(work.bodies)
        self.timed_out: set[int] = set()  # positions that the scan found to have outrun their time

    def take(self, part: Part) -> bool:
        """Note that a part was reported; False if it cannot be."""
        at, end = part.at, part.at + part.count
        if at < 0 or part.count < 1 or end > len(self.told):
            return False
        if self.told.count(UNTOLD, at, end) != part.count:
            return False
        if part.results is not None and len(part.results) != part.count:
            return False
        self.told[at:end] = bytes((TOLD,)) * part.count
        self.untold -= part.count
        return True

    def hung(self) -> int:
        """How many outran their time and did not end."""
        return sum(self.told[position] == UNTOLD for position in self.timed_out)

    def release(self, at: int, count: int) -> bool:
        """True when nothing of it is needed any more."""
        # Only what was told: the marks of the rest are still needed.
        self.told[at : at + count] = self.told[at : at + count].translate(_RELEASE)
        return self.told.count(RELEASED) == len(self.told)


class Slot:
    def __init__(self, kind: str, journal: Journal) -> None:
        self.kind = kind
        self.journal = journal
        self.process: WorkerProcess | None = None
        self.greeted = False  # its process said hello
        self.ready = False  # and takes work
        self.failures = 0  # starts that failed in a row
        self.timer: asyncio.TimerHandle | None = (
            None  # until it must have said hello, or may be started again
        )
        self.retire_at_s = 0.0  # loop time; 0: it is not being retired
        self.tasks = 0  # handed over and not reported
        self.handed: dict[int, Handed] = {}  # by Work number, those with something untold

    def overdue(self, now_ns: int) -> str:
        """Mark what has outrun its time-to-run; why the process must be killed, or ""."""
        entries = {handed.record.entry: handed for handed in self.handed.values()}
        cells = self.journal.cells[:2] if self.kind == "cpu" else self.journal.cells
        words = cells.tolist()
        why = ""
        for at in range(0, len(words), 2):
            started_ns = words[at]
            if not started_ns:
                continue
            handed = entries.get(words[at + 1] >> 32)
            # Read again: between the two loads the worker may have gone on to the next task.
            if handed is None or not handed.work.ttr_ms or cells[at] != started_ns:
                continue
            if now_ns - started_ns > handed.work.ttr_ms * 1_000_000:
                position = words[at + 1] & 0xFFFFFFFF
                handed.timed_out.update(range(len(handed.told)) if position == SOME_POSITION else (position,))
                why = f"{handed.work.handler} outran its time-to-run of {handed.work.ttr_ms} ms"
        return why

    def last_words(self, pid: int, why: str) -> Iterator[tuple[Handed, Report]]:
        """What a dead process did not report itself, as its marks tell it."""
        now_ms = time.time_ns() // 1_000_000
        for handed in list(self.handed.values()):
            parts = tuple(self._untold_parts(handed, why))
            # When it started is not known here, so nobody is told how long it ran.
            yield handed, Report(handed.work.number, parts, 0, now_ms, 0, pid)

    @staticmethod
    def _untold_parts(handed: Handed, why: str) -> Iterator[Part]:
        states = bytes(handed.record.states)
        ends = [
            None if told else _ended(handed, position, states[position])
            for position, told in enumerate(handed.told)
        ]
        at = 0
        for position in range(1, len(ends) + 1):
            if position < len(ends) and ends[position] is ends[at]:
                continue
            ended = ends[at]
            if ended is not None:
                yield Part(at, position - at, ended, None, _error(ended, handed, why))
            at = position


def _ended(handed: Handed, position: int, state: int) -> Ended:
    if handed.work.mode is Mode.CHECK:
        return Ended.NOT_STARTED if state == State.NOT_STARTED else Ended.UNSURE
    if state == State.NOT_STARTED:
        return Ended.NOT_STARTED
    if state == State.FINISHED:
        return Ended.DONE
    if state == State.FAILED:
        return Ended.RAISED
    return Ended.TIMED_OUT if position in handed.timed_out else Ended.CRASHED


def _error(ended: Ended, handed: Handed, why: str) -> str:
    if ended is Ended.DONE:
        return f"the result was lost with its worker: {why}"
    if ended is Ended.RAISED:
        return f"the error was lost with its worker: {why}"
    if ended is Ended.TIMED_OUT:
        return f"killed at its time-to-run of {handed.work.ttr_ms} ms"
    return why


def describe_end(status: int, killed_why: str) -> str:
    """Why a process ended, for people."""
    if killed_why:
        return f"the worker was killed: {killed_why}"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"the worker died of {name}"
    return f"the worker exited with status {status}"
