"""Keeps the nodes of a data directory running: starts them, restarts those that died, drains them at the end.

A node is a process of its own session, so that Ctrl-C at the terminal reaches the supervisor alone, which
then asks the nodes to drain. A supervisor that is killed leaves its nodes running: the next one finds their
locks held, adopts them, and starts a node again only when its lock is free. Nobody is ever found by name: a
pid is believed only while the process holds its lock.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from node.cluster import (
    Cluster,
    ClusterError,
    Locked,
    hold_lock,
    is_held,
    lock_holder,
    open_cluster,
    refuse_taken_ports,
    signal_holder,
)
from node.config import ConfigError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
EXIT_BAD_CONFIG = 2
EXIT_LOCKED = 75  # EX_TEMPFAIL: another process is this node

BACKOFF_S_MIN = 0.1
BACKOFF_S_MAX = 5.0
STEADY_S = 10.0  # a node that lived so long starts with the shortest backoff again
LOCK_POLL_S = 0.2
DRAIN_S_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a node: "started", "adopted", "exited", "refused", "draining", "killed"."""

    what: str
    node: str
    pid: int = 0
    exit_code: int | None = None  # negative: the signal that ended it
    detail: str = ""


NodeCommand = Callable[[Cluster, str, int], list[str]]


def ignore(event: Event) -> None:
    pass


