"""A cluster under test: real nodes behind proxies, killed and paused at will, watched from outside.

No supervisor: a node that died stays dead until the scenario starts it. Every process dies with ours (the kernel
sees to that) and is known by its handle, never by a name.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from chaos import history as h
from chaos.faults import Fault, Faults, now_ns
from chaos.scenarios.links import Links
from chaos.sink import Sink
from chaos.toxiproxy import Toxiproxy
from chaos.traps import HOME
from chaos.wrapped import APP, APP_DIR
from node.cluster import create, http_token, read_secret
from node.supervisor import child_environment, node_command
from oncekeeper.client import Client

T = TypeVar("T")

# Short, so that what is lost lapses soon; the margins keep the proportions of the defaults.
SETTINGS: dict[str, object] = {
    "session_timeout_ms": 2000,
    "heartbeat_ms": 400,
    "fence_margin_ms": 500,
    "testimony_wait_ms": 1000,
    "cpu_workers": 1,
    "io_workers": 1,
    "io_threads": 4,
}
OWN_APP = "chaos.app:app"
ROOT = Path(__file__).resolve().parents[2]
LOOK_S = 0.1
ASK_S = 1.0  # a node that is stopped in its tracks still accepts connections: only a timeout tells it
WAIT_S = 60.0


class NotInTime(Exception):
    """A condition did not come true; the message says what was seen."""


def eventually(what: str, look: Callable[[], T | None], seconds: float = WAIT_S, pause_s: float = 0.03) -> T:
    """The first answer that is true. At the deadline, what was seen last."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise NotInTime(f"not within {seconds:g} s: {what}; seen last: {seen!r}")
        time.sleep(pause_s)
    return seen


@dataclass(frozen=True)
class Target:
    """What is run: our own application, or the user's, wrapped."""

    app: str = OWN_APP
    app_dir: Path = ROOT
    environment: Mapping[str, str] = field(default_factory=dict)


