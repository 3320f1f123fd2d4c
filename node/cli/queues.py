"""`queue list|pause|resume|skip`."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from node.cli.connection import connect, quoted
from node.cli.output import DONE, ClusterOption, JsonOption, print_json, print_table

queue_app = typer.Typer(help="Queues, and whether they are consumed.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]


@queue_app.command("list")
def list_queues(cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """The queues that are known."""
    answer = connect(cluster).get("/v1/queues")
    if json:
        print_json(answer)
        return DONE
    rows = answer["queues"]
    print_table(
        ("queue", "paused", "by", "handlers"),
        [(row["queue"], row["paused"], row["by"], ", ".join(row["handlers"])) for row in rows],
    )
    return DONE


@queue_app.command("pause")
def pause(name: NameArgument, cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """Take no more tasks of a queue; what runs goes on."""
    return _switch(cluster, name, "pause", json)


@queue_app.command("resume")
def resume(name: NameArgument, cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """Consume a queue again."""
    return _switch(cluster, name, "resume", json)


@queue_app.command("skip")
def skip(
    partition: Annotated[int, typer.Argument(help="Its number, as `oncekeeper nodes` says it in the alarm.")],
    cluster: ClusterOption = None,
    json: JsonOption = False,
) -> int:
    """Accept that tasks of a partition were deleted from the log before they were run."""
    answer = connect(cluster).post("/v1/partitions/skip", {"partition": partition, "by": getpass.getuser()})
    if json:
        print_json(answer)
    else:
        print(f"partition {partition} goes on, at {answer['owner']}")
    return DONE


def _switch(cluster: str | None, name: str, verb: str, as_json: bool) -> int:
    answer = connect(cluster).post(f"/v1/queues/{quoted(name)}/{verb}", {"by": getpass.getuser()})
    if as_json:
        print_json(answer)
    else:
        print(f"queue {name} is {'paused' if verb == 'pause' else 'consumed'}")
    return DONE
