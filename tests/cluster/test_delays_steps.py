"""A node that dies at any step of keeping or starting delayed tasks: nothing is lost, nothing runs twice."""

from __future__ import annotations

import json
import time
from pathlib import Path

from node.config import DELAY_STEPS
from tests.support.real_cluster import RealCluster, eventually

NODES = ("n1", "n2", "n3")


def submit(cluster: RealCluster, count: int, due_in_ms: int) -> None:
    bodies = [json.dumps({"name": cluster.name()}).encode() for _ in range(count)]
    due_ms = time.time_ns() // 1_000_000 + due_in_ms
    ids = cluster.client.send("real.once", bodies, due_ms=due_ms)
    cluster.acknowledged(ids, "once")


def test_each_step_may_be_a_nodes_last(tmp_path: Path) -> None:
    with RealCluster(tmp_path) as cluster:
        cluster.start("n2", "n3")
        for step in DELAY_STEPS:
            cluster.start("n1", crash_at=step)
            # What the step before has left may take it there before anybody has seen it up.
            eventually(
                "n1 is up, or gone", lambda: "n1" not in cluster.running() or cluster.all_take_work(), 60
            )
            for _ in range(12):  # a batch rests in one partition: so some are in those of n1
                submit(cluster, 3, 2_500)
            eventually(f"n1 has died at {step}", lambda: "n1" not in cluster.running(), 40)
        cluster.start("n1")
        cluster.wait_up()
        cluster.check()
