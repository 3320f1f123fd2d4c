"""Figures of three replicas on this machine.

``python -m tests.support.raft_bench [tls] [latency] [rate] [failover] [idle]``
Every figure includes fdatasync on a majority. ``ONCEKEEPER_TEST_LOOP=uvloop`` measures with uvloop.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.support.raft_cluster import Cluster, Process, eventually


def percentiles(times: list[float]) -> str:
    return f"p50 {times[len(times) // 2]:.2f} p99 {times[int(len(times) * 0.99)]:.2f} max {times[-1]:.2f}"


def latency(cluster: Cluster) -> None:
    leader = cluster.leader()
    for role, name in (("leader", leader), ("follower", cluster.follower())):
        times = cluster.nodes[name].ask("latency", count=1000, gap_s=0.002)
        print(f"one durable command from the {role}, ms: {percentiles(times)}", flush=True)


def rate(cluster: Cluster) -> None:
    for role, name in (("leader", cluster.leader()), ("follower", cluster.follower())):
        node = cluster.nodes[name]
        for size, count, depth in ((16, 60_000, 1000), (8000, 10_000, 200)):
            before = cpu_s(cluster)
            reached = node.ask("rate", count=count, size=size, depth=depth, wait_s=60)
            # The rate is the machine's mood too; what a command costs is not.
            cost_us = (cpu_s(cluster) - before) / count * 1e6
            print(
                f"commands/s of {size} bytes from the {role}: {reached:,.0f}; {cost_us:.1f} us of CPU each, "
                "all three together",
                flush=True,
            )


def cpu_s(cluster: Cluster) -> float:
    return sum(float(node.ask("status")["cpu_s"]) for node in cluster.alive)


def first_accepted(nodes: list[Process]) -> None:
    """Every survivor proposes; the first answer counts."""
    waiting = [node.begin("propose", payload="after", timeout_ms=10_000) for node in nodes]
    eventually("a survivor accepts", lambda: any(not answers.empty() for answers in waiting))
    answer = next(answers.get() for answers in waiting if not answers.empty())
    assert answer[0] == "Applied", answer


def failover(cluster: Cluster, kills: int = 20) -> None:
    times = []
    for _ in range(kills):
        name = cluster.leader()
        eventually("all are ready", lambda: all(node.ask("status")["ready"] for node in cluster.alive))
        started = time.perf_counter()
        cluster.kill(name)
        first_accepted(cluster.alive)
        times.append((time.perf_counter() - started) * 1000)
        cluster.start(name)
    times.sort()
    print(f"leader kill -9 to the next accepted command, {kills} kills, ms: p50 {statistics.median(times):.0f} "
          f"max {times[-1]:.0f} {[round(t) for t in times]}", flush=True)  # fmt: skip


def idle(cluster: Cluster, seconds: float = 10.0) -> None:
    cluster.leader()
    before = {node.name: node.ask("status") for node in cluster.alive}
    time.sleep(seconds)
    for node in cluster.alive:
        now = node.ask("status")
        used = (now["cpu_s"] - before[node.name]["cpu_s"]) / seconds * 100
        print(f"at rest, {now['role']}: {used:.2f} % of a core", flush=True)


def main() -> None:
    tls = "tls" in sys.argv
    chosen = [word for word in sys.argv[1:] if word != "tls"] or ["latency", "rate", "idle", "failover"]
    with tempfile.TemporaryDirectory() as directory, Cluster(Path(directory), tls=tls) as cluster:
        for name in chosen:
            {"latency": latency, "rate": rate, "failover": failover, "idle": idle}[name](cluster)


if __name__ == "__main__":
    main()
