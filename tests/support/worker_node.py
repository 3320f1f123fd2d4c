"""A bare node around worker pools, to be stopped and killed: ``python -m tests.support.worker_node WORK_DIR``.

Commands come as JSON lines on standard input, what happens goes out as JSON lines.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dedup.ids import Ids
from node.workers.events import PoolEvent, PoolSettings, WorkerStarted
from node.workers.pools import WorkerPools
from node.workers.port import Mode, Report, Work
from tests.support.worker_pool import APP, DEADLINE_S, ROOT, environment


class NodeProcess:
    """The test's side."""

    def __init__(self, work_dir: Path, incarnation: int = 1, **settings: int) -> None:
        module = "tests.support.worker_node"
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(work_dir), str(incarnation), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment(),
        )
        self.heard: list[dict[str, Any]] = []
        count = 1 + settings.get("cpu_workers", 2)
        self.hear(lambda: any("ready" in one for one in self.heard), "the node is ready")
        self.hear(lambda: len(self.workers()) >= count, f"{count} workers said hello")

    def tell(self, **command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def submit(self, number: int, handler: str, bodies: list[dict[str, Any]], start: int, fence: int) -> None:
        self.tell(submit=[number, handler, [json.dumps(body) for body in bodies], start, fence])

    def hear(self, condition: Callable[[], object], what: str) -> None:
        assert self.process.stdout is not None
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            line = self.process.stdout.readline()
            assert line, f"the node died before: {what}"
            assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}; heard {self.heard[-5:]}"
            self.heard.append(json.loads(line))

    def ends(self, number: int) -> dict[int, str]:
        """How the positions of a Work ended, as far as was heard."""
        return {
            at + n: ended
            for one in self.heard
            if one.get("report") == number
            for at, count, ended in one["parts"]
            for n in range(count)
        }

    def workers(self) -> list[int]:
        return [one["worker"] for one in self.heard if "worker" in one]

    def guard(self) -> int:
        return next(int(one["ready"]) for one in self.heard if "ready" in one)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def say_reports(reports: list[Report]) -> None:
    for report in reports:
        say(report=report.number, parts=[(part.at, part.count, part.ended.name) for part in report.parts])


def say_event(event: PoolEvent) -> None:
    if isinstance(event, WorkerStarted):
        say(worker=event.pid)
    else:
        say(event=str(event))


def obey(pools: WorkerPools, command: dict[str, Any]) -> None:
    if "lease_ms" in command:
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        pools.set_lease(now_ns + command["lease_ms"] * 1_000_000)
    if "submit" in command:
        number, handler, bodies, start, fence = command["submit"]
        ids = Ids(((start, len(bodies)),))
        pools.submit(Work(number, Mode.RUN, handler, ids, fence, 1, 0, tuple(b.encode() for b in bodies)))
    if "release" in command:
        pools.release(*command["release"])


async def serve(work_dir: str, incarnation: str, settings: str) -> None:
    loop = asyncio.get_running_loop()
    pools = WorkerPools(
        APP,
        str(ROOT),
        PoolSettings(**json.loads(settings)),
        Path(work_dir),
        int(incarnation),
        say_reports,
        say_event,
    )
    await pools.start()
    reader = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb"))
    say(ready=pools.guard_pid)
    while line := await reader.readline():
        obey(pools, json.loads(line))


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
