"""Figures of many faults in a row: how soon claims resume after a leader's death, and what zombies still do."""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.checkers import judge, zombies
from chaos.scenarios.evidence import gather
from chaos.scenarios.load import Load
from chaos.scenarios.nodes import Nodes
from chaos.scenarios.run import IDLE_S, Plan
from chaos.scenarios.stage import Stage, first_grant_ms
from chaos.toxiproxy import Toxiproxy, find_server

# A pause must outlive the lease; short leases make many pauses possible.
SHORT = {"session_timeout_ms": 600, "heartbeat_ms": 100, "fence_margin_ms": 200, "testimony_wait_ms": 300}
PAUSE_S = 1.0


@dataclass
class Measured:
    resumed_ms: list[float] = field(default_factory=list)
    never_resumed: int = 0
    pauses: int = 0
    suspects: int = 0
    zombie_effects: int = 0
    tasks: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return not self.wrong and not self.never_resumed

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "kills": len(self.resumed_ms) + self.never_resumed,
            "never_resumed": self.never_resumed,
            "pauses": self.pauses,
            "suspects": self.suspects,
            "zombie_effects": self.zombie_effects,
            "tasks": self.tasks,
            "wrong": self.wrong,
        }
        if self.resumed_ms:
            ordered = sorted(self.resumed_ms)
            found["claims_resume_ms"] = {
                "p50": round(statistics.median(ordered)),
                "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]),
                "max": round(ordered[-1]),
            }
        return found

    def rows(self) -> list[tuple[str, object]]:
        told = self.document()
        resumed = told.pop("claims_resume_ms", {})
        rows: list[tuple[str, object]] = [
            (f"claims resume after a leader's death, {name}", f"{value:,} ms")
            for name, value in resumed.items()
        ]
        wrong = told.pop("wrong")
        rows += [(name.replace("_", " "), value) for name, value in told.items()]
        return [*rows, *(("WRONG", each) for each in wrong[:10])]


def measured(plan: Plan, kills: int, pauses: int, say: Callable[[str], None]) -> Measured:
    found = Measured()
    if kills:
        say(f"{kills} leaders are killed, one after the other …")
        _with_nodes(plan, {}, found, lambda stage: _kill_leaders(stage, kills, say))
    if pauses:
        say(f"{pauses} nodes are paused for longer than their lease …")
        _with_nodes(plan, SHORT, found, lambda stage: _pause_nodes(stage, pauses, say))
        found.pauses = pauses
    return found


def _with_nodes(
    plan: Plan, settings: dict[str, int], found: Measured, play: Callable[[Stage], list[int]]
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="oncekeeper-chaos-measure-"))
    server = Toxiproxy(find_server(), folder / "toxiproxy.log")
    try:
        nodes = Nodes(folder, server, plan.target, settings)
        try:
            load = Load(nodes.client, nodes.history, plan.kinds)
            stage = Stage(nodes, load, plan.kinds, random.Random(plan.seed))
            nodes.start()
            nodes.wait_up()
            load.start()
            try:
                stage.flow()
                struck = play(stage)
            finally:
                load.stop()
            gather(nodes, nodes.wait_idle(IDLE_S))
            _count(nodes, struck, found)
        finally:
            nodes.close()
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


def _count(nodes: Nodes, struck: list[int], found: Measured) -> None:
    history = nodes.history
    for at_ns in struck:
        took_ms = first_grant_ms(history, at_ns)
        if took_ms is None:
            found.never_resumed += 1
        else:
            found.resumed_ms.append(took_ms)
    found.tasks += len(history.submitted)
    found.suspects += sum(type(each).__name__ == "Suspected" for each in history.decisions)
    found.zombie_effects += len(zombies(history))
    found.wrong += [
        f"invariant {each.invariant.number}: {one}" for each in judge(history) for one in each.wrong
    ]


def _kill_leaders(stage: Stage, kills: int, say: Callable[[str], None]) -> list[int]:
    """When each was struck, in ns."""
    nodes = stage.nodes
    struck = []
    for number in range(1, kills + 1):
        with nodes.faults.standing(nodes.killed(nodes.leader())) as at_ns:
            struck.append(at_ns)
            stage.flow(20)
        nodes.wait_up()
        stage.flow(20)
        if number % 10 == 0:
            say(f"  {number} of {kills}")
    return struck


def _pause_nodes(stage: Stage, pauses: int, say: Callable[[str], None]) -> list[int]:
    """Each in turn, followers and leaders. Failover is not what is measured here."""
    nodes = stage.nodes
    for number in range(1, pauses + 1):
        with nodes.faults.standing(nodes.paused(stage.random.choice(nodes.names))):
            stage.hold(PAUSE_S)
        stage.flow(10)
        if number % 10 == 0:
            say(f"  {number} of {pauses}")
    return []
