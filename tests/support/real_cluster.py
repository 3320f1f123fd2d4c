"""Real clusters under test: nodes as processes that are killed and paused at will, and the whole history judged.

No supervisor: a node that died stays dead until the test starts it. Every process dies with the test's (the
kernel sees to that), and is known by its handle, never by a name.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from chaos import checkers
from chaos import history as h
from chaos.replay import replay
from dedup.ids import Ids, TaskId, parse_id
from node.cli.connection import Api, connect_directory
from node.cli.output import CliError
from node.cluster import Cluster, create
from node.supervisor import child_environment, node_command
from oncekeeper.client import Client
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.embedded import open_log
from oncekeeper.log.embedded_file import log_path
from oncekeeper.log.port import Fetched, TaskLog
from tests.support.real_sink import Sink

T = TypeVar("T")

APP_DIR = Path(__file__).resolve().parents[2]
# Short, so that what is lost lapses soon; the margins keep the proportions of the defaults.
SETTINGS: dict[str, object] = {
    "session_timeout_ms": 2000,
    "heartbeat_ms": 400,
    "fence_margin_ms": 500,
    "testimony_wait_ms": 1000,
    "cpu_workers": 1,
    "io_workers": 1,
}
POLICIES = {"again": "rerun", "atmost": "skip", "careful": "hold"}
IDLE_S = 60.0
COMMITTED_S = 20.0


def eventually(what: str, look: Callable[[], T | None], seconds: float = 30.0) -> T:
    """The first answer that is true. At the deadline, what was seen last."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}; seen last: {seen!r}"
        time.sleep(0.02)
    return seen


