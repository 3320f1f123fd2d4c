"""One run: bring up, load, play, heal, drain, gather, judge, write down."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos import lines
from chaos.checkers import Found, each_acknowledged_task_ends_once, judge, zombies
from chaos.history import History
from chaos.scenarios.evidence import gather
from chaos.scenarios.load import OWN, Kind, Load
from chaos.scenarios.nodes import Nodes, NotInTime, Target
from chaos.scenarios.stage import Bound, Stage
from chaos.toxiproxy import Toxiproxy, ToxiproxyFailed, find_server

IDLE_S = 120.0


@dataclass(frozen=True)
class Scenario:
    number: int
    """Of RELIABILITY's list."""
    name: str
    strikes: str
    holds: str
    play: Callable[[Stage], None]
    settings: Mapping[str, object] = field(default_factory=dict)
    smoke: bool = False
    held: bool = False
    """Suspects that wait for a human may be left."""
    needs: Callable[[], str] = lambda: ""
    """Why it cannot be played here; empty if it can."""


@dataclass(frozen=True)
class Plan:
    target: Target = field(default_factory=Target)
    kinds: tuple[Kind, ...] = OWN
    seed: int = 0
    keep: bool = False
    """The nodes' directories, too."""


@dataclass
class Run:
    scenario: Scenario
    seed: int
    history: History = field(default_factory=History)
    found: list[Found] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    wall_s: float = 0.0
    logs: Path | None = None

    @property
    def is_right(self) -> bool:
        return not self.skipped and not self.wrong and not any(each.wrong for each in self.found)

    @property
    def verdict(self) -> str:
        return "skipped" if self.skipped else "holds" if self.is_right else "VIOLATED"

    def document(self) -> dict[str, Any]:
        """The run as JSON values."""
        history = self.history
        return {
            "scenario": self.scenario.name,
            "number": self.scenario.number,
            "seed": self.seed,
            "verdict": self.verdict,
            "skipped": self.skipped or None,
            "invariants": [
                {"number": each.invariant.number, "claim": each.invariant.claim, "wrong": list(each.wrong)}
                for each in self.found
            ],
            "wrong": self.wrong,
            "bounds": [
                {"what": each.what, "took_ms": each.took_ms, "bound_ms": each.bound_ms, "met": each.met}
                for each in self.bounds
            ],
            "notes": self.notes,
            "submitted": len(history.submitted),
            "effects": len(history.effects),
            "suspects": sum(type(each).__name__ == "Suspected" for each in history.decisions),
            "zombie_effects": len(zombies(history)),
            "wall_s": round(self.wall_s, 1),
        }


def play(scenario: Scenario, plan: Plan, report: Path | None = None) -> Run:
    """Play it once. With ``report``, a new directory gets history.jsonl, run.json and report.html."""
    run = Run(scenario, plan.seed)
    run.skipped = scenario.needs()
    if run.skipped:
        return run
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"oncekeeper-chaos-{scenario.name}-"))
    server = Toxiproxy(find_server(), folder / "toxiproxy.log")
    try:
        nodes = Nodes(folder, server, plan.target, scenario.settings)
        try:
            _play_on(nodes, run, plan)
        finally:
            run.history = nodes.history
            nodes.close()
    finally:
        server.close()
        run.wall_s = time.monotonic() - began
        if plan.keep or (report is None and not run.is_right):
            run.logs = folder
        else:
            if report is not None and not run.is_right:
                _keep_logs(folder, report)
            shutil.rmtree(folder, ignore_errors=True)
    if report is not None:
        write_report(run, report)
    return run


def _play_on(nodes: Nodes, run: Run, plan: Plan) -> None:
    scenario = run.scenario
    load = Load(nodes.client, nodes.history, plan.kinds)
    stage = Stage(nodes, load, plan.kinds, random.Random(plan.seed))
    run.bounds, run.notes, run.wrong = stage.bounds, stage.notes, stage.wrong
    try:
        nodes.start()
        nodes.wait_up()
        load.start()
        try:
            stage.flow()
            scenario.play(stage)
            nodes.faults.heal_all()
            nodes.start_dead(*nodes.names)
            stage.promise(20)
            nodes.wait_up()
            stage.flow()
        finally:
            load.stop()
        status = nodes.wait_idle(IDLE_S)
    except (NotInTime, ToxiproxyFailed) as error:
        run.wrong.append(str(error))
        return
    gather(nodes, status)
    stage.finish(nodes.history)
    run.found = judge(nodes.history, (each_acknowledged_task_ends_once,) if scenario.held else ())


def write_report(run: Run, directory: Path) -> None:
    from chaos.report.page import page

    directory.mkdir(parents=True, exist_ok=True)
    lines.write(run.history, directory / "history.jsonl")
    (directory / "run.json").write_text(json.dumps(run.document(), indent=1) + "\n")
    (directory / "report.html").write_text(page(run))


def _keep_logs(folder: Path, report: Path) -> None:
    """What the nodes said, for whoever looks for the cause."""
    report.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("data/nodes/*/node.log"):
        shutil.copyfile(log, report / f"{log.parent.name}.log")
