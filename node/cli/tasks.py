"""`submit`, `task show|cancel|retry|list` and `why`."""

from __future__ import annotations

import getpass
import re
import sys
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from dedup.ids import parse_id
from node.cli.connection import Api, connect, quoted
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
from node.cli.watching import bar

BATCH_TASKS = 2_000
BATCH_BYTES = 1 << 20
COUNT_MAX = 100_000_000
RESCHEDULE_S = 20.0  # nodes that do not answer are waited for until their leases are over

task_app = typer.Typer(help="Single tasks.", no_args_is_help=True)

Placed = tuple[str, dict[str, Any]]  # where a task stands in the user's file ("": nowhere), and the task


class Then(StrEnum):
    RUN = "run"
    ENQUEUE = "enqueue"


class State(StrEnum):
    WAITING = "waiting"
    DELAYED = "delayed"
    RUNNING = "running"
    SUSPECT = "suspect"
    EXECUTED = "executed"
    DEAD = "dead"
    CANCELLED = "cancelled"


IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Digits, or k and 32 hexadecimal digits.")]
IdArguments = Annotated[
    list[str], typer.Argument(metavar="ID...", help="Digits, or k and 32 hexadecimal digits each.")
]


# --- submit ---------------------------------------------------------------------------------------


def submit(
    handler: Annotated[str | None, typer.Argument(help="As in `shop.charge`; optional with --file.")] = None,
    body: Annotated[
        str | None, typer.Option("--body", help="A JSON object: the handler's arguments.")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="Idempotency key: the same key runs once.")] = None,
    ttr: Annotated[str | None, typer.Option("--ttr", help="Time to run, as in 30s.")] = None,
    queue: Annotated[str | None, typer.Option("--queue", help="Instead of the handler's own queue.")] = None,
    delay: Annotated[
        str | None, typer.Option("--delay", help="Not before so long from now: 10s, 30m, 2d.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", help="Not before this time, with its zone: 2026-12-24T18:00:00+01:00."),
    ] = None,
    then: Annotated[
        Then | None,
        typer.Option(
            "--then", help="When it is due: run at once (the default), or take its turn in the queue."
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", help="Submit the same body so many times.")] = 1,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="JSON Lines: one task message with a body a line; - is standard input."),
    ] = None,
    cluster: ClusterOption = None,
    json: JsonOption = False,
) -> int:
    """Submit tasks. It returns when they are stored durably."""
    common: dict[str, Any] = {}
    if handler is not None:
        common["handler"] = handler
    if queue is not None:
        common["queue"] = queue
    if ttr is not None:
        common["ttr_ms"] = duration_ms("ttr", ttr)
    if (due := due_text(delay, at)) is not None:
        common["due"] = due
    if then is not None:
        if due is None and file is None:
            raise CliError(
                "--then goes with --delay or --at: it says what happens when the task is due", BAD_USAGE
            )
        common["then"] = then.value
    if file is not None:
        if body is not None or key is not None or count != 1:
            raise CliError(
                "--file goes with neither --body nor --key nor --count: its lines say that", BAD_USAGE
            )
        tasks, total = _file_tasks(file, common), _lines_in(file)
    else:
        tasks, total = (("", task) for task in _same_tasks(common, body, key, count)), count
    api = connect(cluster)
    ids, duplicates, past = _submit_all(
        api, tasks, total, shown=not json and sys.stderr.isatty() and total > BATCH_TASKS
    )
    if json:
        print_json({"ids": ids, "duplicates": duplicates} | ({"past": past} if past else {}))
        return DONE
    if past:
        note(
            "due lies in the past: it runs now"
            if past == 1
            else f"{past:,} due times lie in the past: they run now"
        )
    if len(ids) == 1:
        print(ids[0] if not duplicates else f"{ids[0]} (was there already)")
    else:
        print(
            f"submitted {len(ids):,} tasks" + (f", {duplicates:,} were there already" if duplicates else "")
        )
        if ids:
            print(f"from {ids[0]} to {ids[-1]}")
    return DONE


