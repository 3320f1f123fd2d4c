"""`suspect list|rule`: tasks that may have run, and a human's word on them."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated, Any

import typer

from node.cli.connection import Api, connect
from node.cli.output import (
    BAD_USAGE,
    DONE,
    FAILED,
    CliError,
    ClusterOption,
    JsonOption,
    note,
    print_json,
    print_table,
)
from node.cli.tasks import checked_id

RULE_MAX = 1_000  # suspects ruled by one request

suspect_app = typer.Typer(help="Tasks whose holder was lost before they were settled.", no_args_is_help=True)


@suspect_app.command("list")
def list_suspects(
    limit: Annotated[int, typer.Option("--limit", help="At most so many.")] = 100,
    after: Annotated[str | None, typer.Option("--after", help="The `next` of the page before.")] = None,
    cluster: ClusterOption = None,
    json: JsonOption = False,
) -> int:
    """The suspects, with what is known of each."""
    answer = connect(cluster).get("/v1/suspects", limit=limit, after=after)
    if json:
        print_json(answer)
        return DONE
    columns = ("id", "handler", "fence#", "node", "why", "since", "waits for")
    print_table(columns, [_cells(row) for row in answer["suspects"]])
    note(f"{counted(answer['total'], 'suspect')}, of them waiting for a human: {answer['held']:,}")
    if answer["next"]:
        note(f"there are more: --after {answer['next']}")
    return DONE


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    waits_for = "testimony or check"
    if row["held"]:
        waits_for = f"a human: {row['reason'] or 'no reason was given'}"
    since = f"{row['since_ms_ago'] / 1000:.1f} s ago"
    return row["id"], row["handler"], row["fence"], row["node"], row["why"], since, waits_for


@suspect_app.command("rule")
def rule(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]…", help="The suspects; - reads ids from standard input."),
    ] = None,
    executed: Annotated[bool, typer.Option("--executed", help="They took effect: they are done.")] = False,
    not_executed: Annotated[
        bool, typer.Option("--not-executed", help="They did not: they run again.")
    ] = False,
    all_of_them: Annotated[bool, typer.Option("--all", help="Every suspect there is.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="How you know; it is kept with the task.")] = "",
    by: Annotated[str | None, typer.Option("--by", help="Who says so; by default your user name.")] = None,
    cluster: ClusterOption = None,
    json: JsonOption = False,
) -> int:
    """Say of suspects whether they took effect. There is no way back."""
    if executed == not_executed:
        raise CliError("say either --executed or --not-executed", BAD_USAGE)
    if bool(ids) == all_of_them:
        raise CliError("name the suspects, or say --all", BAD_USAGE)
    if not reason:
        raise CliError("reason is missing: --reason says how you know, for whoever asks why later", BAD_USAGE)
    api = connect(cluster)
    if ids == ["-"]:
        wanted = [checked_id(line.strip()) for line in sys.stdin if line.strip()]
    else:
        wanted = [checked_id(each) for each in ids or []] or _all_suspects(api)
    verdict = "executed" if executed else "not_executed"
    outcomes: list[dict[str, Any]] = []
    for at in range(0, len(wanted), RULE_MAX):
        part = wanted[at : at + RULE_MAX]
        asked = {"ids": part, "verdict": verdict, "by": by or getpass.getuser(), "reason": reason}
        try:
            outcomes += api.post("/v1/suspects/rule", asked)["outcomes"]
        except CliError as error:
            # None of these was a suspect (any more); the rest may be.
            if error.details.get("status") != 409:
                raise
            outcomes += [{"id": each, "outcome": "no suspect"} for each in part]
    missed = [each for each in outcomes if each["outcome"] != "ruled"]
    ruled = len(outcomes) - len(missed)
    if json:
        document: dict[str, Any] = {"ruled": ruled, "outcomes": outcomes}
        print_json({"error": f"{len(missed)} were no suspects"} | document if missed else document)
    else:
        print(f"ruled {counted(ruled, 'suspect')}: {verdict.replace('_', ' ')}")
        for each in missed:
            note(f"{each['id']}: {each['outcome']}")
    return FAILED if missed else DONE


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _all_suspects(api: Api) -> list[str]:
    found: list[str] = []
    after = None
    while True:
        page = api.get("/v1/suspects", limit=RULE_MAX, after=after)
        found += [row["id"] for row in page["suspects"]]
        after = page.get("next")
        if not after:
            return found
