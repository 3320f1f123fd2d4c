"""From submit to start on an idle cluster, and what a cluster without work costs."""

from __future__ import annotations

import time
from pathlib import Path

from node.bench import app as bench_app
from node.bench.app import START, STARTS
from node.bench.measure import Plan, Row, percentile, rounded, spread
from node.bench.nodes import Nodes
from node.bench.processes import Memory, cpu_s, kinds, memory
from node.cli.output import CliError
from oncekeeper import Client

REST_PERCENT, REST_MB = 1.0, 150.0
SETTLE_S = 2.0  # after the last work, until a cluster is at rest
WAIT_S_MAX = 20.0


def read_starts(path: Path) -> list[tuple[int, int, int]]:
    """(number, sent_ns, started_ns) of all that started."""
    if not path.exists():
        return []
    content = path.read_bytes()
    return list(START.iter_unpack(content[: len(content) // START.size * START.size]))


def starts(plan: Plan, nodes: Nodes, bare: dict[str, float]) -> list[Row]:
    rows = []
    bench_app.app.use(Client(nodes.cluster.dir))
    try:
        for kind in ("io", "cpu"):
            rows.append(_starts_of(kind, plan, bare))
    finally:
        bench_app.app.client.close()
        bench_app.app.use(None)
    return rows


def _starts_of(kind: str, plan: Plan, bare: dict[str, float]) -> Row:
    """One task at a time at a steady pace. The stamp is taken before ``submit``: its fsync counts."""
    task = bench_app.start_io if kind == "io" else bench_app.start_cpu
    path = bench_app.home() / STARTS
    before = len(read_starts(path))
    warm = plan.latency_per_s // 4
    count = warm + int(plan.latency_s * plan.latency_per_s)
    submit_ms = []
    due = time.monotonic()
    for number in range(count):
        due += 1 / plan.latency_per_s
        time.sleep(max(0.0, due - time.monotonic()))
        sent_ns = time.monotonic_ns()
        task.submit(number, sent_ns)
        submit_ms.append((time.monotonic_ns() - sent_ns) / 1e6)
    deadline = time.monotonic() + WAIT_S_MAX
    while len(found := read_starts(path)) < before + count:
        if time.monotonic() > deadline:
            raise CliError(f"{len(found) - before} of {count} tasks have started after {WAIT_S_MAX:g} s")
        time.sleep(0.02)
    ms = [(started - sent) / 1e6 for number, sent, started in found[before:] if number >= warm]
    p50, p99 = percentile(ms, 0.5), percentile(ms, 0.99)
    reach = plan.reaches
    return Row(
        "latency",
        f"submit → start (kind={kind}), idle cluster, {plan.latency_per_s}/s",
        f"p50 ≤ {reach.start_p50_ms:g} ms, p99 ≤ {reach.start_p99_ms:g} ms",
        f"p50 {p50:.2f} ms, p99 {p99:.2f} ms (submit itself p50 {percentile(submit_ms, 0.5):.2f} ms)",
        p50 <= reach.start_p50_ms and p99 <= reach.start_p99_ms,
        f"produced, confirmed and consumed, bare: {1000 / bare['kafka_hops_s']:.2f} ms"
        if plan.is_kafka
        else f"2 fsyncs one after the other: {2000 / bare['fsyncs_s']:.2f} ms",
        {"ms": rounded(ms), **spread(ms), "submit_ms": spread(submit_ms)},
    )


def at_rest(plan: Plan, nodes: Nodes) -> list[Row]:
    """CPU and memory of every node with its guard (its workers' second parent), and of its workers apart."""
    time.sleep(SETTLE_S)
    roles = {row["node"]: row["role"] for row in nodes.rows()}
    parts = {name: kinds([pid]) for name, pid in nodes.pids.items()}
    before = {pid: cpu_s(pid) for part in parts.values() for pids in part.values() for pid in pids}
    began = time.monotonic()
    time.sleep(plan.rest_s)
    elapsed = time.monotonic() - began
    samples = {}
    for name, part in parts.items():
        percent = {
            kind: sum(cpu_s(pid) - before[pid] for pid in pids) / elapsed * 100 for kind, pids in part.items()
        }
        own = sum((memory(pid) for pid in part["nodes"] + part["guards"]), Memory(0, 0))
        workers = sum((memory(pid) for pid in part["workers"]), Memory(0, 0))
        samples[name] = {
            "role": roles[name],
            "cpu_percent": {kind: round(value, 2) for kind, value in percent.items()},
            "node_and_guard": own.document(),
            "workers": workers.document(),
        }
    used = {name: sum(sample["cpu_percent"].values()) for name, sample in samples.items()}
    rss = {name: sample["node_and_guard"]["rss_mb"] for name, sample in samples.items()}
    shown = ", ".join(f"{used[name]:.1f} % ({samples[name]['role']})" for name in samples)
    workers_mb = max(sample["workers"]["rss_mb"] for sample in samples.values())
    return [
        Row(
            "rest",
            "a node at rest: CPU of a core, workers included",
            f"≤ {REST_PERCENT:g} %",
            shown,
            max(used.values()) <= REST_PERCENT,
            "",
            samples,
        ),
        Row(
            "rest",
            "a node at rest: memory, with its workers' parent",
            f"≤ {REST_MB:g} MB",
            f"{max(rss.values()):.0f} MB RSS; its workers {workers_mb:.0f} MB more",
            max(rss.values()) <= REST_MB,
            "",
            {name: sample["node_and_guard"] for name, sample in samples.items()},
        ),
    ]