class Supervisor:
    """``run`` returns when ``stop`` was called and every node is gone."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        restart: bool = True,
        die_with_us: bool = False,
        command: NodeCommand | None = None,
        on_event: Callable[[Event], None] = ignore,
        drain_s_max: float = DRAIN_S_MAX,
    ) -> None:
        self.cluster = cluster
        self._restart = restart
        self._command = command or node_command
        self._die_with = os.getpid() if die_with_us else 0
        self._on_event = on_event
        self._drain_s_max = drain_s_max
        self._children: dict[str, Process] = {}
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

    def stop(self) -> None:
        """Let the nodes drain; called a second time, kill them."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def run(self) -> None:
        """Raises Locked when the directory has a supervisor, ClusterError when a port is taken."""
        with hold_lock(self.cluster.supervisor_lock, f"a supervisor of {self.cluster.dir}"):
            for node in self.cluster.peers:
                if not is_held(self.cluster.node_lock(node)):
                    refuse_taken_ports(self.cluster, node)
            await asyncio.gather(*(self._keep(node) for node in self.cluster.peers))

    async def _keep(self, node: str) -> None:
        backoff_s = BACKOFF_S_MIN
        wanted = True
        while not self._stopping.is_set():
            began = time.monotonic()
            if is_held(self.cluster.node_lock(node)):
                await self._watch_adopted(node)
                wanted = self._restart
            elif wanted:
                wanted = await self._run_child(node)
            else:
                # It stays down until somebody starts it (`cluster start`): then it is adopted.
                await self._pause(LOCK_POLL_S)
                continue
            if time.monotonic() - began > STEADY_S:
                backoff_s = BACKOFF_S_MIN
            await self._pause(backoff_s)
            backoff_s = min(backoff_s * 2, BACKOFF_S_MAX)

    async def _run_child(self, node: str) -> bool:
        """Start the node and wait for its end; whether it is to be started again."""
        try:
            refuse_taken_ports(self.cluster, node)
        except ClusterError as error:
            self._on_event(Event("refused", node, detail=str(error)))
            return self._restart
        child = await self._spawn(node)
        self._children[node] = child
        self._on_event(Event("started", node, child.pid))
        ended = asyncio.create_task(child.wait())
        asked = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((ended, asked), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                self._on_event(Event("draining", node, child.pid))
                _signal_child(child, signal.SIGTERM)
                if not await self._within_drain(ended):
                    self._on_event(Event("killed", node, child.pid))
                    _signal_child(child, signal.SIGKILL)
            code = await ended
        finally:
            asked.cancel()
            if not ended.done():
                # We are being cancelled: nothing that we started may stay behind.
                _signal_child(child, signal.SIGKILL)
            del self._children[node]
        self._on_event(Event("exited", node, child.pid, code))
        # A bad configuration does not get better by trying; a lock that is held means that somebody else is
        # it.
        return code == EXIT_LOCKED or (self._restart and code != EXIT_BAD_CONFIG)

    async def _watch_adopted(self, node: str) -> None:
        lock = self.cluster.node_lock(node)
        pid = lock_holder(lock)
        self._on_event(Event("adopted", node, pid))
        while is_held(lock) and not self._stopping.is_set():
            await self._pause(LOCK_POLL_S)
        if is_held(lock):
            self._on_event(Event("draining", node, pid))
            signal_holder(lock, signal.SIGTERM)
            freed = asyncio.create_task(_until_free(lock))
            if not await self._within_drain(freed):
                self._on_event(Event("killed", node, pid))
                signal_holder(lock, signal.SIGKILL)
                await freed
        self._on_event(Event("exited", node, pid))

    async def _within_drain(self, ended: asyncio.Task[object]) -> bool:
        """Wait for the end of a node that was asked to drain; False if it must be killed."""
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((ended, hurry), timeout=self._drain_s_max, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        return ended.done()

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    async def _spawn(self, node: str) -> Process:
        with (self.cluster.node_dir(node) / "node.log").open("ab") as out:
            return await asyncio.create_subprocess_exec(
                *self._command(self.cluster, node, self._die_with),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=child_environment(),
            )


def _signal_child(child: Process, number: signal.Signals) -> None:
    # A child that has ended is not reaped before wait() has returned, so the pid is still its own.
    if child.returncode is None:
        try:
            child.send_signal(number)
        except ProcessLookupError:
            return  # it ended by itself in the meantime, which is what was asked


async def _until_free(lock: Path) -> None:
    while is_held(lock):
        await asyncio.sleep(LOCK_POLL_S)


# --- starting processes ---------------------------------------------------------------------------


def node_command(cluster: Cluster, node: str, die_with: int = 0) -> list[str]:
    # -P: a folder called "node" where the user happens to stand must not be taken for ours.
    command = [sys.executable, "-P", "-m", "node", "--config", str(cluster.config_path(node))]
    return [*command, "--die-with", str(die_with)] if die_with else command


def child_environment() -> dict[str, str]:
    """Ours, and the place that we were imported from, so that a checkout works without installation."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths)))}


def start_node(cluster: Cluster, node: str) -> subprocess.Popen[bytes]:
    """Start one node that is down, in the background. A supervisor that is running adopts it."""
    lock = cluster.node_lock(node)
    if is_held(lock):
        raise Locked(f"{node} is running already as process {lock_holder(lock)}")
    refuse_taken_ports(cluster, node)
    return _start_background(node_command(cluster, node), cluster.node_dir(node) / "node.log")


def start_supervisor(
    cluster: Cluster, *, restart: bool, die_with_us: bool = False
) -> subprocess.Popen[bytes]:
    """Start a supervisor in the background. It outlives us, and the terminal."""
    if is_held(cluster.supervisor_lock):
        pid = lock_holder(cluster.supervisor_lock)
        raise Locked(f"a supervisor of {cluster.dir} is running already as process {pid}")
    command = [sys.executable, "-P", "-m", "node.supervisor", "--dir", str(cluster.dir)]
    if not restart:
        command.append("--no-restart")
    if die_with_us:
        command += ["--die-with", str(os.getpid())]
    return _start_background(command, cluster.dir / "supervisor.log")


def _start_background(command: list[str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=child_environment(),
        )


def die_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel signal us when ``parent`` ends, however it ends: a demo leaves nothing behind."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)  # it ended before we could say so


# --- the supervisor as a process of its own -------------------------------------------------------


def write_event(event: Event) -> None:
    line = {"at_ms": time.time_ns() // 1_000_000, "event": event.what, "node": event.node, "pid": event.pid}
    if event.exit_code is not None:
        line["exit_code"] = event.exit_code
    if event.detail:
        line["detail"] = event.detail
    print(json.dumps(line), flush=True)


async def _main(cluster: Cluster, restart: bool, nodes_die_with_us: bool) -> int:
    supervisor = Supervisor(cluster, restart=restart, die_with_us=nodes_die_with_us, on_event=write_event)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)
    await supervisor.run()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m node.supervisor")
    parser.add_argument("--dir", required=True, type=Path)
    parser.add_argument("--no-restart", action="store_true")
    parser.add_argument("--die-with", type=int, default=0, metavar="PID")
    asked = parser.parse_args()
    if asked.die_with:
        # Asked to stop, and not killed, so that the nodes drain even if who started us was killed.
        die_with(asked.die_with, signal.SIGTERM)
    try:
        return asyncio.run(_main(open_cluster(asked.dir), not asked.no_restart, bool(asked.die_with)))
    except (ClusterError, ConfigError) as error:
        print(json.dumps({"at_ms": time.time_ns() // 1_000_000, "event": "failed", "detail": str(error)}))
        return 1


if __name__ == "__main__":
    sys.exit(main())
