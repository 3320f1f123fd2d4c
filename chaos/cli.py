"""`oncekeeper chaos`: scenarios against three real nodes of this machine, and what became of them.

Loaded by the command line through the entry point group ``oncekeeper.commands``, and only when it is asked for.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.cli.output import BAD_USAGE, DONE, FAILED, CliError, JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    from chaos.scenarios.run import Plan, Run

chaos_app = typer.Typer(
    help="Break three real nodes on purpose, and judge what they did.", no_args_is_help=True
)

AppOption = Annotated[
    str | None, typer.Option("--app", help="MODULE:APP to run; by default one whose effects are counted.")
]
AppDirOption = Annotated[
    Path | None, typer.Option("--app-dir", help="Where MODULE is; by default the current directory.")
]
LoadOption = Annotated[
    Path | None,
    typer.Option(
        "--load", help='Tasks for --app: JSON lines of {"handler": …, "body": {…}}, submitted in turn.'
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Draws the nodes that are struck.")]


@chaos_app.command("list")
def list_scenarios(json: JsonOption = False) -> int:
    """Every scenario: what it strikes, and what must hold beside the invariants."""
    from chaos.scenarios.catalog import CATALOG

    scenarios = list(CATALOG.values())
    if json:
        print_json(
            {
                "scenarios": [
                    {
                        "number": each.number,
                        "name": each.name,
                        "strikes": each.strikes,
                        "holds": each.holds,
                        "smoke": each.smoke,
                        "cannot": each.needs() or None,
                    }
                    for each in scenarios
                ]
            }
        )
        return DONE
    rows = [(each.number, each.name, each.strikes, each.holds, each.smoke or None) for each in scenarios]
    print_table(("#", "scenario", "strikes", "must hold", "smoke"), rows)
    note("\noncekeeper chaos run NAME, or `all`, or `smoke`: what the column says")
    return DONE


@chaos_app.command("run")
def run(
    scenario: Annotated[str, typer.Argument(help="A name of `chaos list`, or `all`, or `smoke`.")],
    app: AppOption = None,
    app_dir: AppDirOption = None,
    load: LoadOption = None,
    seed: SeedOption = 0,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="A new directory for history.jsonl and report.html of each run."),
    ] = None,
    json: JsonOption = False,
) -> int:
    """Play a scenario, or a set of them; 1 if an invariant or an expectation does not hold."""
    from chaos.scenarios.catalog import CATALOG, SETS, chosen

    if scenario not in CATALOG and scenario not in SETS:
        import difflib

        near = difflib.get_close_matches(scenario, [*CATALOG, *SETS], n=1, cutoff=0.0)
        raise CliError(
            f"scenario={scenario} is none of `oncekeeper chaos list`; the nearest is {near[0]}", BAD_USAGE
        )
    plan = _plan(app, app_dir, load, seed)
    if report is not None and report.exists():
        raise CliError(f"report={report} exists already: name a new directory", BAD_USAGE)
    wanted = chosen(scenario)
    directory = report or Path(f"chaos-{scenario}")
    if report is None and directory.exists():
        raise CliError(
            f"report={directory} exists already: remove it, or name another: --report DIR", BAD_USAGE
        )
    runs = []
    with _signals_interrupt():
        for each in wanted:
            if not json:
                note(f"{each.name}: {each.strikes} …")
            runs.append(_play(each, plan, directory / each.name if len(wanted) > 1 else directory))
            if not json:
                _tell(runs[-1])
    if json:
        print_json({"report": str(directory), "runs": [each.document() for each in runs]})
    else:
        print_runs(runs)
        note(f"\nhistories and reports are in {directory}")
    return FAILED if any(each.verdict == "VIOLATED" for each in runs) else DONE


def _play(scenario: Any, plan: Plan, report: Path) -> Run:
    from chaos.scenarios.run import play
    from chaos.toxiproxy import ToxiproxyFailed

    try:
        return play(scenario, plan, report)
    except ToxiproxyFailed as error:
        raise CliError(str(error)) from error


def _tell(run: Run) -> None:
    for sentence in [*run.notes, *run.wrong]:
        note(f"    {sentence[:300]}")
    for found in run.found:
        for sentence in found.wrong[:5]:
            note(f"    invariant {found.invariant.number}: {sentence}")
    note(f"    {run.verdict}{f': {run.skipped}' if run.skipped else ''} ({run.wall_s:.1f} s)")


def print_runs(runs: list[Run]) -> None:
    """The table of a suite."""
    columns = (
        "#",
        "scenario",
        "verdict",
        "tasks#",
        "effects#",
        "in doubt#",
        "zombies#",
        "bounds",
        "seconds#",
    )
    rows = []
    for each in runs:
        told = each.document()
        missed = [bound for bound in each.bounds if not bound.met]
        bounds = f"{len(each.bounds) - len(missed)} of {len(each.bounds)} met" if each.bounds else "-"
        counts = (told["submitted"], told["effects"], told["suspects"], told["zombie_effects"])
        rows.append(
            (
                each.scenario.number,
                each.scenario.name,
                each.verdict,
                *counts,
                bounds,
                f"{each.wall_s:.1f}",
            )
        )
    print_table(columns, rows)


@chaos_app.command("measure")
def measure(
    kills: Annotated[int, typer.Option("--kills", help="Leaders that are killed.")] = 50,
    pauses: Annotated[int, typer.Option("--pauses", help="Nodes that are paused beyond their lease.")] = 20,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> int:
    """How soon claims resume after a leader's death, and whether paused nodes' zombies still take effect."""
    if kills < 0 or pauses < 0 or kills + pauses == 0:
        raise CliError("kills and pauses must not be negative, and one of them must be above 0", BAD_USAGE)
    from chaos.scenarios.measures import measured

    plan = _plan(None, None, None, seed)
    with _signals_interrupt():
        found = measured(plan, kills, pauses, (lambda text: None) if json else note)
    if json:
        print_json(found.document())
    else:
        print_table(("what", "figure"), found.rows())
    return DONE if found.is_right else FAILED


# --- what the options say -----------------------------------------------------------------------------------------


def _plan(app: str | None, app_dir: Path | None, load: Path | None, seed: int) -> Plan:
    """Everything that can be wrong is found before anything is started."""
    from chaos.scenarios.nodes import Target
    from chaos.scenarios.run import Plan
    from chaos.toxiproxy import NoToxiproxy, find_server

    try:
        find_server()
    except NoToxiproxy as error:
        raise CliError(str(error), BAD_USAGE) from error
    if app is None:
        if load is not None:
            raise CliError("load goes with --app: our own application brings its tasks along", BAD_USAGE)
        return Plan(seed=seed)
    from chaos.scenarios.targets import BadTarget, kinds_of

    from_dir = (app_dir or Path.cwd()).absolute()
    try:
        return Plan(Target(app, from_dir), kinds_of(app, from_dir, load), seed)
    except BadTarget as error:
        raise CliError(str(error), BAD_USAGE) from error


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as Ctrl-C does: faults are healed and processes ended then too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
