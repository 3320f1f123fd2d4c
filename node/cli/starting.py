"""Bringing a cluster up and down: what `cluster up`, `cluster down` and the demo have in common."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from node.cli.connection import Api
from node.cli.output import BAD_USAGE, CliError
from node.cluster import Cluster, create, exists, is_held, open_cluster, set_app, signal_holder
from node.config import check_app, load_config
from node.supervisor import child_environment
from oncekeeper.errors import LogUnusable
from oncekeeper.log.opening import open_place

POLL_S = 0.05
OUTPUT_LINES = 12

# What is wrong in one line, and where in the user's own files: what lies between is ours and the interpreter's.
CHECK_APP = """
import sys, traceback
from pathlib import Path
from oncekeeper import ApplicationError, load_app
try:
    load_app(sys.argv[1], Path(sys.argv[2]))
except ApplicationError as error:
    print(error, file=sys.stderr)
    ours = tuple(str(Path(sys.modules[name].__file__).parent) for name in ("oncekeeper", "importlib"))
    trace = traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ else []
    theirs = [each for each in trace if not each.filename.startswith(("<", *ours))]
    print("".join(traceback.format_list(theirs)).rstrip(), file=sys.stderr)
    sys.exit(1)
"""


def check_application(app: str, app_dir: Path) -> None:
    """Import the application in a process of its own, before anything is started or written."""
    check_app(app)
    command = [sys.executable, "-P", "-c", CHECK_APP, app, str(app_dir)]
    tried = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
    if tried.returncode:
        lines = tried.stderr.strip().splitlines()[-OUTPUT_LINES:]
        raise CliError(
            f"app={app} cannot be loaded from {app_dir}; nothing was started:\n  " + "\n  ".join(lines)
        )


def prepare(
    directory: Path,
    *,
    nodes: int | None,
    app: str | None,
    app_dir: Path | None,
    log: Mapping[str, object],
    tls: bool = True,
) -> Cluster:
    """Make the directory, or open the one that is there (and give it another application, if one is named)."""
    if not exists(directory):
        if not app:
            raise CliError(f"app is missing: {directory} is new, so say --app MODULE:APP", BAD_USAGE)
        from_dir = (app_dir or Path.cwd()).resolve()
        check_application(app, from_dir)
        is_new = not directory.exists()
        cluster = create(
            directory,
            nodes=nodes or 3,
            app=app,
            app_dir=from_dir,
            log_settings=log,
            tls=tls,
            http_tls=tls,
        )
        try:
            open_log(cluster)
        except LogUnusable:
            if is_new:
                shutil.rmtree(directory)
            raise
        return cluster
    cluster = open_cluster(directory)
    _refuse_other_log(cluster, log)
    if nodes is not None and nodes != len(cluster.peers):
        raise CliError(
            f"nodes={nodes}: {directory} was made with {len(cluster.peers)} nodes, and members cannot be "
            "added or removed yet",
            BAD_USAGE,
        )
    wanted = app or cluster.app
    from_dir = (app_dir or (Path.cwd() if app else cluster.app_dir)).resolve()
    for node in cluster.peers:
        load_config(cluster.config_path(node))  # what a node would refuse is refused before any is started
    check_application(wanted, from_dir)
    if (wanted, from_dir) != (cluster.app, cluster.app_dir):
        return set_app(cluster, wanted, from_dir)
    return cluster


def open_log(cluster: Cluster) -> None:
    """Make it, or check the one that is there, where a person sees what is wrong."""
    place = load_config(cluster.config_path(next(iter(cluster.peers)))).log_place
    open_place(msgspec.structs.replace(place, index_dir=None), create=True).close()


def _refuse_other_log(cluster: Cluster, log: Mapping[str, object]) -> None:
    config = load_config(cluster.config_path(next(iter(cluster.peers))))
    for name, value in log.items():
        standing = getattr(config, name)
        if value != standing:
            raise CliError(
                f"{name}={value}: {cluster.dir} was made with {name}={standing}, and its tasks are in that log",
                BAD_USAGE,
            )


# --- up -------------------------------------------------------------------------------------------


def node_rows(api: Api) -> list[dict[str, Any]]:
    """Each node's own word about itself; a row with "error" for those that do not answer."""
    return list(api.get("/v1/nodes")["nodes"])


