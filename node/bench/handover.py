"""On Kafka: what was done already and comes again, and partitions whose node leaves.

*Duplicates*: a node has run all of a topic; it is stopped, every position is set back to 0 (what a person can do
with Kafka's own tools), and it is started again. The clock runs from its first step to its last; nothing may take
effect again.

*Leaving*: tasks are submitted at a steady pace, in turn to every partition. A node is told to stop. What counts is
how long any task that was submitted from then on waited for its start: the tasks of the partitions that moved
waited longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from node.bench import app as bench_app
from node.bench.app import EFFECTS, NUMBER, STARTS
from node.bench.failover import Trickle
from node.bench.kafka import PARTITIONS, effects, rewind
from node.bench.latency import read_starts
from node.bench.measure import Plan, Row, median, percentile, rounded, spread
from node.bench.nodes import Nodes, running_nodes
from node.bench.throughput import Inexact
from node.cli.output import CliError
from oncekeeper import Client

DUPLICATES_S, LEAVE_S = 200_000, 1.0
SUBMIT_TASKS = 50_000
LOOK_S = 0.01
STALL_S_MAX = 60.0
STEADY_S = 1.0
AFTER_S = 1.0  # submits go on for so long after the node has ended


def duplicates(plan: Plan, bare: dict[str, float]) -> list[Row]:
    rows = []
    for kind, reach in (("range", f"{DUPLICATES_S:,}/s a node"), ("keyed", "")):
        count = plan.duplicates if kind == "range" else plan.duplicates // 2
        log = plan.log_of(f"again-{kind}")
        with running_nodes(plan.home / f"again-{kind}", 1, log=log) as nodes:
            nodes.ready()
            _run_all(nodes, count, kind == "keyed")
            rates = [_again(nodes, str(log["log"]), count) for _ in range(plan.rounds)]
        rate = median(rates)
        rows.append(
            Row(
                "duplicates",
                f"{count:,} executed tasks with {kind} ids come again, and are discarded by one node",
                reach,
                f"{rate:,.0f}/s",
                rate >= DUPLICATES_S if reach else None,
                f"{bare['kafka_consume_s']:,.0f} records/s by a bare consume loop",
                {"tasks_s": rounded(rates, 0), "tasks": count},
            )
        )
    return rows


def _run_all(nodes: Nodes, count: int, keyed: bool) -> None:
    path = bench_app.home() / EFFECTS
    path.unlink(missing_ok=True)
    with Client(nodes.cluster.dir) as client:
        bench_app.app.use(client)
        try:
            for first in range(0, count, SUBMIT_TASKS):
                numbers = range(first, min(first + SUBMIT_TASKS, count))
                keys = [f"again-{number}" for number in numbers] if keyed else None
                bench_app.rerun.submit_many([{"number": number} for number in numbers], keys=keys)
        finally:
            bench_app.app.use(None)
    _until(nodes, nodes.settled, count)


def _again(nodes: Nodes, url: str, count: int) -> float:
    """Tasks a second, from before the first step of the node's positions to the last."""
    (name,) = nodes.pids
    nodes.leave(name)
    rewind(url, PARTITIONS)
    nodes.start(name)
    nodes.ready()
    began = time.perf_counter()

    def passed() -> int:
        nonlocal began
        asked = time.perf_counter()
        found = nodes.passed()
        if not found:
            began = asked  # the last look that saw none
        return found

    _until(nodes, passed, count)
    seconds = time.perf_counter() - began
    found = effects(bench_app.home() / EFFECTS, NUMBER.size)
    if found != count or nodes.settled():
        raise Inexact(f"{count} tasks had {found} effects after they came again")
    return count / seconds


def _until(nodes: Nodes, reads: Callable[[], int], wanted: int) -> None:
    moved, standing = time.monotonic(), -1
    while (found := reads()) < wanted:
        if found != standing:
            moved, standing = time.monotonic(), found
        elif time.monotonic() - moved > STALL_S_MAX:
            raise CliError(f"{found} tasks of {wanted}, and nothing has moved for {STALL_S_MAX:g} s")
        nodes.refuse_ends()
        time.sleep(LOOK_S)


def leaving(plan: Plan, nodes: Nodes) -> list[Row]:
    clean = [_leave(nodes, name, nodes.leave) for name in _in_turn(nodes, plan.leaves)]
    killed = [_leave(nodes, name, nodes.kill) for name in _in_turn(nodes, plan.crashes)]
    worst = max(clean)
    return [
        Row(
            "leave",
            f"a node leaves cleanly → its partitions run elsewhere: the longest wait, {plan.leaves} times",
            f"≤ {LEAVE_S:g} s",
            f"p50 {percentile(clean, 0.5):.2f} s, max {worst:.2f} s",
            worst <= LEAVE_S,
            "",
            {"s": rounded(clean), **spread(clean)},
        ),
        Row(
            "leave",
            f"a node is killed → its partitions run elsewhere: the longest wait, {plan.crashes} times",
            "",
            f"p50 {percentile(killed, 0.5):.2f} s, max {max(killed):.2f} s",
            None,
            "the broker's session timeout for members",
            {"s": rounded(killed), **spread(killed)},
        ),
    ]


def _in_turn(nodes: Nodes, count: int) -> list[str]:
    names = list(nodes.cluster.peers)
    return [names[turn % len(names)] for turn in range(count)]


def _leave(nodes: Nodes, name: str, go: Callable[[str], None]) -> float:
    """The longest that a task waited which was submitted from the moment on at which ``name`` had to go."""
    path = bench_app.home() / STARTS
    nodes.ready()
    nodes.shared()
    skip = len(read_starts(path))
    with Trickle(nodes) as trickle:
        time.sleep(STEADY_S)
        went_ns = time.monotonic_ns()
        go(name)
        time.sleep(AFTER_S)
        wanted = trickle.submitted
        deadline = time.monotonic() + STALL_S_MAX
        while len({number for number, _, _ in read_starts(path)[skip:] if number < wanted}) < wanted:
            if time.monotonic() > deadline:
                raise CliError(
                    f"after {STALL_S_MAX:g} s without {name}, some of {wanted} tasks have not started"
                )
            time.sleep(LOOK_S * 10)
        found = read_starts(path)[skip:]
    nodes.start(name)
    return max(started - sent for number, sent, started in found if went_ns <= sent and number < wanted) / 1e9
