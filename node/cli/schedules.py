"""`schedule put|list|show|pause|resume|delete|fire`."""

from __future__ import annotations

import getpass
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from node.cli.connection import connect, quoted
from node.cli.output import (
    BAD_USAGE,
    DONE,
    CliError,
    ClusterOption,
    JsonOption,
    note,
    print_json,
    print_table,
)
from node.cli.tasks import body_of, duration_ms

schedule_app = typer.Typer(help="Tasks at set times.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]


class CatchUp(StrEnum):
    NONE = "none"
    LATEST = "latest"
    ALL = "all"


@schedule_app.command("put")
def put(
    name: NameArgument,
    handler: Annotated[str, typer.Option("--handler", help="As in shop.report.")],
    cron: Annotated[str | None, typer.Option("--cron", help="Five fields, as in '0 9 * * mon-fri'.")] = None,
    every: Annotated[str | None, typer.Option("--every", help="An interval, as in 10s or 1h30m.")] = None,
    tz: Annotated[
        str | None,
        typer.Option("--tz", help="The time zone of --cron, as in Europe/Berlin; UTC if not given."),
    ] = None,
    body: Annotated[
        str | None, typer.Option("--body", help="A JSON object: the handler's arguments.")
    ] = None,
    queue: Annotated[str | None, typer.Option("--queue", help="Instead of the handler's own queue.")] = None,
    ttr: Annotated[str | None, typer.Option("--ttr", help="Time to run, as in 30s.")] = None,
    catch_up: Annotated[
        CatchUp, typer.Option("--catch-up", help="What becomes of firings that were missed.")
    ] = CatchUp.LATEST,
    cluster: ClusterOption = None,
    json: JsonOption = False,
) -> int:
    """Make a schedule, or change it. It fires for times after now."""
    if (cron is None) == (every is None):
        raise CliError("give either --cron or --every", BAD_USAGE)
    wanted: dict[str, Any] = {
        "schedule": cron if cron is not None else f"every {every}",
        "handler": handler,
        "body": body_of(body),
        "catch_up": catch_up.value,
        "by": getpass.getuser(),
    }
    if tz is not None:
        wanted["tz"] = tz
    if queue is not None:
        wanted["queue"] = queue
    if ttr is not None:
        wanted["ttr_ms"] = duration_ms("ttr", ttr)
    answer = connect(cluster).put(_path(name), wanted)
    if json:
        print_json(answer)
    else:
        print(
            f"schedule {name} fires next at {answer['next']}" if answer["next"] else f"schedule {name} is put"
        )
    return DONE


@schedule_app.command("list")
def list_schedules(cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """All schedules, and when each fires next."""
    answer = connect(cluster).get("/v1/schedules")
    if json:
        print_json(answer)
        return DONE
    columns = (
        "name",
        "schedule",
        "tz",
        "handler",
        "catch_up",
        "owner",
        "paused",
        "last",
        "next",
        "fired#",
        "missed#",
    )
    rows = answer["schedules"]
    print_table(columns, [[row[column.rstrip("#")] for column in columns] for row in rows])
    for row in rows:
        if row["error"]:
            note(f"{row['name']}: {row['error']}")
    return DONE


@schedule_app.command("show")
def show(name: NameArgument, cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """One schedule."""
    answer = connect(cluster).get(_path(name))
    if json:
        print_json(answer)
        return DONE
    print_table(("field", "value"), [(key, str(value)) for key, value in answer.items() if value is not None])
    return DONE


@schedule_app.command("pause")
def pause(name: NameArgument, cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """Fire no more; what has fired still runs."""
    return _switch(cluster, name, "pause", json)


@schedule_app.command("resume")
def resume(name: NameArgument, cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """Fire again, from now on."""
    return _switch(cluster, name, "resume", json)


@schedule_app.command("delete")
def delete(name: NameArgument, cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """Delete a schedule that was put by hand; what has fired still runs."""
    answer = connect(cluster).ask("DELETE", f"{_path(name)}?{urlencode({'by': getpass.getuser()})}")
    if json:
        print_json(answer)
    else:
        print(f"schedule {name} is deleted")
    return DONE


@schedule_app.command("fire")
def fire(name: NameArgument, cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """Run a schedule's task once more, now."""
    api = connect(cluster)
    # The id is fixed first: what is sent again, because no answer came, is then no second firing.
    start = api.post("/v1/ids", {"count": 1})["start"]
    answer = api.post(f"{_path(name)}/fire", {"by": getpass.getuser(), "id": str(start)})
    if json:
        print_json(answer)
    else:
        print(answer["id"])
    return DONE


def _path(name: str) -> str:
    return f"/v1/schedules/{quoted(name)}"


def _switch(cluster: str | None, name: str, verb: str, as_json: bool) -> int:
    answer = connect(cluster).post(f"{_path(name)}/{verb}", {"by": getpass.getuser()})
    if as_json:
        print_json(answer)
    elif answer["paused"]:
        print(f"schedule {name} is paused")
    else:
        print(f"schedule {name} fires next at {answer['next']}")
    return DONE