def due_text(delay: str | None, at: str | None, name: str = "at") -> str | None:
    """The due time that was chosen, as a message says it; a delay counts from now, by this machine's clock."""
    if delay is not None and at is not None:
        raise CliError("--delay goes with no --at: a task has one time", BAD_USAGE)
    if delay is None and at is None:
        return None
    # Not at the top: most commands have no use for them, and a person waits for their import.
    from oncekeeper.dues import time_chosen
    from oncekeeper.envelope import time_text
    from oncekeeper.errors import InvalidTask

    now_ms = time.time_ns() // 1_000_000
    try:
        due_ms = time_chosen(delay, at, now_ms)
    except InvalidTask as error:
        field = name if error.field == "due" else error.field
        raise CliError(f"{field}: {error.rule}", BAD_USAGE) from error
    return time_text(due_ms)


def duration_ms(name: str, text: str) -> int:
    from oncekeeper import durations

    stripped = text.strip()
    try:
        milliseconds = durations.duration_ms(stripped + "s" if stripped[-1:].isdigit() else stripped)
    except ValueError:
        raise CliError(
            f"{name}={text} must be a duration above 0, as in 500ms, 30s, 5m or 1h", BAD_USAGE
        ) from None
    if milliseconds < 1:
        raise CliError(f"{name}={text} must be at least 1ms", BAD_USAGE)
    return milliseconds


def _same_tasks(
    common: dict[str, Any], body: str | None, key: str | None, count: int
) -> Iterator[dict[str, Any]]:
    if "handler" not in common:
        raise CliError(
            "handler is missing: name it, as in `oncekeeper submit shop.charge --body …`", BAD_USAGE
        )
    if not 1 <= count <= COUNT_MAX:
        raise CliError(f"count={count} must be from 1 to {COUNT_MAX}", BAD_USAGE)
    if key is not None and count != 1:
        raise CliError(f"key={key} names one task, so count={count} must be 1", BAD_USAGE)
    message = common | {"body": body_of(body)}
    if key is not None:
        message["key"] = key
    return (dict(message) for _ in range(count))


def body_of(text: str | None) -> object:
    """What ``--body`` says; CliError if that is no object."""
    if text is None:
        return {}
    try:
        body = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise CliError(f"body={text} is no JSON: {error}", BAD_USAGE) from error
    if not isinstance(body, dict):
        raise CliError(f"body={text} must be a JSON object: the handler's arguments by name", BAD_USAGE)
    return body


def _lines_in(file: Path) -> int:
    """For the progress bar; 0 if it cannot be known."""
    if str(file) == "-":
        return 0
    with file.open("rb") as opened:
        return sum(block.count(b"\n") for block in iter(lambda: opened.read(1 << 20), b""))


def _file_tasks(file: Path, common: dict[str, Any]) -> Iterator[Placed]:
    """Every line is checked for its form before the first is sent."""
    if str(file) != "-" and not file.is_file():
        raise CliError(f"file={file}: there is no such file", BAD_USAGE)
    if str(file) == "-":
        lines = sys.stdin.buffer.read().splitlines()
        return iter([_line_task(line, at, file, common) for at, line in enumerate(lines, 1) if line.strip()])
    with file.open("rb") as opened:
        for at, line in enumerate(opened, 1):
            if line.strip():
                _line_task(line, at, file, common)
    return _again(file, common)


def _again(file: Path, common: dict[str, Any]) -> Iterator[Placed]:
    with file.open("rb") as opened:
        for at, line in enumerate(opened, 1):
            if line.strip():
                yield _line_task(line, at, file, common)


