"""`nodes`, `status` and `wait`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from node.cli.connection import Api, connect
from node.cli.output import (
    BAD_USAGE,
    DONE,
    FAILED,
    UNREACHABLE,
    CliError,
    ClusterOption,
    JsonOption,
    note,
    print_json,
    print_table,
)

STATES = ("waiting", "delayed", "running", "suspect", "executed", "dead", "cancelled")
UNFINISHED = ("waiting", "delayed", "running")
POLL_S = 0.1
# How long nobody may answer while we wait: longer than a new leader takes, however loaded the machine is.
SILENCE_S_MAX = 15.0


def nodes(cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """The nodes: pid, role, term, applied index, addresses."""
    answer = connect(cluster).get("/v1/nodes")
    if json:
        print_json(answer)
    else:
        print_nodes(answer["nodes"])
    return DONE


def print_nodes(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("node", "pid", "role", "term#", "applied#", "takes work", "running#", "http", "raft", "")
    cells: list[tuple[object, ...]] = []
    for row in rows:
        if row.get("up"):
            # A pid is a name, not a quantity: no thousands separator.
            told = (
                str(row["pid"]),
                row["role"],
                row["term"],
                row["applied_index"],
                row["takes_work"],
                row["running"],
            )
            cells.append((row["node"], *told, row["http"], row["raft"], "; ".join(row.get("notes") or ())))
        else:
            cells.append((row["node"], "-", "down", *[None] * 4, row.get("http"), None, row.get("error")))
    print_table(columns, cells)


def status(
    local: Annotated[
        bool, typer.Option("--local", help="Of one node alone, without asking the others.")
    ] = False,
    cluster: ClusterOption = None,
    json: JsonOption = False,
) -> int:
    """Tasks by state."""
    answer = connect(cluster).get("/v1/status", local=1 if local else None)
    if json:
        print_json(answer)
        return DONE
    if local:
        print_table(
            ("field", "value"), [(key, value) for key, value in answer.items() if value not in (None, [], {})]
        )
        return DONE
    counts = answer["tasks"]
    print_table(("state", "tasks#"), [(state, counts[state]) for state in STATES])
    for text in _remarks(answer):
        note(text)
    return DONE


def _remarks(answer: dict[str, Any]) -> Iterator[str]:
    if answer["held"]:
        yield f"{answer['held']:,} suspects wait for a human: oncekeeper suspect list"
    if answer["paused_queues"]:
        yield f"paused: {', '.join(answer['paused_queues'])}"
    if answer["unreachable"]:
        yield f"no answer from {', '.join(answer['unreachable'])}"
    if not answer["fresh"]:
        yield "no quorum: this is what the node that answered knew last"


def wait(
    idle: Annotated[
        bool, typer.Option("--idle", help="Until nothing is waiting, delayed or running.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds; without it, for as long as it takes.")
    ] = None,
    cluster: ClusterOption = None,
    json: JsonOption = False,
) -> int:
    """Wait for the cluster. Suspects may remain, and are counted."""
    if not idle:
        raise CliError("--idle is missing: it says what to wait for", BAD_USAGE)
    if timeout is not None and timeout < 0:
        raise CliError(f"timeout={timeout:g} must not be negative", BAD_USAGE)
    api = connect(cluster)
    began = time.monotonic()
    with Progress(shown=not json) as progress:
        idle_now, counts = wait_idle(api, timeout, progress.show)
    waited_ms = round((time.monotonic() - began) * 1000)
    unfinished = ", ".join(f"{counts[state]:,} {state}" for state in UNFINISHED if counts[state])
    why = f"not idle after {timeout or 0:g} s: {unfinished or 'a partition or a ruling is on its way'}"
    if json:
        document: dict[str, Any] = {"idle": idle_now, "waited_ms": waited_ms, "tasks": counts}
        print_json(document if idle_now else {"error": why} | document)
    elif idle_now:
        rest = ", ".join(f"{counts[state]:,} {state}" for state in STATES if counts[state])
        print(f"idle after {waited_ms / 1000:.1f} s: {rest or 'no tasks'}")
    else:
        note(f"error: {why}")
    return DONE if idle_now else FAILED


def wait_idle(
    api: Api, timeout_s: float | None, look: Callable[[dict[str, int]], None] = lambda counts: None
) -> tuple[bool, dict[str, int]]:
    """Until idle or the timeout; whether it is idle, and the last counts. Rides out a time without a leader."""
    began = time.monotonic()
    heard = began
    while True:
        expired = timeout_s is not None and time.monotonic() - began >= timeout_s
        try:
            answer = api.get("/v1/status")
            heard = time.monotonic()
            look(answer["tasks"])
            if expired or answer["idle"]:
                return answer["idle"], answer["tasks"]
        except CliError as error:
            if error.code != UNREACHABLE or expired or time.monotonic() - heard > SILENCE_S_MAX:
                raise
        time.sleep(POLL_S)


class Progress:
    """How far the waiting is, on standard error; nothing if that is no terminal."""

    def __init__(self, shown: bool) -> None:
        import sys

        self._shown = shown and sys.stderr.isatty()
        self._bar: Any = None
        self._most = 0

    def __enter__(self) -> Progress:
        return self

    def show(self, counts: dict[str, int]) -> None:
        if not self._shown:
            return
        left = sum(counts.get(state, 0) for state in UNFINISHED)
        self._most = max(self._most, left)
        if self._bar is None:
            self._bar = bar("finishing")
            self._bar.start()
            self._task = self._bar.add_task("finishing", total=None)
        self._bar.update(self._task, total=max(1, self._most), completed=self._most - left)

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def bar(what: str) -> Any:
    """A progress bar with rate and time left, on standard error."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    from node.cli.output import console

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(for_errors=True),
        transient=True,
    )
