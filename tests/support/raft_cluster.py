"""Replicas as processes: start, ask, kill -9, start again.

Waits are for conditions, with deadlines that say what was seen.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from node.certs import CertFiles, make_all

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def eventually(what: str, probe: Callable[[], Any], seconds: float = 15.0) -> Any:
    """The first true answer of ``probe``; AssertionError with the last answer otherwise."""
    until = time.monotonic() + seconds
    seen: Any = None
    while time.monotonic() < until:
        seen = probe()
        if seen:
            return seen
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {what}; last seen: {seen!r}")


class Process:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.name: str = settings["id"]
        self.acked: list[str] = []
        self.fatal: str | None = None
        self._number = 0
        self._answers: dict[int, queue.Queue[Any]] = {}
        self._log = open(Path(settings["dir"]).parent / f"{self.name}.log", "ab")  # noqa: SIM115  # closed in kill
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.support.raft_process", json.dumps(settings)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._up = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            if not line.endswith("\n"):
                return  # torn by a kill
            word = json.loads(line)
            if "acked" in word:
                self.acked.append(word["acked"])
            elif "up" in word:
                self._up.set()
            elif "fatal" in word:
                self.fatal = word["fatal"]
            else:
                self._answers[word["id"]].put(word["answer"])

    def wait_up(self) -> None:
        assert self._up.wait(20), f"{self.name} did not start: see {self._log.name}"

    def begin(self, do: str, **words: Any) -> queue.Queue[Any]:
        assert self._popen.stdin is not None
        self._number += 1
        answers: queue.Queue[Any] = queue.Queue()
        self._answers[self._number] = answers
        self._popen.stdin.write(json.dumps({"id": self._number, "do": do, **words}) + "\n")
        self._popen.stdin.flush()
        return answers

    def ask(self, do: str, *, wait_s: float = 30.0, **words: Any) -> Any:
        return self.begin(do, **words).get(timeout=wait_s)

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    @property
    def pid(self) -> int:
        return self._popen.pid

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """kill -9, and read what it had said before."""
        if self.alive:
            self._popen.kill()
        self._popen.wait()
        self._reader.join(5)
        self._log.close()


class Cluster:
    """``with Cluster(tmp_path) as cluster:`` three voters, all up."""

    def __init__(
        self, directory: Path, voters: int = 3, observers: int = 0, tls: bool = False, **settings: Any
    ) -> None:
        names = [f"n{number + 1}" for number in range(voters)]
        watchers = [f"o{number + 1}" for number in range(observers)]
        self.ports = dict(zip(names + watchers, free_ports(voters + observers), strict=True))
        self.secret = os.urandom(32)
        self.cluster_id = os.urandom(16).hex()
        if tls:
            files = CertFiles(directory / "certs")
            make_all(files, self.cluster_id, dict.fromkeys(names + watchers, ()))
            settings["certs"] = str(files.dir)
        self.settings = {
            name: {
                "id": name,
                "cluster": self.cluster_id,
                "secret": self.secret.hex(),
                "port": self.ports[name],
                "peers": {other: self.ports[other] for other in names if other != name},
                "observers": watchers if name in names else [],
                "role": "voter" if name in names else "observer",
                "dir": str(directory / name / "raft"),
                **settings,
            }
            for name in names + watchers
        }
        self.nodes: dict[str, Process] = {}

    def __enter__(self) -> Cluster:
        for name in self.settings:
            self.begin_start(name)
        for node in self.nodes.values():
            node.wait_up()
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.kill()

    def begin_start(self, name: str) -> None:
        Path(self.settings[name]["dir"]).mkdir(parents=True, exist_ok=True)
        before = self.nodes.get(name)
        self.nodes[name] = Process(self.settings[name])
        if before is not None:
            self.nodes[name].acked = before.acked

    def start(self, name: str) -> None:
        self.begin_start(name)
        self.nodes[name].wait_up()

    def kill(self, name: str) -> None:
        self.nodes[name].kill()

    @property
    def alive(self) -> list[Process]:
        return [node for node in self.nodes.values() if node.alive]

    def leader(self) -> str:
        """The id of the one leader whom all living replicas follow."""

        def probe() -> str | None:
            seen = {node.ask("status")["leader"] for node in self.alive}
            return seen.pop() if len(seen) == 1 else None

        return str(eventually("all follow one leader", probe))

    def follower(self) -> str:
        leader = self.leader()
        return next(node.name for node in self.alive if node.name != leader)

    def settled(self) -> dict[str, int]:
        """Every living replica's counts, once they are equal behind a barrier."""
        for node in self.alive:
            eventually(f"{node.name} passes a barrier", lambda node=node: node.ask("barrier"))

        def probe() -> dict[str, int] | None:
            counts = [node.ask("counts") for node in self.alive]
            return counts[0] if all(other == counts[0] for other in counts) else None

        counts: dict[str, int] = eventually("equal states", probe)
        return counts
