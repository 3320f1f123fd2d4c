"""Worker pools under test, with every position's end collected."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from dedup.ids import Ids
from node.workers.events import PoolEvent, PoolSettings, WorkerStarted
from node.workers.pools import WorkerPools
from node.workers.port import Ended, Mode, Part, Report, Work

ROOT = Path(__file__).resolve().parents[2]
APP = "tests.support.worker_app:app"
LEASE_FOR_EVER = 2**62
DEADLINE_S = 60


def body(**arguments: object) -> bytes:
    return json.dumps(arguments).encode()


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition; on the deadline, say what was waited for."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {DEADLINE_S} s: {what}")
        await asyncio.sleep(0.01)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Bench:
    """Pools, and what came of each Work: one single-position Part for each position, in their order."""

    def __init__(self, directory: Path, settings: PoolSettings, app: str, incarnation: int) -> None:
        self.ended: dict[int, dict[int, Part]] = {}
        self.reports: list[Report] = []
        self.events: list[PoolEvent] = []
        self.number = 0
        self.directory = directory
        self.pools = WorkerPools(
            app, str(ROOT), settings, directory, incarnation, self._take, self.events.append
        )

    def _take(self, reports: list[Report]) -> None:
        self.reports += reports
        for report in reports:
            ends = self.ended.setdefault(report.number, {})
            for part in report.parts:
                for n in range(part.count):
                    assert part.at + n not in ends, f"position {part.at + n} was reported twice"
                    result = None if part.results is None else (part.results[n],)
                    ends[part.at + n] = Part(part.at + n, 1, part.ended, result, part.error, part.trace)

    def submit(
        self, handler: str, bodies: Sequence[bytes], *, mode: Mode = Mode.RUN, start: int = 1, fence: int = 5
    ) -> int:
        self.number += 1
        ids = Ids(((start, len(bodies)),))
        self.pools.submit(Work(self.number, mode, handler, ids, fence, 1, 0, tuple(bodies)))
        return self.number

    async def ends(self, number: int, count: int) -> list[Part]:
        await until(
            lambda: len(self.ended.get(number, {})) == count,
            f"all {count} of work {number}: {self.ended.get(number)}, {self.events[-5:]}",
        )
        return [part for _, part in sorted(self.ended[number].items())]

    async def run(self, handler: str, *bodies: bytes, mode: Mode = Mode.RUN, start: int = 1) -> list[Part]:
        number = self.submit(handler, bodies, mode=mode, start=start)
        return await self.ends(number, len(bodies))

    async def states(self, handler: str, *bodies: bytes, mode: Mode = Mode.RUN) -> list[Ended]:
        return [part.ended for part in await self.run(handler, *bodies, mode=mode)]

    def pids(self) -> list[int]:
        return [worker.pid for worker in self.pools.stats().workers]


@asynccontextmanager
async def bench(
    directory: Path, *, app: str = APP, incarnation: int = 1, **settings: float
) -> AsyncIterator[Bench]:
    found = Bench(
        directory, PoolSettings(**{"cpu_workers": 1, **settings}), app, incarnation  # type: ignore[arg-type]
    )  # fmt: skip
    await found.pools.start()
    found.pools.set_lease(LEASE_FOR_EVER)
    try:
        yield found
    finally:
        await found.pools.stop(grace_s=0.0)
        started = [event.pid for event in found.events if isinstance(event, WorkerStarted)]
        left = [pid for pid in started if is_running(pid)]
        assert not left, f"workers outlived their pools: {left}"


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **extra}