class RealCluster:
    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 3,
        settings: Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
        app: str = "tests.support.real_app:app",
        data: Path | None = None,
        log_settings: Mapping[str, object] | None = None,
    ) -> None:
        """``data``: the cluster's own directory, if it shall not be in ``folder``."""
        self.home = folder / "home"
        for each in ("traps", "caught", "released"):
            (self.home / each).mkdir(parents=True)
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.cluster: Cluster = create(
            data or folder / "data",
            nodes=nodes,
            app=app,
            app_dir=APP_DIR,
            settings={**SETTINGS, **(settings or {})},
            log_settings=log_settings,
        )
        self.nodes = tuple(self.cluster.peers)
        self.env = dict(env or {})
        self.sink = Sink(self.home / "effects")
        self.history = h.History()
        self.keys: dict[TaskId, str] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._client: Client | None = None
        self._names = 0
        self._watching = threading.Event()
        self._watcher: threading.Thread | None = None
        self._replays = 0

    # --- life -----------------------------------------------------------------------------------------------

    def __enter__(self) -> RealCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_watching()
        for node in list(self._processes):
            self.kill(node)
        self.forget_client()

    def forget_client(self) -> None:
        """The next one is new, with no file open and no ids leased."""
        if self._client is not None:
            self._client.close()
        self._client = None

    def start(self, *nodes: str, crash_at: str = "", env: Mapping[str, str] | None = None) -> None:
        for node in nodes or self.nodes:
            command = node_command(self.cluster, node, os.getpid())
            if crash_at:
                command += ["--set", f"crash_at={crash_at}"]
            with (self.cluster.node_dir(node) / "node.out").open("ab") as out:
                self._processes[node] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env={
                        **child_environment(),
                        "ONCE_TEST_HOME": str(self.home),
                        **self.env,
                        **(env or {}),
                    },
                )
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch_positions, daemon=True)
            self._watcher.start()

    def kill(self, *nodes: str) -> None:
        """SIGKILL, and wait until it is gone."""
        for node in nodes:
            with suppress(ProcessLookupError):
                self._processes[node].kill()
        for node in nodes:
            self._processes.pop(node).wait(10)

    def stop(self, *nodes: str) -> dict[str, int]:
        """Ask to drain; the exit codes."""
        for node in nodes or tuple(self._processes):
            self._processes[node].send_signal(signal.SIGTERM)
        return {node: self._processes.pop(node).wait(40) for node in nodes or tuple(self._processes)}

    def running(self) -> list[str]:
        """Those that did not end; whoever ended is reaped."""
        for node, process in list(self._processes.items()):
            if process.poll() is not None:
                del self._processes[node]
        return list(self._processes)

    def signal(self, node: str, number: signal.Signals) -> None:
        self._processes[node].send_signal(number)

    def pause(self, node: str) -> None:
        """SIGSTOP, at a moment at which the node is not writing the shared log.

        A process that stands still within a write transaction of SQLite keeps everybody else's writes waiting: an
        embedded log is one machine's, and there a stopped process is somebody's doing (docs/operations.md).
        """
        while True:
            self.signal(node, signal.SIGSTOP)
            log = sqlite3.connect(log_path(self.cluster.dir), timeout=2, isolation_level=None)
            try:
                log.execute("BEGIN IMMEDIATE")
                log.execute("ROLLBACK")
            except sqlite3.OperationalError:
                self.signal(node, signal.SIGCONT)
            else:
                return
            finally:
                log.close()

    def pid(self, node: str) -> int:
        return self._processes[node].pid

    def node_of(self, pid: int) -> str:
        return next(node for node, process in self._processes.items() if process.pid == pid)

    def ended(self, seconds: float = 20.0) -> dict[str, int]:
        """The nodes that ended by themselves, at least one, with their exit codes; reaped."""

        def codes() -> dict[str, int]:
            found = {node: process.poll() for node, process in self._processes.items()}
            return {node: code for node, code in found.items() if code is not None}

        found = eventually("a node ends", codes, seconds)
        for node in found:
            del self._processes[node]
        return found

    def died(self, seconds: float = 20.0) -> str:
        """The node that was killed by itself, or by a handler; its process is reaped."""

        def dead() -> str | None:
            return next((n for n, process in self._processes.items() if process.poll() is not None), None)

        node = eventually("a node dies", dead, seconds)
        code = self._processes.pop(node).returncode
        assert code == -signal.SIGKILL, f"{node} ended with {code}\n{self.log_text(node)[-3000:]}"
        return node

    # --- asking ---------------------------------------------------------------------------------------------

    def api(self, *nodes: str) -> Api:
        chosen = nodes or tuple(node for node in self.nodes if node in self._processes)
        api = connect_directory(self.cluster.dir)
        api.keep_only([self.cluster.peers[node].http for node in chosen])
        return api

    def status(self) -> dict[str, Any] | None:
        try:
            return dict(self.api().get("/v1/status"))
        except CliError:
            return None

    def all_take_work(self) -> bool:
        """All that were started; one that ended meanwhile does not."""
        status = self.status()
        rows = status["nodes"] if status else []
        return {row["node"] for row in rows if row["takes_work"]} >= self._processes.keys()

    def wait_up(self, seconds: float = 40.0) -> None:
        eventually(f"{', '.join(self._processes)} take work", self.all_take_work, seconds)

    def leader(self) -> str:
        def look() -> str | None:
            for node in self._processes:
                with suppress(CliError):
                    answer = self.api(node).get("/v1/node")
                    if answer["role"] == "leader":
                        return node
            return None

        return eventually("a leader", look)

    def wait_idle(self, seconds: float = IDLE_S) -> dict[str, Any]:
        """Until nothing runs or waits, and no suspect is left but those that wait for a human."""
        seen: dict[str, Any] = {}

        def idle() -> bool:
            seen.update(self.status() or {})
            return bool(seen) and seen["idle"] and seen["tasks"]["suspect"] == seen["held"]

        try:
            eventually("the cluster is idle", idle, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{json.dumps(seen, indent=1)}") from None
        return seen

    def cli(self, *arguments: str, expect: int = 0) -> Any:
        """A command as a user types it; its JSON document."""
        import sys

        ran = subprocess.run(
            [sys.executable, "-P", "-c", "from node.cli import main; main()", *arguments, "--json"],
            env={**child_environment(), "ONCEKEEPER_CLUSTER": str(self.cluster.dir)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == expect, f"{arguments}: {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
        return json.loads(ran.stdout)

    def log_text(self, node: str) -> str:
        return (self.cluster.node_dir(node) / "node.out").read_text(errors="replace")

    def executed(self) -> int:
        """What some live node has in its ledger; 0 where none can say."""
        status = self.status()
        return int(status["tasks"]["executed"]) if status else 0

    # --- work -----------------------------------------------------------------------------------------------

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = Client(self.cluster.dir)
        return self._client

    def name(self) -> str:
        self._names += 1
        return f"t{self._names}"

    def submit(self, handler: str = "once", *, count: int = 1, do: str = "", key: str = "") -> Ids:
        """Acknowledged when this returns. With ``do``, each task's trap is set."""
        names = [self.name() for _ in range(count)]
        if do:
            for name in names:
                (self.home / "traps" / name).touch()
        bodies = [json.dumps({"name": name, **({"do": do} if do else {})}).encode() for name in names]
        keys = [key] * count if key else ()
        ids = self.client.send(f"real.{handler}", bodies, keys=keys)
        self.acknowledged(ids, handler)
        for task_id, name in zip(ids, names, strict=True):
            self.keys[task_id] = name
        return ids

    def acknowledged(self, ids: Iterable[TaskId], handler: str, acknowledged: bool = True) -> None:
        self.history.submit(ids, POLICIES.get(handler, "check"), acknowledged=acknowledged)

    def caught(self, task_id: TaskId, seconds: float = 20.0) -> tuple[int, int]:
        """(worker's pid, node's pid) of the task that waits in its trap."""
        note = self.home / "caught" / self.keys[task_id]
        eventually(f"{task_id} is caught", note.exists, seconds)
        worker, node = note.read_text().split()
        return int(worker), int(node)

    def caught_by(self, ids: Iterable[TaskId]) -> set[int]:
        """The nodes (pids) that have some of these waiting in their traps."""
        notes = [self.home / "caught" / self.keys[task_id] for task_id in ids]
        return {int(note.read_text().split()[1]) for note in notes if note.exists()}

    def release(self, task_id: TaskId) -> None:
        (self.home / "released" / self.keys[task_id]).touch()

    def state(self, task_id: TaskId) -> str:
        from dedup.ids import id_text

        return str(self.api().get(f"/v1/tasks/{id_text(task_id)}")["state"])

    def effects_of(self, ids: Iterable[TaskId]) -> list[int]:
        found = Counter(parse_id(name) for name, _, _ in self.sink.read())
        return [found[task_id] for task_id in ids]

    # --- judging --------------------------------------------------------------------------------------------

    def _watch_positions(self) -> None:
        while not self._watching.wait(0.05):
            self._look_at_positions()

    def _look_at_positions(self) -> None:
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
        self.history.positions += [h.Position(partition, committed) for partition, committed in rows]

    def _stop_watching(self) -> None:
        self._watching.set()
        if self._watcher is not None:
            self._watcher.join(10)

    def check(self, *, open_suspects: bool = False, troubled: tuple[str, ...] = ()) -> h.History:
        """All nodes run and all is done: judge everything since the cluster was made.

        ``open_suspects``: tasks that wait for a human may be there; else each acknowledged one has ended.
        ``troubled``: nodes whose logs may tell of grave trouble; the others' must not.
        """
        status = self.wait_idle()
        self._wait_committed()
        history = self.history
        tasks = status["tasks"]
        history.counted = h.Counted(tasks["executed"], tasks["dead"], tasks["cancelled"], tasks["suspect"])
        history.effects = [h.Effect(parse_id(name), fence, pid) for name, fence, pid in self.sink.read()]
        self._look_at_digests()
        self._replay()
        self._look_at_log()
        self._look_at_positions()
        wanted = tuple(
            checker
            for checker in checkers.ALL
            if not (open_suspects and checker is checkers.each_acknowledged_task_ends_once)
        )
        wrong = checkers.violations(history, wanted)
        assert not wrong, self._report(wrong)
        self._check_logs(troubled)
        return history

    def _wait_committed(self) -> None:
        def all_passed() -> bool:
            status = self.status()
            return status is not None and all(row["committed"] == row["end"] for row in status["partitions"])

        eventually("every position is committed up to the end", all_passed, COMMITTED_S)

    def _look_at_digests(self) -> None:
        """The running replicas' own digests, several looks each; the replay below is held against them."""
        for _ in range(3):
            for node in self._processes:
                answer = self.api(node).get("/v1/node", digest=1)
                digest = h.Digest(node, answer["ledger_index"], answer["ledger_digest"])
                self.history.digests.append(digest)

    def _replay(self) -> None:
        config = json.loads((self.cluster.dir / "cluster.json").read_text())
        newest = {each.who: each.index for each in self.history.digests if each.who in self._processes}
        node = max(newest, key=lambda each: newest[each])
        self._replays += 1
        decisions, digests, ledger = replay(
            self.cluster.node_dir(node) / "raft",
            self.scratch / f"replay-{self._replays}",
            cluster_id=config["cluster_id"],
            bloom_seed=config["bloom_seed"],
            upto=newest[node],
            digests_at=frozenset(each.index for each in self.history.digests),
        )
        ledger.check_invariants()
        self.history.decisions = decisions
        self.history.digests = [each for each in self.history.digests if not each.who.startswith("replay")]
        self.history.digests += [
            h.Digest(f"replay of {node}", index, digest) for index, digest in digests.items()
        ]

    def open_log(self) -> TaskLog:
        return open_log(self.cluster.dir, cluster_id=self.cluster.cluster_id)

    def _look_at_log(self) -> None:
        log = self.open_log()
        try:
            placed = []
            for partition, end in log.ends().items():
                at = 0
                while at < end and (items := log.read(partition, at, 10_000, 64 << 20)):
                    for item in items:
                        if isinstance(item, Fetched):
                            placed += _placed(item)
                        at = item.end
            self.history.placed = placed
            self.history.aside = set()
            for kind in ("dead", "suspect"):
                after = 0
                while page := log.aside(kind, after, 1000):
                    after = page[-1][0]
                    self.history.aside |= {task.id for _, task in page}
        finally:
            log.close()

    def _check_logs(self, troubled: tuple[str, ...]) -> None:
        for node in self.nodes:
            if node in troubled:
                continue
            bad = [
                line
                for line in self.log_text(node).splitlines()
                if "Traceback" in line or '"level": "critical"' in line or "never retrieved" in line
            ]
            assert not bad, f"{node}'s log:\n" + "\n".join(bad[:5])

    def _report(self, wrong: Mapping[str, list[str]]) -> str:
        lines = [f"history of {self.cluster.dir}:"]
        for name, found in wrong.items():
            lines += [f"{name}: {len(found)}", *(f"    {each}" for each in found[:10])]
        return "\n".join(lines)


def _placed(item: Fetched) -> list[h.Placed]:
    batch: TaskBatch = item.batch
    return [h.Placed(item.partition, item.base + at, task_id) for at, task_id in enumerate(batch.ids)]
