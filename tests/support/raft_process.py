"""One replica in a process of its own, driven by JSON lines on its standard input (see raft_cluster.py).

Run as ``python -m tests.support.raft_process CONFIG_JSON``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from raft.engine import Limits, Timings
from raft.replica import Applied, Replica, ReplicaConfig
from raft.tls import client_context, server_context
from tests.support.raft_machine import TallyMachine


def say(word: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(word) + "\n")
    sys.stdout.flush()


class Driven:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.machine = TallyMachine()
        certs = None
        if folder := settings.get("certs"):
            certs = [
                Path(folder) / name for name in ("ca.pem", f"{settings['id']}.pem", f"{settings['id']}.key")
            ]
        self.replica = Replica(
            ReplicaConfig(
                node_id=settings["id"],
                cluster_id=settings["cluster"],
                secret=bytes.fromhex(settings["secret"]),
                listen=("127.0.0.1", settings["port"]),
                peers={name: ("127.0.0.1", port) for name, port in settings["peers"].items()},
                data_dir=Path(settings["dir"]),
                role=settings.get("role", "voter"),
                observers=tuple(settings.get("observers", ())),
                timings=Timings(**settings.get("timings", {})),
                limits=Limits(**settings.get("limits", {})),
                server_ssl=None if certs is None else server_context(*certs),
                client_ssl=None if certs is None else client_context(*certs),
            ),
            self.machine,
            on_fatal=lambda error: say({"fatal": str(error)}),
        )

    async def answer(self, word: dict[str, Any]) -> Any:
        replica = self.replica
        match word["do"]:
            case "status":
                status = replica.status()
                times = os.times()
                return {
                    "role": status.role,
                    "leader": status.leader,
                    "term": status.term,
                    "applied": status.applied_index,
                    "commit": status.commit_index,
                    "last": status.last_index,
                    "snapshot": status.snapshot_index,
                    "ready": status.ready,
                    "strangers": status.strangers,
                    "fatal": status.fatal,
                    "connected": [peer.name for peer in status.peers if peer.connected],
                    "cpu_s": times.user + times.system,
                }
            case "propose":
                outcome = await replica.propose(
                    word["payload"].encode(), timeout_ms=word.get("timeout_ms", 5000)
                )
                return [type(outcome).__name__, getattr(outcome, "reason", None)]
            case "load":
                return await self.load(word["prefix"], word["seconds"], word["depth"])
            case "latency":
                return await self.latency(word["count"], word.get("gap_s", 0.0))
            case "rate":
                return await self.rate(word["count"], word["size"], word["depth"])
            case "barrier":
                return await replica.barrier(word.get("timeout_ms", 5000))
            case "counts":
                return {payload.decode(): count for payload, count in self.machine.counts.items()}
            case "stop":
                await replica.stop()
                return True
        raise ValueError(word)

    async def load(self, prefix: str, seconds: float, depth: int) -> int:
        """Propose distinct payloads; what was acknowledged is said at once, so that a kill loses no knowledge."""
        until = time.monotonic() + seconds
        number = 0

        async def one() -> None:
            nonlocal number
            while time.monotonic() < until:
                number += 1
                payload = f"{prefix}{number}"
                outcome = await self.replica.propose(payload.encode(), timeout_ms=3000)
                if isinstance(outcome, Applied):
                    say({"acked": payload})
                else:
                    await asyncio.sleep(0.02)

        await asyncio.gather(*(one() for _ in range(depth)))
        return number

    async def latency(self, count: int, gap_s: float) -> list[float]:
        """Milliseconds of single commands, one after another."""
        times = []
        for number in range(count):
            start = time.perf_counter()
            outcome = await self.replica.propose(b"latency%d" % number)
            if isinstance(outcome, Applied):
                times.append((time.perf_counter() - start) * 1000)
            if gap_s:
                await asyncio.sleep(gap_s)
        return sorted(times)

    async def rate(self, count: int, size: int, depth: int) -> float:
        """Applied commands a second with ``depth`` outstanding."""
        payload = os.urandom(8) + bytes(max(0, size - 8))
        start = time.perf_counter()
        left = count
        done = asyncio.Event()
        finished = 0

        def again(future: asyncio.Future[Any]) -> None:
            nonlocal left, finished
            if not isinstance(future.result(), Applied):
                raise RuntimeError(future.result())
            finished += 1
            if left:
                left -= 1
                self.replica.submit(payload, timeout_ms=20000).add_done_callback(again)
            elif finished == count:
                done.set()

        left -= depth
        for _ in range(depth):
            self.replica.submit(payload, timeout_ms=20000).add_done_callback(again)
        await done.wait()
        return count / (time.perf_counter() - start)


async def main() -> None:
    driven = Driven(json.loads(sys.argv[1]))
    await driven.replica.start()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    say({"up": True})
    tasks: set[asyncio.Task[None]] = set()

    async def perform(word: dict[str, Any]) -> None:
        say({"id": word["id"], "answer": await driven.answer(word)})

    while line := await reader.readline():
        task = loop.create_task(perform(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    if os.environ.get("ONCEKEEPER_TEST_LOOP") == "uvloop":
        import uvloop

        uvloop.run(main())
    else:
        asyncio.run(main())
