"""Many seeds on several processes, failures told as short as they can be, and the table of planted bugs."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from chaos.simulation.cluster import Options, Report, run_seed
from chaos.simulation.planted import BY_NAME, PLANTS
from chaos.simulation.witness import Violation
from dedup.ids import TaskId, id_text

EVENTS_SHOWN = 60
CHUNK = 10
FAULTS = frozenset({"FAULT", "HEAL", "HEALED", "BOOT", "KILL", "POWER", "FATAL", "EXIT", "RESTORED"})


@dataclass
class Outcome:
    """What is kept of a run: small enough to pass between processes by the thousand."""

    seed: int
    nodes: int
    digest: str
    virtual_s: float
    steps: int
    tasks: int
    effects: int
    faults: list[str]
    reached: set[str]
    violations: list[Violation] = field(default_factory=list)
    kept_faults: tuple[int, ...] | None = None
    """The fewest faults, by their number, with which the violation still shows."""
    history: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return bool(self.violations)


def run_one(seed: int, options: Options, plant: str = "", shrink: bool = True) -> Outcome:
    report = _run(seed, options, plant)
    outcome = Outcome(
        report.seed,
        report.nodes,
        report.digest,
        report.virtual_s,
        report.steps,
        report.tasks,
        report.effects,
        report.faults,
        report.reached,
        report.violations,
    )
    if report.failed:
        if shrink:
            kept, report = _shrink(report, options, plant)
            outcome.kept_faults = kept
        outcome.history = tell(report)
    return outcome


def _run(seed: int, options: Options, plant: str) -> Report:
    return run_seed(seed, options, BY_NAME[plant].put_in if plant else None)


def _shrink(report: Report, options: Options, plant: str) -> tuple[tuple[int, ...], Report]:
    """Leave out one fault after the other, as long as the same invariant is violated (Zeller, 1999, in short)."""
    kept = options.only_faults if options.only_faults is not None else tuple(range(len(report.faults)))
    invariant = report.violations[0].invariant
    for number in reversed(kept):
        fewer = tuple(each for each in kept if each != number)
        tried = _run(report.seed, dataclasses.replace(options, only_faults=fewer), plant)
        if tried.violations and tried.violations[0].invariant == invariant:
            kept, report = fewer, tried
    return kept, report


def tell(report: Report) -> list[str]:
    """The history of the ids that the violation names, with the faults around; or the end of everything."""
    ids = {each for violation in report.violations for each in violation.ids}
    events = [
        event
        for event in report.events
        if event[3] in ids or event[2] in FAULTS or event[2] == "VIOLATION" or not ids
    ]
    return [_line(event) for event in events[-EVENTS_SHOWN:]]


def _line(event: tuple[int, str, str, TaskId | None, str]) -> str:
    t_ns, process, kind, task_id, text = event
    return f"{t_ns / 1e9:9.4f} s  {process:7} {kind:13} {id_text(task_id) if task_id is not None else '':8} {text}"


def replay_command(outcome: Outcome, options: Options, plant: str) -> str:
    words = [f"oncekeeper simulate --seed {outcome.seed}"]
    if options.nodes:
        words.append(f"--nodes {options.nodes}")
    if plant:
        words.append(f"--plant {plant}")
    if options.fault:
        words.append(f"--fault {shlex.quote(options.fault)}")
    if outcome.kept_faults is not None and len(outcome.kept_faults) < len(outcome.faults):
        words.append("--only-faults " + (",".join(map(str, outcome.kept_faults)) or "none"))
    return " ".join(words)


# --- many -------------------------------------------------------------------------------------------------------


def _chunk(seeds: Sequence[int], options: Options, plant: str) -> list[Outcome]:
    return [run_one(seed, options, plant) for seed in seeds]


def run_many(seeds: Sequence[int], options: Options, plant: str, jobs: int) -> Iterator[Outcome]:
    """In the order of the seeds, as they are done."""
    if jobs == 1 or len(seeds) <= CHUNK:
        for seed in seeds:
            yield run_one(seed, options, plant)
        return
    chunks = [seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK)]
    # Spawned, not forked: what a run leaves behind must not depend on what ran before in this process.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_chunk, chunk, options, plant) for chunk in chunks]
        try:
            for future in futures:
                yield from future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass
class PlantFound:
    name: str
    what: str
    seeds: int
    found: int
    first: int | None
    invariants: Counter[int]


def _plant(name: str, seeds: Sequence[int], options: Options, enough: int) -> PlantFound:
    result = PlantFound(name, BY_NAME[name].what, 0, 0, None, Counter())
    for seed in seeds:
        report = _run(seed, options, name)
        result.seeds += 1
        if report.failed:
            result.found += 1
            result.first = seed if result.first is None else result.first
            result.invariants[report.violations[0].invariant] += 1
            if enough and result.found >= enough:
                break
    return result


def run_plants(
    seeds: Sequence[int], options: Options, jobs: int, names: Sequence[str] = (), enough: int = 0
) -> Iterator[PlantFound]:
    """``enough``: go on to the next bug after so many seeds have found it; 0: try all seeds."""
    chosen = list(names) or [plant.name for plant in PLANTS]
    if jobs == 1:
        for name in chosen:
            yield _plant(name, seeds, options, enough)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_plant, name, seeds, options, enough) for name in chosen]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
