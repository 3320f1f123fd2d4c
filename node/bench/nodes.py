"""Nodes of the product as child processes: started, asked, killed, started again, and never left behind.

They are started by the command that the supervisor uses. There is no supervisor here, because it would wait
longer and longer before it starts a node that is killed again and again, and the bench would measure its
patience.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from node.cli.connection import Api, connect_directory
from node.cli.output import CliError
from node.cli.starting import POLL_S, node_rows, open_log, output_tail, wait_ready
from node.cluster import Cluster, create
from node.supervisor import child_environment, node_command

APP = "node.bench.app:app"
READY_S_MAX = 60.0
STOP_S_MAX = 15.0
SHARED_S = 1.0
ASK_TIMES = 5


class Nodes:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.api: Api = connect_directory(cluster.dir)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._killed: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._running.items()}

    def start(self, name: str) -> None:
        if name in self._killed:
            self._killed.pop(name).wait()
        with (self.cluster.node_dir(name) / "node.out").open("ab") as out:
            self._running[name] = subprocess.Popen(
                node_command(self.cluster, name, os.getpid()),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=child_environment(),
            )

    def kill(self, name: str) -> None:
        """SIGKILL, and no more: its end is reaped when it is started again."""
        self._running[name].kill()
        self._killed[name] = self._running.pop(name)

    def leave(self, name: str) -> None:
        """Ask it to stop, and wait until it has."""
        process = self._running.pop(name)
        self._killed[name] = process
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            raise CliError(f"{name} did not stop within {STOP_S_MAX:g} s") from None

    def rows(self) -> list[dict[str, Any]]:
        """Each node's own word."""
        return node_rows(self.api)

    def ready(self) -> list[dict[str, Any]]:
        return wait_ready(self.api, READY_S_MAX, self.refuse_ends)

    def lead(self) -> None:
        """Wait for a leader alone: nodes that take no work are never "ready"."""
        deadline = time.monotonic() + READY_S_MAX
        while time.monotonic() < deadline:
            self.refuse_ends()
            with suppress(CliError):
                if any(row.get("role") == "leader" for row in self.rows()):
                    return
            time.sleep(POLL_S)
        raise CliError(f"no leader is elected after {READY_S_MAX:g} s")

    def refuse_ends(self) -> None:
        for name, process in self._running.items():
            if process.poll() is not None:
                said = output_tail(self.cluster, name)
                raise CliError(f"{name} ended with {process.returncode}. It said:\n{said}")

    def settled(self) -> int:
        """How many tasks the nodes have settled since they started."""
        return sum(int(row["tasks_settled"]) for row in self._reports())

    def passed(self) -> int:
        """How far the positions of all partitions are, by the nodes that own them."""
        return sum(int(view["position"]) for row in self._reports() for view in row["partitions"])

    def kept(self) -> tuple[int, int]:
        """Delayed tasks, and how many of all tasks no position has passed: they wait in no store yet."""
        status = self.api.get("/v1/status")
        ahead = sum(each["end"] - each["position"] for each in status["partitions"])
        return int(status["tasks"]["delayed"]), ahead

    def shared(self) -> None:
        """Wait until the nodes have shared out their partitions, and no more of them move."""
        deadline = time.monotonic() + READY_S_MAX
        standing: list[int] = []
        since = 0.0
        while time.monotonic() < deadline:
            counts = [len(row["partitions"]) for row in self._reports()]
            if counts != standing:
                standing, since = counts, time.monotonic()
            elif max(counts) - min(counts) <= 1 and sum(counts) > 0 and time.monotonic() - since > SHARED_S:
                return
            self.refuse_ends()
            time.sleep(POLL_S)
        raise CliError(f"the nodes have not shared out their partitions after {READY_S_MAX:g} s: {standing}")

    def _reports(self) -> list[dict[str, Any]]:
        """Every node's; one that is too busy to answer at once is asked again."""
        for _ in range(ASK_TIMES):
            answers = list(self.api.ask_each("/v1/status?local=1"))
            silent = [address for address, row in answers if row is None]
            if not silent:
                break
            self.refuse_ends()
        else:
            raise CliError(f"the node at {silent[0]} does not answer")
        return [row for _, row in answers if row is not None]

    def stop(self) -> None:
        running = self._running.values()
        for process in running:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S_MAX
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for process in self._killed.values():
            process.wait()
        self._running.clear()
        self._killed.clear()


@contextmanager
def running_nodes(
    home: Path,
    count: int = 3,
    settings: Mapping[str, object] | None = None,
    app: str = APP,
    log: Mapping[str, object] | None = None,
) -> Iterator[Nodes]:
    root = Path(__file__).resolve().parents[2]
    cluster = create(home, nodes=count, app=app, app_dir=root, settings=settings, log_settings=log)
    open_log(cluster)
    nodes = Nodes(cluster)
    try:
        for name in nodes.cluster.peers:
            nodes.start(name)
        yield nodes
    finally:
        nodes.stop()