def _line_task(line: bytes, at: int, file: Path, common: dict[str, Any]) -> Placed:
    where = f"{file}, line {at}"
    try:
        message = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise CliError(f"{where}: is no JSON: {error}; nothing was submitted", BAD_USAGE) from error
    if not isinstance(message, dict) or not isinstance(message.get("body"), dict):
        raise CliError(
            f'{where}: body must be an object, as in {{"body": {{…}}}}; nothing was submitted', BAD_USAGE
        )
    message = common | message
    if not isinstance(message.get("handler"), str):
        raise CliError(f"{where}: handler is missing, here and as argument; nothing was submitted", BAD_USAGE)
    return where, message


def _submit_all(api: Api, tasks: Iterator[Placed], total: int, shown: bool) -> tuple[list[str], int, int]:
    ids: list[str] = []
    duplicates = past = 0
    progress = bar("submitting") if shown else None
    if progress is not None:
        progress.start()
        meter = progress.add_task("submitting", total=total or None)
    try:
        for batch in _batches(tasks):
            try:
                answer = api.post_lines("/v1/tasks", _numbered(api, [task for _, task in batch]))
            except CliError as refused:
                error = _in_place(refused, batch)
                if ids:
                    # Say what stands, so that a second try can leave it out.
                    raise CliError(
                        f"{error}; {len(ids)} tasks were stored before, the last is {ids[-1]}", error.code
                    ) from refused
                raise error from refused
            ids += answer["ids"]
            duplicates += answer.get("duplicates", 0)
            past += answer.get("past", 0)
            if progress is not None:
                progress.update(meter, completed=len(ids))
    finally:
        if progress is not None:
            progress.stop()
    return ids, duplicates, past


def _in_place(error: CliError, batch: list[Placed]) -> CliError:
    """The node speaks of the tasks of one request by number; the user knows them by their lines."""
    matched = re.match(r"tasks\[(\d+)\]\.?", str(error))
    if not matched or int(matched[1]) >= len(batch):
        return error
    place = batch[int(matched[1])][0]
    text = str(error)[matched.end() :]
    return CliError(f"{place}: {text}" if place else text, error.code, **error.details)


def _batches(tasks: Iterator[Placed]) -> Iterator[list[Placed]]:
    batch: list[Placed] = []
    size = 0
    for place, task in tasks:
        batch.append((place, task))
        size += len(msgspec.json.encode(task["body"])) if len(batch) % 16 == 1 else 0
        if len(batch) >= BATCH_TASKS or size * 16 >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _numbered(api: Api, batch: list[dict[str, Any]]) -> list[bytes]:
    """Ids are fixed before the first send: what is sent again, because no answer came, is then no second task."""
    wanting = [task for task in batch if "key" not in task and "id" not in task]
    at = 0
    while at < len(wanting):
        given = api.post("/v1/ids", {"count": len(wanting) - at})
        for number in range(given["start"], given["start"] + given["count"]):
            wanting[at]["id"] = str(number)
            at += 1
            if at == len(wanting):
                break
    return [msgspec.json.encode(task) for task in batch]


# --- single tasks ---------------------------------------------------------------------------------


def checked_id(text: str) -> str:
    try:
        parse_id(text)
    except ValueError as error:
        raise CliError(str(error), BAD_USAGE) from error
    return text


def task_path(text: str) -> str:
    return f"/v1/tasks/{quoted(checked_id(text))}"


@task_app.command("show")
def show(task_id: IdArgument, cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """What is known of a task."""
    path = task_path(task_id)
    answer = connect(cluster).get(path)
    if json:
        print_json(answer)
        return DONE
    rows = [(key, _shown(value)) for key, value in answer.items() if value not in (None, "", [], {})]
    print_table(("field", "value"), rows)
    return DONE


def _shown(value: Any) -> object:
    # Numbers are names here (fences, offsets): no thousands separators.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


@task_app.command("cancel")
def cancel(task_ids: IdArguments, cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """Delete tasks before they start."""
    return _steer("cancel", "is cancelled: it will not start", task_ids, cluster, json)


@task_app.command("reschedule")
def reschedule(
    task_ids: IdArguments,
    delay: Annotated[str | None, typer.Option("--delay", help="So long from now: 10s, 30m, 2d.")] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="At this time, with its zone: 2026-12-24T18:00:00+01:00.")
    ] = None,
    cluster: ClusterOption = None,
    json: JsonOption = False,
) -> int:
    """Let delayed tasks run at another time."""
    due = due_text(delay, at)
    if due is None:
        raise CliError("give --delay or --at: when shall it run?", BAD_USAGE)
    done = f"runs at {due}, and not before"
    return _steer("reschedule", done, task_ids, cluster, json, {"due": due}, RESCHEDULE_S)


