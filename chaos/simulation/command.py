"""`oncekeeper simulate`: whole clusters under virtual time, a seed each; every failure can be replayed."""

from __future__ import annotations

import difflib
import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.output import BAD_USAGE, DONE, FAILED, CliError, JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    from chaos.simulation.cluster import Options
    from chaos.simulation.runner import Outcome

SEEDS_MAX = 10_000_000
JOBS_MAX = 256


def simulate(
    seeds: Annotated[
        int, typer.Option("--seeds", help="How many runs.", show_default="200, or 1 with --seed")
    ] = 0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The first run's seed; alone, the only run.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes; 0: one a core.")] = 0,
    nodes: Annotated[int, typer.Option("--nodes", help="3 or 5; 0: by seed, five in every fourth.")] = 0,
    plant: Annotated[str, typer.Option("--plant", help="Put this bug into the code first.")] = "",
    plants: Annotated[
        bool, typer.Option("--plants", help="Try every planted bug, and say how many seeds found it.")
    ] = False,
    enough: Annotated[
        int, typer.Option("--enough", help="With --plants: go on when so many seeds found a bug; 0: try all.")
    ] = 0,
    only_faults: Annotated[
        str, typer.Option("--only-faults", help="Of a run's faults these alone, by number: 0,2 or none.")
    ] = "",
    fault: Annotated[
        str, typer.Option("--fault", help="One fault of this kind, instead of what the seed draws.")
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Failures and the summary only.")] = False,
    json: JsonOption = False,
) -> int:
    """Run clusters of simulated machines, links, disks and clocks; check that nothing is lost or done twice."""
    from chaos.simulation.cluster import Cluster, Options
    from chaos.simulation.planted import BY_NAME

    first = 0 if seed is None else seed
    count = seeds or (200 if seed is None else 1)
    _check("seeds", count, 1, SEEDS_MAX)
    _check("seed", first, 0, 2**62)
    _check("jobs", jobs, 0, JOBS_MAX)
    _check("enough", enough, 0, SEEDS_MAX)
    if nodes not in (0, 3, 5):
        raise CliError(f"nodes={nodes} must be 3 or 5 (0: by seed)", BAD_USAGE)
    if fault:
        _known("fault", "kind of fault", fault, Cluster(0, Options()).faults.kinds)
    options = Options(nodes=nodes, only_faults=_numbers(only_faults), fault=fault)
    jobs = jobs or os.cpu_count() or 1
    chosen = range(first, first + count)
    if plant:
        _known("plant", "planted bug", plant, BY_NAME)
    if plants:
        return _plants(chosen, options, jobs, plant, enough, json)
    return _seeds(chosen, options, jobs, plant, quiet, json)


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise CliError(f"{name}={value} must be from {low} to {high:,}", BAD_USAGE)


def _numbers(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    if text == "none":
        return ()
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        raise CliError(
            f"only_faults={text!r} must be numbers with commas between, or none", BAD_USAGE
        ) from None


def _known(option: str, what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise CliError(f"{option}={name!r} is no {what}: {hint}", BAD_USAGE)


def _seeds(seeds: Sequence[int], options: Options, jobs: int, plant: str, quiet: bool, json: bool) -> int:
    from chaos.simulation.runner import replay_command, run_many

    began = time.monotonic()
    failed: list[Outcome] = []
    reached: Counter[str] = Counter()
    tasks = effects = 0
    virtual_s = 0.0
    for outcome in run_many(seeds, options, plant, jobs):
        tasks, effects = tasks + outcome.tasks, effects + outcome.effects
        virtual_s += outcome.virtual_s
        reached.update(outcome.reached)
        if outcome.failed:
            failed.append(outcome)
        if json or (quiet and not outcome.failed):
            continue
        print(_line(outcome), flush=True)
        if outcome.failed:
            for line in outcome.history:
                print(f"    {line}")
            print(f"    again: {replay_command(outcome, options, plant)}", flush=True)
    wall_s = time.monotonic() - began
    if json:
        print_json(
            {
                "seeds": len(seeds),
                "first": seeds[0],
                "failed": [_document(outcome, options, plant) for outcome in failed],
                "tasks": tasks,
                "effects": effects,
                "virtual_s": round(virtual_s, 3),
                "wall_s": round(wall_s, 3),
                "seeds_with": dict(sorted(reached.items())),
            }
        )
    else:
        rate = len(seeds) / wall_s
        note(
            f"{len(seeds):,} seeds, {len(failed)} failed; {tasks:,} tasks, {effects:,} effects; "
            f"{virtual_s:,.0f} s of virtual time in {wall_s:.1f} s ({rate:.1f} seeds/s)"
        )
    return FAILED if failed else DONE


def _line(outcome: Outcome) -> str:
    word = "FAILED" if outcome.failed else "ok"
    faults = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in Counter(outcome.faults).items())
    head = (
        f"seed {outcome.seed:<7} {word:6} {outcome.nodes} nodes {outcome.virtual_s:5.1f} s {outcome.tasks:4} tasks "
        f"{outcome.effects:4} effects  {outcome.digest}  {faults or 'no faults'}"
    )
    if not outcome.failed:
        return head
    violation = outcome.violations[0]
    return f"{head}\n    invariant {violation.invariant}: {violation.what}"


def _document(outcome: Outcome, options: Options, plant: str) -> dict[str, object]:
    from chaos.simulation.runner import replay_command

    return {
        "seed": outcome.seed,
        "digest": outcome.digest,
        "violations": [{"invariant": each.invariant, "what": each.what} for each in outcome.violations],
        "faults": outcome.faults,
        "history": outcome.history,
        "again": replay_command(outcome, options, plant),
    }


def _plants(seeds: Sequence[int], options: Options, jobs: int, plant: str, enough: int, json: bool) -> int:
    from chaos.simulation.runner import run_plants

    began = time.monotonic()
    rows = []
    for found in run_plants(seeds, options, jobs, (plant,) if plant else (), enough):
        rows.append(found)
        if not json:
            note(
                f"{found.name}: {found.found} of {found.seeds} seeds" + ("" if found.found else "  NOT FOUND")
            )
    unseen = [row.name for row in rows if not row.found]
    if json:
        print_json(
            {
                "seeds": len(seeds),
                "plants": [
                    {
                        "name": row.name,
                        "what": row.what,
                        "found": row.found,
                        "first": row.first,
                        "invariants": {str(number): times for number, times in row.invariants.items()},
                    }
                    for row in rows
                ],
                "unseen": unseen,
            }
        )
        return FAILED if unseen else DONE
    print_table(
        ("planted bug", "what it does", "seeds#", "found by#", "first", "invariants"),
        [(row.name, row.what, row.seeds, row.found, row.first, _ranked(row.invariants)) for row in rows],
    )
    note(
        f"{len(rows)} planted bugs in {time.monotonic() - began:.0f} s; not found: {', '.join(unseen) or 'none'}"
    )
    return FAILED if unseen else DONE


def _ranked(invariants: Counter[int]) -> str:
    return ", ".join(f"{number} ({times})" for number, times in invariants.most_common())
