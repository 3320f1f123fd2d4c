"""`bench`: what the product does in a second, beside what this machine could do at best."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from node.cli.output import BAD_USAGE, DONE, CliError, JsonOption, note, print_json, print_table

TASKS_MIN, TASKS_MAX = 100, 10_000_000
PENDING_MAX = 100_000_000


def bench(
    tasks: Annotated[
        int, typer.Option("--tasks", help="No-op tasks of one round; keyed ones and threads take half.")
    ] = 200_000,
    pending: Annotated[
        int,
        typer.Option("--pending", help="Delayed tasks that wait while cancels and a restart are measured."),
    ] = 1_000_000,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Measure this alone; may be given again. See the table's first column."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything, in under a minute.")] = False,
    dir: Annotated[
        Path | None, typer.Option("--dir", help="Work there, and keep it; by default a temporary directory.")
    ] = None,
    log: Annotated[
        str,
        typer.Option(
            "--log",
            help="The task log: embedded; kafka (a broker of its own); or kafka://HOST:PORT, one that is there.",
        ),
    ] = "embedded",
    json: JsonOption = False,
) -> int:
    """Measure speed, latency, failover and memory of real nodes on this machine."""
    from node.bench.measure import Plan
    from node.bench.measure import quick as less
    from node.bench.run import GROUPS, ON_KAFKA, run_bench
    from node.kafkaup.trial import EMBEDDED, check_log

    if not TASKS_MIN <= tasks <= TASKS_MAX:
        raise CliError(f"tasks={tasks} must be from {TASKS_MIN:,} to {TASKS_MAX:,}", BAD_USAGE)
    if not TASKS_MIN <= pending <= PENDING_MAX:
        raise CliError(f"pending={pending} must be from {TASKS_MIN:,} to {PENDING_MAX:,}", BAD_USAGE)
    check_log(log)
    groups = GROUPS if log == EMBEDDED else ON_KAFKA
    unknown = sorted(set(only or ()) - groups.keys())
    if unknown:
        raise CliError(f"only={unknown[0]} is none of {', '.join(groups)}", BAD_USAGE)
    if dir is not None and dir.exists() and not dir.is_dir():
        raise CliError(f"dir={dir} is not a directory", BAD_USAGE)
    plan = Plan((dir or Path(tempfile.gettempdir())).absolute(), log=log, tasks=tasks, pending=pending)
    if quick:
        plan = dataclasses.replace(plan, **less(plan))
    wanted = frozenset(only or groups)
    result = run_bench(
        plan, wanted, (lambda text: None) if json else lambda text: note(f"… {text}"), bool(dir)
    )
    if json:
        print_json(result.document())
        return DONE
    columns = ("", "what", "reach", "measured", "reached", "the machine's own limit")
    print_table(
        columns,
        [
            (row.group, row.what, row.reach, row.measured, "" if row.met is None else row.met, row.beside)
            for row in result.rows
        ],
    )
    limits = ", ".join(f"{name} {value:,.0f}" for name, value in result.bare.items())
    note(f"\nbare limits, each per second: {limits}")
    note(
        f"load of the machine {result.load[0]:.1f} before, {result.load[1]:.1f} after; {result.wall_s:.0f} s in all"
    )
    return DONE
