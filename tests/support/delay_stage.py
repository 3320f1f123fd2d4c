"""A real cluster with delayed tasks, whose nodes' wall clocks can be bent and whose Raft links can be cut.

When each task began is known by a clock that nobody bends, and what each node's wall clock showed at any moment
is known too, because it was told here. So "never early by the clock of the node that ran it" is arithmetic.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from chaos.faults import Fault
from chaos.scenarios.links import Links
from chaos.shim import Shim
from chaos.toxiproxy import Toxiproxy
from dedup.ids import Ids, TaskId, id_text, parse_id
from oncekeeper.cluster import tls_context
from oncekeeper.envelope import time_text
from oncekeeper.log.delayed import ENQUEUE
from tests.support.real_cluster import RealCluster, eventually
from tests.support.stamps import Stamp, boot_ns, read_stamps
from tests.support.watched_schedule import Watched, wall_ms

ROOT = Path(__file__).resolve().parents[2]
HOUR_MS = 3_600_000
FAR_MS = HOUR_MS // 2
"""Later than any test takes: what is due then falls due when the clocks are set (``Stage.fall_due``)."""
FOREVER = 1 << 63
APP = "tests.support.stamped_app:app"
DUE_TASKS = int(os.environ.get("ONCE_TEST_DUE_TASKS", "2000"))
"""Pending when something happens. 100,000 take a while."""
LONG = bool(os.environ.get("ONCE_TEST_LONG"))
"""Whether there is time for what takes a minute."""


def _wall_at_boot_ns() -> int:
    return time.time_ns() - boot_ns()


@dataclass(frozen=True)
class Wait:
    """What a task waits for: what a clock showed before it was told does not count."""

    due_ms: int
    then: str
    told_ns: int


class Stage:
    def __init__(self, cluster: RealCluster, folder: Path, proxies: Toxiproxy) -> None:
        self.cluster = cluster
        self.links = Links(cluster.cluster, proxies)
        self._shims = {node: Shim(folder, node) for node in cluster.nodes}
        # Of each node its wall clock's offsets: from when (at the earliest), until when (at the latest), and ms.
        self._clocks: dict[str, list[tuple[int, int, int]]] = {n: [(0, FOREVER, 0)] for n in cluster.nodes}
        self._node_of: dict[int, str] = {}
        self._base_ns = _wall_at_boot_ns()
        self.dues: dict[TaskId, Wait] = {}

    def start(self, *nodes: str, crash_at: str = "") -> None:
        for node in nodes or self.cluster.nodes:
            self.cluster.start(node, crash_at=crash_at, env=self._shims[node].environment)
            self._node_of[self.cluster.pid(node)] = node

    def restart(self, *nodes: str) -> None:
        self.cluster.kill(*nodes)
        self.start(*nodes)

    # --- clocks ---------------------------------------------------------------------------------------------

    def bend(self, offsets_ms: Mapping[str, int]) -> None:
        """From now on these nodes' wall clocks are off by so much."""
        for node, offset_ms in offsets_ms.items():
            clocks, before_ns = self._clocks[node], boot_ns()
            self._shims[node].tell(wall_ns=offset_ms * 1_000_000)
            from_ns, _, former_ms = clocks.pop()
            clocks += [(from_ns, boot_ns(), former_ms), (before_ns, FOREVER, offset_ms)]

    def bend_all(self, offset_ms: int) -> None:
        self.bend(dict.fromkeys(self.cluster.nodes, offset_ms))

    def fall_due(self, due_ms: int, in_ms: int = 0) -> None:
        """Set all clocks so that this time comes so soon. It takes no longer to come on a slow machine."""
        self.bend_all(due_ms - in_ms - wall_ms())

    def clock_ms(self, node: str) -> int:
        return wall_ms() + self._clocks[node][-1][2]

    def showed(self, node: str, due_ms: int, since_ns: int) -> int:
        """The first moment (of ``boot_ns``) at which this node's wall clock showed that time, or a later one."""
        base_ns = max(
            self._base_ns, _wall_at_boot_ns()
        )  # the machine's own clock may be disciplined meanwhile
        for from_ns, until_ns, offset_ms in self._clocks[node]:
            seen_ns = max(from_ns, since_ns, (due_ms - offset_ms) * 1_000_000 - base_ns)
            if seen_ns < until_ns:
                return seen_ns
        return FOREVER

    def showed_anywhere(self, due_ms: int, since_ns: int) -> int:
        return min(self.showed(node, due_ms, since_ns) for node in self.cluster.nodes)

    # --- tasks ----------------------------------------------------------------------------------------------

    def submit(self, count: int, due_ms: int, then: str = "") -> Ids:
        at_ns = boot_ns()
        bodies = [json.dumps({"name": self.cluster.name()}).encode() for _ in range(count)]
        ids = self.cluster.client.send("real.stamp", bodies, due_ms=due_ms, then=then)
        self._told(ids, Wait(due_ms, then, at_ns))
        return ids

    def submit_one(self, due_ms: int) -> TaskId:
        (task_id,) = self.submit(1, due_ms)
        return task_id

    def submit_to(self, node: str, count: int, due_ms: int) -> list[TaskId]:
        """By this node, and as of its wall clock."""
        at_ns, due = boot_ns(), time_text(due_ms)
        tasks = [
            {"handler": "real.stamp", "body": {"name": self.cluster.name()}, "due": due} for _ in range(count)
        ]
        ids = [parse_id(each) for each in self.cluster.api(node).post("/v1/tasks", {"tasks": tasks})["ids"]]
        self._told(ids, Wait(due_ms, "", at_ns))
        return ids

    def _told(self, ids: Iterable[TaskId], wait: Wait) -> None:
        ids = list(ids)
        self.cluster.acknowledged(ids, "stamp")
        self.dues |= dict.fromkeys(ids, wait)

    def wait_kept(self, tasks: int) -> None:
        """Until so many wait in the store, and nothing is on its way there."""

        def kept() -> bool:
            status = self.cluster.status()
            if status is None or status["tasks"]["delayed"] != tasks:
                return False
            return all(row["committed"] == row["end"] for row in status["partitions"])

        eventually(f"{tasks} are kept", kept, 120)

    def kept_of(self) -> dict[str, int]:
        """How many wait in the store for each node."""
        found = dict.fromkeys(self.cluster.nodes, 0)
        for row in self.cluster.api().get("/v1/status")["partitions"]:
            found[row["owner"]] += row["delayed"]
        return found

    def owner_of(self, task_id: TaskId) -> str | None:
        log = self.cluster.open_log()
        try:
            (place,) = log.find(task_id)
        finally:
            log.close()
        return self.owners()[place.partition]

    def owners(self, *nodes: str) -> dict[int, str | None]:
        status = self.cluster.api(*nodes).get("/v1/status")
        return {row["partition"]: row["owner"] for row in status["partitions"]}

    def post(self, node: str, path: str, body: object) -> httpx.Response:
        """This one node's answer."""
        cluster = self.cluster.client.cluster
        told = {"authorization": f"Bearer {cluster.token}"}
        with httpx.Client(verify=tls_context(cluster.ca), trust_env=False, timeout=30) as http:
            return http.post(
                f"https://{self.cluster.cluster.peers[node].http}{path}", json=body, headers=told
            )

    def reschedule(self, task_id: TaskId, due_ms: int, node: str) -> int | None:
        """What this one node answered; None: it died. Where nobody knows, either time may be the task's."""
        known, at_ns = self.dues[task_id], boot_ns()
        path = f"/v1/tasks/{id_text(task_id)}/reschedule"
        try:
            status = self.post(node, path, {"due": time_text(due_ms)}).status_code
        except httpx.TransportError:
            status = None
        if status == 200:
            self.dues[task_id] = Wait(due_ms, known.then, at_ns)
        elif status not in (404, 409):
            self.dues[task_id] = Wait(min(known.due_ms, due_ms), known.then, known.told_ns)
        return status

    # --- what became of them ----------------------------------------------------------------------------------

    def stamps(self) -> list[Stamp]:
        return read_stamps(self.cluster.home)

    def started(self, ids: Iterable[TaskId]) -> dict[TaskId, list[Stamp]]:
        wanted: dict[str, TaskId] = {id_text(each): each for each in ids}
        found: dict[TaskId, list[Stamp]] = {each: [] for each in wanted.values()}
        for each in self.stamps():
            if each.id in wanted:
                found[wanted[each.id]].append(each)
        return found

    def count(self, ids: Iterable[TaskId]) -> int:
        """How many of them have begun."""
        return sum(bool(stamps) for stamps in self.started(ids).values())

    def wait_started(self, ids: Sequence[TaskId] | Ids, seconds: float = 60.0) -> None:
        eventually(f"all {len(ids)} begin", lambda: self.count(ids) == len(ids), seconds)

    def node_of(self, stamp: Stamp) -> str:
        return self._node_of[stamp.node_pid]

    def early(self) -> list[str]:
        """Whatever began before the clock of the node that decided it showed that it was due."""
        found = []
        for task_id, stamps in self.started(self.dues).items():
            for each in stamps:
                node = self.node_of(each)
                from_ns = self._may_start(task_id, node)
                if each.boot_ns < from_ns:
                    found.append(f"{task_id} on {node}: {(from_ns - each.boot_ns) / 1e6:.1f} ms early")
        return found

    def _may_start(self, task_id: TaskId, node: str) -> int:
        wait = self.dues[task_id]
        if wait.then == ENQUEUE:  # who decides that it is due need not be who runs it
            return self.showed_anywhere(wait.due_ms, wait.told_ns)
        return self.showed(node, wait.due_ms, wait.told_ns)

    def early_firings(self, watched: Watched) -> list[str]:
        """Whatever a schedule fired before any node's clock showed its time."""
        times = watched.times()
        return [
            f"{watched.name} for {times[each.id]}"
            for each in self.stamps()
            if each.id in times and each.boot_ns < self.showed_anywhere(times[each.id], watched.put_ns)
        ]

    def late_ms(self, ids: Iterable[TaskId]) -> list[float]:
        """How long each began after the first clock showed its time, ascending."""
        return sorted(
            (stamps[0].boot_ns - self.showed_anywhere(wait.due_ms, wait.told_ns)) / 1e6
            for task_id, stamps in self.started(ids).items()
            if stamps and (wait := self.dues[task_id])
        )

    def check(self) -> None:
        """All that was submitted is done, the whole history is right, nothing was early. Clocks are set right."""
        self.bend_all(0)
        self.cluster.check()
        early = self.early()
        assert not early, early[:10]

    # --- links ----------------------------------------------------------------------------------------------

    def cut_off(self, node: str) -> Fault:
        others = [each for each in self.cluster.nodes if each != node]
        return self.links.cut(f"{node} cut off", [(node, each) for each in others])


@contextmanager
def proxies(folder: Path) -> Iterator[Toxiproxy]:
    found = subprocess.run([ROOT / "tools" / "get-toxiproxy"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    server = Toxiproxy(Path(found.stdout.strip()), folder / "toxiproxy.log")
    try:
        yield server
    finally:
        server.close()


@contextmanager
def staged(cluster: RealCluster, folder: Path) -> Iterator[Stage]:
    """All nodes run, and take work."""
    with proxies(folder) as server, cluster:
        stage = Stage(cluster, folder, server)
        stage.start()
        cluster.wait_up()
        yield stage
