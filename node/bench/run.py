"""All rows, in the order in which they disturb each other least, and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from node.bench.bare import bare_limits
from node.bench.commands import commands
from node.bench.delays import delays
from node.bench.failover import failover
from node.bench.latency import at_rest, starts
from node.bench.measure import Plan, Row, environment
from node.bench.memory import executed_set
from node.bench.nodes import Nodes, running_nodes
from node.bench.processes import load, machine
from node.bench.throughput import bulk, throughput
from node.kafkaup.trial import trial_log

GROUPS = {
    "submit": "bulk durable submit",
    "tasks": "no-op tasks end to end",
    "latency": "submit to start",
    "rest": "a node at rest",
    "delays": "delayed tasks",
    "failover": "leader kill -9",
    "command": "one durable ledger command",
    "memory": "the executed set at its full size",
}
ON_KAFKA = {
    "submit": "bulk submit, acknowledged by all",
    "tasks": GROUPS["tasks"],
    "duplicates": "duplicates discarded",
    "latency": GROUPS["latency"],
    "delays": GROUPS["delays"],
    "leave": "a node leaves",
}
FORMAT = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    plan: Plan
    bare: dict[str, float]
    rows: list[Row]
    load: tuple[float, float]  # of the machine, before and after
    wall_s: float

    def document(self) -> dict[str, Any]:
        plan = {key: value for key, value in dataclasses.asdict(self.plan).items() if key != "home"}
        return {
            "format": FORMAT,
            "machine": machine(),
            "load": [round(value, 2) for value in self.load],
            "plan": plan,
            "bare": self.bare,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "wall_s": round(self.wall_s, 1),
        }


def run_bench(plan: Plan, wanted: frozenset[str], say: Callable[[str], None], keep: bool) -> Result:
    began, load_before = time.monotonic(), load()
    plan.home.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="bench-", dir=plan.home))
    plan = dataclasses.replace(plan, home=home)
    try:
        with (
            environment(os.environ, "BENCH_DIR", str(home)),
            trial_log(plan.log, home, "bench") as trial,
        ):
            plan = dataclasses.replace(plan, log=trial.url)
            say("bare limits of this machine")
            if plan.is_kafka:
                bare, rows = _on_kafka(plan, wanted, say)
            else:
                bare = bare_limits(plan)
                rows = list(_rows(plan, wanted, bare, say))
    finally:
        if not keep:
            shutil.rmtree(home, ignore_errors=True)
    return Result(plan, bare, rows, (load_before, load()), time.monotonic() - began)


def _on_kafka(
    plan: Plan, wanted: frozenset[str], say: Callable[[str], None]
) -> tuple[dict[str, float], list[Row]]:
    # Here, so that a bench of the embedded log needs no Kafka client.
    from node.bench.handover import duplicates, leaving
    from node.bench.kafka import bare_limits as bare_kafka

    def asked(group: str) -> bool:
        if group in wanted:
            say(ON_KAFKA[group])
        return group in wanted

    bare, rows = bare_kafka(plan), []
    if asked("submit"):
        rows.append(bulk(plan, bare))
    if wanted & {"tasks", "latency", "delays", "leave"}:
        with _three(plan) as nodes:
            if asked("tasks"):
                rows += throughput(plan, nodes, bare)
            if asked("latency"):
                rows += starts(plan, nodes, bare)
            if asked("delays"):
                rows += delays(plan, nodes)
            if asked("leave"):
                rows += leaving(plan, nodes)
    if asked("duplicates"):
        rows += duplicates(plan, bare)
    return bare, rows


def _rows(
    plan: Plan, wanted: frozenset[str], bare: dict[str, float], say: Callable[[str], None]
) -> Iterator[Row]:
    def asked(group: str) -> bool:
        if group in wanted:
            say(GROUPS[group])
        return group in wanted

    if asked("submit"):
        yield bulk(plan, bare)
    if wanted & {"tasks", "latency", "rest", "delays", "failover"}:
        with _three(plan) as nodes:
            if asked("tasks"):
                yield from throughput(plan, nodes, bare)
            if asked("latency"):
                yield from starts(plan, nodes, bare)
            if asked("rest"):
                yield from at_rest(plan, nodes)
            if asked("delays"):
                yield from delays(plan, nodes)
            if asked("failover"):
                yield from failover(plan, nodes)
    if asked("command"):
        yield from commands(plan, bare)
    if asked("memory"):
        yield from executed_set(plan)


@contextlib.contextmanager
def _three(plan: Plan) -> Iterator[Nodes]:
    with running_nodes(plan.home / "cluster", log=plan.log_of("nodes")) as nodes:
        nodes.ready()
        if plan.is_kafka:
            nodes.shared()
        yield nodes
