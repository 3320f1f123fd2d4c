"""What the pools tell the node about themselves, their settings, and their figures."""

from __future__ import annotations

from dataclasses import dataclass


class WorkerStartError(Exception):
    """The application cannot be loaded; the text has the error's line and a shortened traceback."""


@dataclass(frozen=True)
class PoolSettings:
    cpu_workers: int = 2  # processes; started only if there is a CPU handler
    io_workers: int = 1  # processes; at least one: it validates bodies and runs checks
    io_threads: int = 16  # in each I/O process
    async_tasks_max: int = 256  # coroutines at a time in each I/O process
    memory_bytes_max: int = 1 << 30  # resident, of one worker process
    start_timeout_s: float = 60.0
    restart_delay_s: float = 0.2  # after a failed start; doubled up to:
    restart_delay_s_max: float = 10.0
    journal_bytes: int = 4 * 1024 * 1024

    def __post_init__(self) -> None:
        for name, low, high in (
            ("cpu_workers", 0, 512),
            ("io_workers", 1, 64),
            ("io_threads", 1, 128),
            ("async_tasks_max", 1, 384),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}={value} must be from {low} to {high}")


@dataclass(frozen=True)
class WorkerStarted:
    pid: int
    kind: str


@dataclass(frozen=True)
class WorkerEnded:
    pid: int
    kind: str
    why: str
    in_doubt: int  # tasks that were running, or whose end nobody knows


@dataclass(frozen=True)
class WorkerFailed:
    """It never came to say hello; another attempt follows after ``retry_s``."""

    kind: str
    error: str
    retry_s: float


@dataclass(frozen=True)
class Printed:
    pid: int
    kind: str
    task: str  # text form of the id; "" if it is not known
    line: str


@dataclass(frozen=True)
class GuardRestarted:
    status: int


PoolEvent = WorkerStarted | WorkerEnded | WorkerFailed | Printed | GuardRestarted


@dataclass
class HandlerStats:
    tasks: int = 0
    errors: int = 0
    run_us: float = 0.0  # exponentially weighted mean

    def add(self, tasks: int, errors: int, busy_us: int) -> None:
        if busy_us:  # nobody knows how long the tasks of a dead worker took
            mean = busy_us / tasks
            self.run_us = mean if self.run_us == 0 else self.run_us + 0.2 * (mean - self.run_us)
        self.tasks += tasks
        self.errors += errors


@dataclass(frozen=True)
class WorkerStats:
    pid: int
    kind: str
    ready: bool
    tasks: int  # handed over and not reported
    rss_bytes: int


@dataclass(frozen=True)
class PoolStats:
    handlers: dict[str, HandlerStats]
    workers: tuple[WorkerStats, ...]
    queued: dict[str, int]  # tasks, by lane
    restarts: int
    doubts_dropped: bool  # there was no room for more evidence of tasks in doubt