class Nodes:
    def __init__(
        self, folder: Path, server: Toxiproxy, target: Target, settings: Mapping[str, object] | None = None
    ) -> None:
        self.folder = folder
        self.home = folder / "home"
        for each in ("traps", "caught", "released"):
            (self.home / each).mkdir(parents=True)
        self.is_own = target.app == OWN_APP
        self.cluster = create(
            folder / "data",
            nodes=3,
            app=OWN_APP if self.is_own else "chaos.wrapped:app",
            app_dir=target.app_dir,
            settings={**SETTINGS, **(settings or {})},
            http_tls=False,  # we look many times a second; the Raft links have their TLS
        )
        self.names = tuple(self.cluster.peers)
        self.links = Links(self.cluster, server)
        self.sink = Sink(self.home / "effects")
        self.history = h.History()
        self.history.sink_is_exact = self.is_own
        self.faults = Faults(self.history)
        self.environment = {HOME: str(self.home), **target.environment}
        if not self.is_own:
            self.environment |= {APP: target.app, APP_DIR: str(target.app_dir)}
        self.token = http_token(read_secret(self.cluster.dir))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._client: Client | None = None
        self._watching = threading.Event()
        self._watchers: list[threading.Thread] = []
        self._positions: dict[int, int] = {}

    # --- life -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Heal what stands, and end every process that was begun here."""
        try:
            self.faults.heal_all()
        finally:
            self._watching.set()
            self.kill(*self._processes)
            for watcher in self._watchers:
                watcher.join(5)
            if self._client is not None:
                self._client.close()

    def start(
        self, *nodes: str, settings: Mapping[str, object] | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        for node in nodes or self.names:
            command = node_command(self.cluster, node, os.getpid())
            own = {"record_history": self.witness_path(node), **(settings or {})}
            for key, value in own.items():
                command += ["--set", f"{key}={value}"]
            with (self.cluster.node_dir(node) / "node.log").open("ab") as out:
                self._processes[node] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,  # Ctrl-C at the terminal is ours to answer
                    env={**child_environment(), **self.environment, **(env or {})},
                )
        if not self._watchers:
            watch = [(self._watch_node, (node,)) for node in self.names] + [(self._watch_log, ())]
            for target, arguments in watch:
                thread = threading.Thread(target=target, args=arguments, daemon=True)
                thread.start()
                self._watchers.append(thread)

    def start_dead(self, *nodes: str) -> None:
        """Those of them that do not run."""
        if dead := [node for node in nodes if not self.is_running(node)]:
            self.start(*dead)

    def kill(self, *nodes: str) -> None:
        """SIGKILL, and wait until it is gone."""
        for node in nodes:
            with suppress(ProcessLookupError):
                self._processes[node].kill()
        for node in nodes:
            self._processes.pop(node).wait(20)

    def stop(self, *nodes: str) -> None:
        """Ask to drain."""
        for node in nodes:
            self._processes[node].send_signal(signal.SIGTERM)
        for node in nodes:
            self._processes.pop(node).wait(60)

    def pid(self, node: str) -> int:
        return self._processes[node].pid

    def is_running(self, node: str) -> bool:
        return node in self._processes and self._processes[node].poll() is None

    def running(self) -> tuple[str, ...]:
        return tuple(node for node in self.names if self.is_running(node))

    def died(self, *nodes: str, seconds: float = WAIT_S) -> str:
        """One of these nodes that was killed by itself, or by a handler; it is reaped."""

        def dead() -> str | None:
            return next((each for each in nodes or tuple(self._processes) if not self.is_running(each)), None)

        node = eventually(f"one of {', '.join(nodes or self.names)} dies", dead, seconds)
        self._processes.pop(node).wait()
        return node

    def family(self, node: str) -> list[int]:
        """The node's process and all that descend from it, parents first."""
        found = [self.pid(node)]
        for each in found:
            for task in Path(f"/proc/{each}/task").glob("*/children"):
                with suppress(OSError):
                    found += [int(child) for child in task.read_text().split()]
        return found

    def witness_path(self, node: str) -> Path:
        return self.cluster.node_dir(node) / "witness.jsonl"

    def raft_dir(self, node: str) -> Path:
        return self.cluster.node_dir(node) / "raft"

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = Client(self.cluster.dir)
        return self._client

    # --- asking -----------------------------------------------------------------------------------------------

    def ask(self, node: str, path: str, seconds: float = ASK_S) -> dict[str, Any] | None:
        """One node's own answer; None if it gives none in time."""
        address = self.cluster.peers[node].http
        connection = http.client.HTTPConnection(address.host, address.port, timeout=seconds)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"})
            answer = connection.getresponse()
            text = answer.read()
            return dict(json.loads(text)) if answer.status == 200 else None
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()

    def post(self, path: str, body: object, seconds: float = 5.0) -> tuple[int, dict[str, Any]]:
        """To the first node that answers: (status, document); (0, {}) if none does."""
        for node in self.running():
            address = self.cluster.peers[node].http
            connection = http.client.HTTPConnection(address.host, address.port, timeout=seconds)
            try:
                headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
                connection.request("POST", path, json.dumps(body), headers)
                answer = connection.getresponse()
                return answer.status, dict(json.loads(answer.read()))
            except (OSError, http.client.HTTPException, ValueError):
                continue
            finally:
                connection.close()
        return 0, {}

    def status(self) -> dict[str, Any] | None:
        return next((found for node in self.running() if (found := self.ask(node, "/v1/status", 5.0))), None)

    def roles(self) -> dict[str, tuple[str, int]]:
        """(role, term) of every node that answers, by its own word."""
        found = {node: self.ask(node, "/v1/status?local=1") for node in self.running()}
        return {node: (str(one["role"]), int(one["term"])) for node, one in found.items() if one}

    def leader(self, among: tuple[str, ...] = (), seconds: float = WAIT_S) -> str:
        """Who leads by its own word; of several the one of the latest term."""

        def look() -> str | None:
            led = [
                (term, node)
                for node, (role, term) in self.roles().items()
                if role == "leader" and (not among or node in among)
            ]
            return max(led)[1] if led else None

        return eventually("a leader", look, seconds)

    def followers(self) -> tuple[str, ...]:
        leader = self.leader()
        return tuple(node for node in self.names if node != leader)

    def wait_up(self, *nodes: str, seconds: float = WAIT_S) -> None:
        wanted = nodes or self.running()

        def all_take_work() -> bool:
            for node in wanted:
                if not self.is_running(node):
                    log = (self.cluster.node_dir(node) / "node.log").read_text("utf-8", "replace")
                    raise NotInTime(f"{node} ended while it should take work: {log[-500:]}")
            answers = [self.ask(node, "/v1/status?local=1") for node in wanted]
            return all(each and each["takes_work"] for each in answers)

        eventually(f"{', '.join(wanted)} take work", all_take_work, seconds)

    def wait_idle(self, seconds: float) -> dict[str, Any]:
        """Until nothing runs or waits, only suspects for a human are left, and every position is committed."""
        seen: dict[str, Any] = {}

        def idle() -> bool:
            seen.clear()
            seen.update(self.status() or {})
            return (
                bool(seen)
                and seen["idle"]
                and seen["tasks"]["suspect"] == seen["held"]
                and all(row["committed"] == row["end"] for row in seen["partitions"])
            )

        try:
            eventually("the cluster is idle", idle, seconds, 0.1)
        except NotInTime as error:
            raise NotInTime(f"{error}: {json.dumps(seen)[:2000]}") from None
        return seen

    # --- faults -----------------------------------------------------------------------------------------------

    def killed(self, *nodes: str) -> Fault:
        """SIGKILL; healed by starting them again."""

        def strike() -> None:
            self.kill(*(node for node in nodes if self.is_running(node)))

        def heal() -> None:
            self.start_dead(*nodes)

        return Fault("killed", nodes, strike, heal)

    def paused(self, *nodes: str) -> Fault:
        """SIGSTOP of the node's process (its workers and its guard go on); healed by SIGCONT."""

        def send(number: signal.Signals) -> None:
            for node in nodes:
                if self.is_running(node):
                    os.kill(self.pid(node), number)

        return Fault("paused", nodes, lambda: send(signal.SIGSTOP), lambda: send(signal.SIGCONT))

    def frozen(self, node: str) -> Fault:
        """SIGSTOP of the node with all its processes, its guard too: as when a whole machine stands still."""
        held: list[int] = []

        def strike() -> None:
            # Again until nobody new is found: a process may start another while we look.
            while found := [pid for pid in self.family(node) if pid not in held]:
                held.extend(found)
                for pid in found:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGSTOP)

        def heal() -> None:
            # Children first: what they still do, they do before anybody can stop them.
            for pid in reversed(held):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

        return Fault("frozen", (node,), strike, heal)

    # --- watching -----------------------------------------------------------------------------------------------

    def _watch_node(self, node: str) -> None:
        led = 0
        while not self._watching.wait(LOOK_S):
            if not self.is_running(node):
                answer = None
            else:
                answer = self.ask(node, "/v1/status?local=1", 0.5)
                self._look_at_memory(node)
            term = int(answer["term"]) if answer and answer["role"] == "leader" else 0
            if term != led:
                if led:
                    self.history.leaders.append(h.Led(now_ns(), node, led, leads=False))
                if term:
                    self.history.leaders.append(h.Led(now_ns(), node, term))
                led = term

    def _look_at_memory(self, node: str) -> None:
        try:
            pages = int(Path(f"/proc/{self.pid(node)}/statm").read_text().split()[1])
        except (OSError, KeyError, IndexError):
            return  # it ended while we looked
        self.history.memory.append(h.Memory(now_ns(), node, pages * os.sysconf("SC_PAGE_SIZE")))

    def _watch_log(self) -> None:
        while not self._watching.wait(LOOK_S):
            self.look_at_positions()

    def look_at_positions(self) -> None:
        path = self.cluster.dir / "log" / "tasks.db"
        if not path.exists():
            return
        try:
            database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5)
            try:
                rows = database.execute("SELECT partition, committed FROM partitions").fetchall()
            finally:
                database.close()
        except sqlite3.OperationalError:
            return  # not made yet, or locked by a recovery: the next look sees
        at_ns = now_ns()
        known = self._positions
        for partition, committed in rows:
            if known.get(partition) != committed:
                known[partition] = committed
                self.history.positions.append(h.Position(partition, committed, at_ns))