@task_app.command("retry")
def retry(task_ids: IdArguments, cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """Let dead or cancelled tasks run again, from their first attempt."""
    return _steer("retry", "may run again", task_ids, cluster, json)


def _steer(
    verb: str,
    done: str,
    task_ids: list[str],
    cluster: str | None,
    json: bool,
    more: dict[str, Any] | None = None,
    more_s: float = 0.0,
) -> int:
    """Ask for each task in turn. What one is refused does not keep the others from it, but fails the command."""
    paths = {task_id: task_path(task_id) for task_id in task_ids}
    api = connect(cluster)
    who = {"by": getpass.getuser(), **(more or {})}
    answers: list[dict[str, Any]] = []
    refused: list[CliError] = []
    for task_id, path in paths.items():
        try:
            answers.append(api.post(f"{path}/{verb}", who, more_s))
        except CliError as error:
            if len(paths) == 1 or error.code != FAILED:
                raise
            refused.append(CliError(f"{task_id}: {error}", error.code, **error.details))
            answers.append({"id": task_id, "error": str(error), **error.details})
            continue
        if not json:
            print(f"{task_id} {done}")
    if json:
        print_json(answers[0] if len(paths) == 1 else answers)
    for each in refused:
        note(str(each))
    return FAILED if refused else DONE


@task_app.command("list")
def list_tasks(
    state: Annotated[State | None, typer.Option("--state")] = None,
    queue: Annotated[str | None, typer.Option("--queue")] = None,
    due_before: Annotated[
        str | None,
        typer.Option("--due-before", help="Delayed ones that are due within so long (1h), or up to a time."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="At most so many.")] = 100,
    after: Annotated[str | None, typer.Option("--after", help="The `next` of the page before.")] = None,
    cluster: ClusterOption = None,
    json: JsonOption = False,
) -> int:
    """Tasks, by state and queue; delayed ones in the order of their due times."""
    if limit < 1:
        raise CliError(f"limit={limit} must be at least 1", BAD_USAGE)
    more: dict[str, Any] = {}
    if due_before is not None:
        if state is not State.DELAYED:
            raise CliError("--due-before goes with --state delayed", BAD_USAGE)
        is_time = "-" in due_before or "T" in due_before
        delay, at = (None, due_before) if is_time else (due_before, None)
        more["due_before"] = due_text(delay, at, "due-before")
    answer = connect(cluster).get("/v1/tasks", state=state, queue=queue, limit=limit, after=after, **more)
    if json:
        print_json(answer)
        return DONE
    print_tasks(answer["tasks"], *(("due",) if state is State.DELAYED else ()))
    if answer.get("next"):
        note(f"there are more: --after {answer['next']}")
    return DONE


def print_tasks(rows: list[dict[str, Any]], *more: str) -> None:
    columns = ("id", "state", "queue", "handler", "attempt#", "node", "error", *more)
    print_table(columns, [[row.get(name.rstrip("#")) for name in columns] for row in rows])


def why(task_id: IdArgument, cluster: ClusterOption = None, json: JsonOption = False) -> int:
    """The whole story of one task."""
    path = task_path(task_id)
    answer = connect(cluster).get(f"{path}/why")
    if json:
        print_json(answer)
        return DONE
    for sentence in answer["story"]:
        print(sentence)
    return DONE
