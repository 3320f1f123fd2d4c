"""Workers, followers, leaders and everybody killed by SIGKILL or paused, under load; each whole history is judged.

RELIABILITY 2, 9 to 11, 14, 15, 18 and 31.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from chaos import history as h
from dedup.ids import Ids, TaskId, id_text
from node.cli.connection import Api
from node.cli.output import CliError
from tests.support.real_cluster import RealCluster, eventually

PROGRESS_S = 10.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    with RealCluster(tmp_path_factory.mktemp("kills")) as running:
        running.start()
        running.wait_up()
        yield running


class Load:
    """Tasks submitted in the background, in steady batches, until the block ends. All acknowledged."""

    def __init__(self, cluster: RealCluster, batch: int = 20, pause_s: float = 0.05) -> None:
        self._cluster, self._batch, self._pause_s = cluster, batch, pause_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: Exception | None = None
        self.ids: list[Ids] = []

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(20)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        handlers = ("once", "reckon", "drift")
        try:
            while not self._end.wait(self._pause_s):
                handler = handlers[len(self.ids) % 3]
                self.ids.append(self._cluster.submit(handler, count=self._batch))
        except Exception as error:  # noqa: BLE001  # raised again by the block's end
            self._error = error

    def reached(self, tasks: int) -> bool:
        return self.tasks() >= tasks

    def tasks(self) -> int:
        return sum(len(some) for some in list(self.ids))


def progress(cluster: RealCluster, since: int, tasks: int = 100) -> float:
    """Seconds until so many more effects are there."""
    began = time.monotonic()
    eventually(
        f"{tasks} effects more than {since}",
        lambda: len(cluster.sink.read()) >= since + tasks,
        PROGRESS_S,
    )
    return time.monotonic() - began


def all_once(cluster: RealCluster, load: Load) -> None:
    cluster.wait_up()
    cluster.check()
    found = [name for name, _, _ in cluster.sink.read()]
    assert len(found) == len(set(found)) >= load.tasks()


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("handler", ["once", "reckon", "drift"])
def test_a_worker_killed_in_the_effect_costs_that_worker_alone(
    cluster: RealCluster, place: str, handler: str
) -> None:
    pids = {node: cluster.pid(node) for node in cluster.nodes}
    around = cluster.submit(handler, count=30)
    ids = cluster.submit(handler, do=f"{place}:kill_me")
    cluster.check()
    assert cluster.effects_of([*around, *ids]) == [1] * 31
    assert {node: cluster.pid(node) for node in cluster.nodes} == pids


def test_clients_do_not_notice_a_follower_that_is_killed_and_rejoins(cluster: RealCluster) -> None:
    leader = cluster.leader()
    follower = next(node for node in cluster.nodes if node != leader)
    with Load(cluster) as load:
        progress(cluster, len(cluster.sink.read()))
        cluster.kill(follower)
        progress(cluster, len(cluster.sink.read()))
        cluster.start(follower)
        cluster.wait_up()
        progress(cluster, len(cluster.sink.read()))
    all_once(cluster, load)


def test_work_goes_on_after_each_of_three_leaders_was_killed(cluster: RealCluster) -> None:
    resumed = []
    with Load(cluster) as load:
        for _ in range(3):
            leader = cluster.leader()
            progress(cluster, len(cluster.sink.read()))
            cluster.kill(leader)
            resumed.append(progress(cluster, len(cluster.sink.read())))
            cluster.start(leader)
            cluster.wait_up()
    print(f"100 effects after the kill of a leader: {[f'{s:.2f} s' for s in resumed]}")
    all_once(cluster, load)


def test_all_three_nodes_killed_at_once_under_load_go_on_where_they_were(cluster: RealCluster) -> None:
    with Load(cluster) as load:
        for _ in range(2):
            progress(cluster, len(cluster.sink.read()), 300)
            cluster.kill(*cluster.nodes)
            wanted = load.tasks() + 100
            eventually("tasks are submitted while nobody is there", partial(load.reached, wanted))
            cluster.start()
            cluster.wait_up()
    all_once(cluster, load)


@pytest.mark.parametrize("role", ["follower", "leader"])
def test_a_node_paused_beyond_its_lease_comes_back_as_a_zombie_that_does_no_harm(
    cluster: RealCluster, role: str
) -> None:
    with Load(cluster) as load:
        progress(cluster, len(cluster.sink.read()))
        ids = [next(iter(cluster.submit(handler, do="before:wait"))) for handler in ["once"] * 6 + ["reckon"]]
        held = {task_id: cluster.caught(task_id) for task_id in ids}
        leader = cluster.leader()
        by_node = {
            node: [t for t, (_, pid) in held.items() if pid == cluster.pid(node)] for node in cluster.nodes
        }
        paused = (
            leader
            if role == "leader"
            else max((node for node in cluster.nodes if node != leader), key=lambda node: len(by_node[node]))
        )
        session = next(
            row["session"] for row in cluster.api(paused).get("/v1/nodes")["nodes"] if row["node"] == paused
        )
        others = tuple(node for node in cluster.nodes if node != paused)
        cluster.pause(paused)
        try:
            # Its guard kills its workers, before its session can lapse: nothing of it is left that could act.
            for task_id in by_node[paused]:
                eventually(f"the worker of {task_id} is gone", lambda: is_gone(held[task_id][0]))  # noqa: B023
            eventually(
                f"the session {session} of {paused} has lapsed",
                lambda: all(row["session"] != session for row in sessions(cluster, others).values()),
            )
            for task_id in ids:
                cluster.release(task_id)
            progress(cluster, len(cluster.sink.read()))
        finally:
            cluster.signal(paused, signal.SIGCONT)
        cluster.wait_up()
        progress(cluster, len(cluster.sink.read()))
    all_once(cluster, load)
    assert cluster.effects_of(ids) == [1] * len(ids)


def is_gone(pid: int) -> bool:
    """A zombie that its stopped parent cannot reap acts no more either."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def sessions(cluster: RealCluster, nodes: tuple[str, ...]) -> dict[str, dict[str, int]]:
    try:
        return dict(cluster.api(*nodes).get("/v1/nodes")["sessions"])
    except CliError:
        return {"": {"session": -1}}