def is_ready(rows: Iterable[dict[str, Any]]) -> bool:
    """A leader is elected and every node takes work."""
    rows = list(rows)
    return any(row.get("role") == "leader" for row in rows) and all(row.get("takes_work") for row in rows)


def wait_ready(api: Api, timeout_s: float, look: Callable[[], None]) -> list[dict[str, Any]]:
    """Poll until the cluster takes work. ``look`` raises when there is no more hope."""
    deadline = time.monotonic() + timeout_s
    said = "no node answers"
    while True:
        look()
        try:
            rows = node_rows(api)
            if is_ready(rows):
                return rows
            said = (
                ", ".join(_lacks(row) for row in rows if not row.get("takes_work")) or "no leader is elected"
            )
        except CliError as error:
            said = str(error)
        if time.monotonic() > deadline:
            raise CliError(f"the cluster does not take work after {timeout_s:g} s: {said}")
        time.sleep(POLL_S)


def _lacks(row: dict[str, Any]) -> str:
    return f"{row.get('node')} {row.get('error') or 'does not take work yet'}"


class SupervisorLog:
    """Reads on in ``supervisor.log`` from where it stood, to see what a background supervisor meets."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._path = cluster.dir / "supervisor.log"
        self._at = self._path.stat().st_size if self._path.exists() else 0
        self._exits: dict[str, int] = {}

    def refuse_failures(self, process: subprocess.Popen[bytes]) -> None:
        """Raise if the supervisor ended, or a node cannot be started."""
        for event in self._read():
            node = event.get("node", "")
            if event.get("event") in ("failed", "refused"):
                raise CliError(str(event.get("detail")))
            if event.get("event") == "exited":
                self._exits[node] = self._exits.get(node, 0) + 1
                if event.get("exit_code") == BAD_USAGE or self._exits[node] >= 3:
                    raise CliError(
                        f"{node} cannot be started (exit code {event.get('exit_code')}). It said:\n"
                        + output_tail(self._cluster, node)
                    )
        if process.poll() is not None:
            raise CliError(f"the supervisor ended with {process.returncode}; see {self._path}")

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            found = file.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._at += len(whole)
        events = []
        for line in whole.splitlines():
            try:
                events.append(msgspec.json.decode(line, type=dict[str, Any]))
            except msgspec.DecodeError:
                continue  # a traceback: the process's end tells
        return events


def output_tail(cluster: Cluster, node: str) -> str:
    """What the node said last; of its log lines only the bad ones, without their JSON."""
    try:
        text = (cluster.node_dir(node) / "node.log").read_text("utf-8", "replace")
    except OSError:
        return "  (nothing)"
    said: list[str] = []
    for line in text.strip().splitlines():
        try:
            entry = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError:
            said.append(line)
            continue
        if entry.get("level") in ("error", "critical"):
            said.append(f"{entry.get('time')} {entry.get('message')}")
    return "\n".join("  " + line for line in said[-OUTPUT_LINES:]) or "  (nothing)"


# --- down -----------------------------------------------------------------------------------------


def held_locks(cluster: Cluster) -> dict[str, Path]:
    """Who is running, by the locks that are held."""
    locks = {node: cluster.node_lock(node) for node in cluster.peers}
    locks["supervisor"] = cluster.supervisor_lock
    return {name: lock for name, lock in locks.items() if is_held(lock)}


def bring_down(
    cluster: Cluster, timeout_s: float, look: Callable[[dict[str, Path]], None] = lambda held: None
) -> tuple[list[str], list[str]]:
    """Drain all nodes; after the timeout kill those that are left. (stopped, killed of them)."""
    held = held_locks(cluster)
    stopped = sorted(held.keys() - {"supervisor"})
    if "supervisor" in held:
        # It must go first, or it would start again what we stop; it passes the signal on to the nodes.
        signal_holder(held["supervisor"], signal.SIGTERM)
    else:
        for lock in held.values():
            signal_holder(lock, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while held and time.monotonic() < deadline:
        look(held)
        time.sleep(POLL_S)
        held = held_locks(cluster)
    killed = sorted(held.keys() - {"supervisor"})
    # The supervisor first here too.
    for name in sorted(held, key=lambda name: name != "supervisor"):
        signal_holder(held[name], signal.SIGKILL)
    while held_locks(cluster):
        if time.monotonic() > deadline + 10:
            raise CliError(f"still running after SIGKILL: {', '.join(held_locks(cluster))} (a hung disk?)")
        time.sleep(POLL_S)
    return stopped, killed
