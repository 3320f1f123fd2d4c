"""No-op tasks from ``submit_many`` to the last settlement, each effect counted; and bulk submits alone."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from node.bench import app as bench_app
from node.bench.app import EFFECTS, NUMBER
from node.bench.measure import Plan, Row, median, rounded
from node.bench.nodes import Nodes, running_nodes
from node.bench.processes import cpu_by_kind
from node.cli.output import CliError
from oncekeeper import Client

POLL_S = 0.002
STALL_S_MAX = 20.0
KINDS = ("client", "nodes", "workers")
BULK_TASKS_S, BULK_PART = 150_000, 0.7

VARIANTS = {
    "rerun": "no-op tasks, on_doubt=rerun",
    "check": "no-op tasks, on_doubt=check",
    "keyed": "no-op tasks with idempotency keys",
    "threads": "no-op tasks on threads (kind=io)",
}


class Inexact(CliError):
    """Tasks were lost, or took effect twice: no figure counts after that."""


class Throughput:
    """Rounds on one cluster; the numbers of the tasks go on from round to round."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._path = bench_app.home() / EFFECTS
        self._next = 0

    def round(self, variant: str, count: int) -> dict[str, Any]:
        first, self._next = self._next, self._next + count
        task = {"check": bench_app.checked, "threads": bench_app.threaded}.get(variant, bench_app.rerun)
        items = [{"number": number} for number in range(first, first + count)]
        keys = [f"order-{number}" for number in range(first, first + count)] if variant == "keyed" else None
        settled = self._nodes.settled()
        pids = list(self._nodes.pids.values())
        before = cpu_by_kind(pids)
        began = time.perf_counter()
        task.submit_many(items, keys=keys)
        submitted = time.perf_counter()
        self._until(lambda: self._effects(), first + count, "effects")
        effected = time.perf_counter()
        self._until(self._nodes.settled, settled + count, "settled tasks")
        ended = time.perf_counter()
        used = cpu_by_kind(pids)
        self._count(first, count)
        return {
            "tasks": count,
            "tasks_s": round(count / (ended - began)),
            "submit_s": round(submitted - began, 3),
            "effects_s": round(effected - began, 3),
            "settled_s": round(ended - began, 3),
            "cpu_us_a_task": {kind: round((used[kind] - before[kind]) * 1e6 / count, 2) for kind in KINDS},
        }

    def _effects(self) -> int:
        try:
            return os.stat(self._path).st_size // NUMBER.size
        except FileNotFoundError:
            return 0

    def _until(self, count: Any, wanted: int, what: str) -> None:
        moved, standing = time.monotonic(), -1
        while (found := count()) < wanted:
            if found != standing:
                moved, standing = time.monotonic(), found
            elif time.monotonic() - moved > STALL_S_MAX:
                raise CliError(f"{found} {what} of {wanted}, and nothing has moved for {STALL_S_MAX:g} s")
            self._nodes.refuse_ends()
            time.sleep(POLL_S)

    def _count(self, first: int, count: int) -> None:
        """Each number of the round once, and nothing else."""
        numbers = array("Q")
        with self._path.open("rb") as file:
            file.seek(first * NUMBER.size)
            numbers.frombytes(file.read())
        distinct = set(numbers)
        lost = count - len(distinct & set(range(first, first + count)))
        if lost or len(numbers) != count:
            raise Inexact(
                f"{count} tasks had {len(numbers)} effects, of them {len(distinct)} distinct; {lost} were lost"
            )


def throughput(plan: Plan, nodes: Nodes, bare: dict[str, float]) -> list[Row]:
    rows = []
    bench_app.app.use(Client(nodes.cluster.dir))
    try:
        runs = Throughput(nodes)
        runs.round("rerun", max(1, plan.tasks // 10))  # caches, ids and pace are warm in every round alike
        for variant, what in VARIANTS.items():
            count = plan.tasks if variant in ("rerun", "check") else max(1, plan.tasks // 2)
            rounds = [runs.round(variant, count) for _ in range(plan.rounds)]
            rows.append(_row(plan, variant, what, rounds, bare))
    finally:
        bench_app.app.client.close()
        bench_app.app.use(None)
    return rows


def _row(
    plan: Plan, variant: str, what: str, rounds: Sequence[dict[str, Any]], bare: dict[str, float]
) -> Row:
    rate = median([each["tasks_s"] for each in rounds])
    cpu = {kind: median([each["cpu_us_a_task"][kind] for each in rounds]) for kind in KINDS}
    shares = ", ".join(f"{kind} {us:.1f}" for kind, us in cpu.items())
    judged = variant in ("rerun", "check")
    goal, least = plan.reaches.tasks_s, plan.reaches.tasks_least_s
    reach = f"{goal:,}/s" if goal == least else f"{goal:,}/s; at least {least:,}/s"
    beside = f"{bare['effects_s']:,.0f} bare effects/s by one process"
    if plan.is_kafka:
        beside = f"{bare['kafka_produce_s']:,.0f} produced, {bare['kafka_consume_s']:,.0f} consumed/s, bare"
    return Row(
        "tasks",
        f"{what}, exactly once, 3 nodes",
        reach if judged else "",
        f"{rate:,.0f}/s; CPU µs a task: {shares}",
        rate >= goal if judged else None,
        beside,
        {"rounds": list(rounds), "tasks_s": rate, "cpu_us_a_task": cpu},
    )


def bulk(plan: Plan, bare: dict[str, float]) -> Row:
    """Submits to a node that gives out ids and takes no work: the client and the disk alone."""
    task = bench_app.rerun
    items = [{"number": number} for number in range(plan.bulk_tasks)]
    rates, beside = [], []
    with (
        running_nodes(plan.home / "bulk", 1, {"consumes": False}, log=plan.log_of("bulk")) as nodes,
        _bare_producing(plan) as produce,
        Client(nodes.cluster.dir) as client,
    ):
        nodes.lead()
        bench_app.app.use(client)
        try:
            task.submit_many(items[:1000])
            if produce is not None:
                task.submit_many(items)  # a producer of its own has just begun, too
            for _ in range(plan.rounds):
                began = time.perf_counter()
                task.submit_many(items)
                rates.append(plan.bulk_tasks / (time.perf_counter() - began))
                if produce is not None:
                    beside.append(produce())
        finally:
            bench_app.app.use(None)
    rate = median(rates)
    samples = {"tasks_s": rounded(rates, 0), "tasks": plan.bulk_tasks}
    if plan.is_kafka:
        part = median([rate / other for rate, other in zip(rates, beside, strict=True)])
        return Row(
            "submit",
            "submit, bulk, acks=all",
            f"{BULK_PART:.0%} of a bare produce loop",
            f"{rate:,.0f}/s: {part:.0%}",
            part >= BULK_PART,
            f"{median(beside):,.0f} records/s by a bare produce loop, in turn",
            samples | {"bare_s": rounded(beside, 0)},
        )
    return Row(
        "submit",
        "submit, bulk, durable",
        f"{BULK_TASKS_S:,}/s",
        f"{rate:,.0f}/s",
        rate >= BULK_TASKS_S,
        f"{bare['sqlite_rows_s']:,.0f} durable SQLite rows/s",
        samples,
    )


@contextmanager
def _bare_producing(plan: Plan) -> Iterator[Callable[[], float] | None]:
    """On Kafka a loop to compare with in turn: a broker gets faster as it runs, and others run beside it."""
    if not plan.is_kafka:
        yield None
        return
    from node.bench.kafka import bare_producing

    with bare_producing(plan) as produce:
        yield produce
