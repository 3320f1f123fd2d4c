"""Figures of many faults in a row: how soon claims resume after a leader's death, and what zombies still do."""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from chaos.checkers import judge, late_effects, zombies
from chaos.checkers.claims import no_effect_after_the_claim_was_lost
from chaos.scenarios.evidence import gather
from chaos.scenarios.load import Kind, Load
from chaos.scenarios.nodes import Nodes, eventually
from chaos.scenarios.run import IDLE_S, Plan
from chaos.scenarios.stage import Stage, first_grant_ms
from chaos.sink import START
from chaos.toxiproxy import Toxiproxy, find_server

# A pause must outlive the lease; short leases make many pauses possible.
SHORT = {"session_timeout_ms": 600, "heartbeat_ms": 100, "fence_margin_ms": 200, "testimony_wait_ms": 300}
PAUSE_S = 1.0
# In mid-flight when the pause strikes, and not at its end when the pause is over.
SLOW_BODY = b'{"ms": 250}'
SLOW = (Kind("chaos.fenced", "check", (SLOW_BODY,)), Kind("chaos.unfenced", "rerun", (SLOW_BODY,)))


@dataclass
class Measured:
    resumed_ms: list[float] = field(default_factory=list)
    never_resumed: int = 0
    pauses: int = 0
    suspects: int = 0
    zombies_fenced: int = 0
    """Effects under a claim of which was ruled what became of it, on the sink that fences: none may be."""
    zombies_unfenced: int = 0
    """The same on a sink that takes whatever comes: each a suspect that the ledger knows."""
    late: int = 0
    """Effects after the claim was lost, and in time to be found by the evidence that was then gathered."""
    tasks: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return not self.wrong and not self.never_resumed and not self.zombies_fenced

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "kills": len(self.resumed_ms) + self.never_resumed,
            "never_resumed": self.never_resumed,
            "pauses": self.pauses,
            "suspects": self.suspects,
            "zombie_effects_on_a_sink_that_fences": self.zombies_fenced,
            "zombie_effects_on_a_sink_that_does_not": self.zombies_unfenced,
            "late_effects_that_evidence_found": self.late,
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
    for task_id, _, _ in zombies(history):
        if history.submitted[task_id].policy == "rerun":
            found.zombies_unfenced += 1
        else:
            found.zombies_fenced += 1
    found.late += len(late_effects(history)) - len(zombies(history))
    # Told apart above: where the sink takes whatever comes, a zombie's effect is one more of a task that may rerun.
    verdicts = judge(history, (no_effect_after_the_claim_was_lost,))
    found.wrong += [f"invariant {each.invariant.number}: {one}" for each in verdicts for one in each.wrong]


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
    """Each in turn, followers and leaders, with work in mid-flight. Failover is not what is measured here."""
    nodes = stage.nodes
    for number in range(1, pauses + 1):
        began = nodes.sink.size()
        for kind in SLOW:
            stage.load.submit(kind, 12)
        busy = eventually("some of them run", partial(_busy, nodes, began))
        with nodes.faults.standing(nodes.frozen(stage.random.choice(busy))):
            stage.hold(PAUSE_S)
        stage.flow(10)
        if number % 10 == 0:
            say(f"  {number} of {pauses}")
    return []


def _busy(nodes: Nodes, since: int) -> tuple[str, ...]:
    """The nodes whose workers are in the middle of a task."""
    open_at: dict[tuple[str, int], int] = {}
    for moment in nodes.sink.read(since):
        if moment.what == START:
            open_at[moment.id_text, moment.fence] = moment.pid
        else:
            open_at.pop((moment.id_text, moment.fence), None)
    pids = set(open_at.values())
    return tuple(node for node in nodes.names if pids & set(nodes.family(node)))