def test_one_key_submitted_by_many_at_once_runs_once(cluster: RealCluster) -> None:
    first = cluster.submit("once", key="order-1")
    threads = [
        threading.Thread(target=cluster.submit, args=("once",), kwargs={"key": "order-1"}) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    cluster.submit("once", count=5, key="order-1")
    cluster.wait_idle()
    assert cluster.submit("once", key="order-1") == first
    cluster.check()
    assert cluster.effects_of(first) == [1]


def test_the_same_ids_sent_again_after_an_unknown_outcome_run_once(cluster: RealCluster) -> None:
    client = cluster.client
    ids = cluster.submit("once", count=200)
    bodies = [b'{"name": "same"}'] * 200
    for _ in range(3):
        assert client.send("real.once", bodies, ids=ids) == ids
    cluster.check()
    assert cluster.effects_of(ids) == [1] * 200


def test_what_was_acknowledged_as_cancelled_never_starts(cluster: RealCluster) -> None:
    api = cluster.api()
    # All workers for this kind are busy, so that much waits; in the midst of the cancelling they go on.
    busy = [next(iter(cluster.submit("reckon", do="before:wait"))) for _ in range(36)]
    eventually("every node has one that waits", lambda: len(cluster.caught_by(busy)) == len(cluster.nodes))
    ids = list(cluster.submit("reckon", count=300))
    outcomes: list[bool] = []
    for number, task_id in enumerate(ids):
        if number == 50:
            for each in busy:
                cluster.release(each)
        outcomes.append(cancel(cluster, api, task_id))
    cluster.check()
    assert cluster.effects_of(ids) == [0 if cancelled else 1 for cancelled in outcomes]
    print(f"{sum(outcomes)} of {len(outcomes)} were cancelled in time")


def cancel(cluster: RealCluster, api: Api, task_id: TaskId) -> bool:
    try:
        api.post(f"/v1/tasks/{id_text(task_id)}/cancel", {"by": "test"})
    except CliError as error:
        if error.details.get("status") != 409:
            raise
        return False
    cluster.history.cancels.append(h.CancelTold(task_id))
    return True
