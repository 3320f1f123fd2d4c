"""`oncekeeper kafka up|down|status`: one Kafka broker, or three, on this machine, for trying out and for tests.

Loaded by the command line through the entry point group ``oncekeeper.commands``, and only when it is asked for.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.cli.output import (
    BAD_USAGE,
    DONE,
    FAILED,
    UNREACHABLE,
    CliError,
    JsonOption,
    note,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from node.kafkaup.broker import Kafka

PORT = 9092  # Kafka's own
LOOK_S = 0.2

kafka_app = typer.Typer(help="Kafka brokers of this machine, for trying out.", no_args_is_help=True)

DirOption = Annotated[
    Path, typer.Option("--dir", help="Where the brokers keep their data.", show_default=True)
]
DIRECTORY = Path("oncekeeper-kafka")


@kafka_app.command("up")
def up(
    brokers: Annotated[int | None, typer.Option("--brokers", help="1 or 3; 1 for a new directory.")] = None,
    dir: DirOption = DIRECTORY,
    port: Annotated[
        int | None,
        typer.Option("--port", help=f"The first broker's; 0: free ones. {PORT} for a new directory."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the brokers answer.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds until the brokers must answer.")] = 90.0,
    json: JsonOption = False,
) -> int:
    """Start one Kafka broker, or three; an existing directory is resumed with all that is in it."""
    kafka = _opened(dir, brokers, port)
    if detach:
        kafka.start(attached=False, timeout_s=timeout)
        _tell_up(kafka, json)
        return DONE
    kafka.start(timeout_s=timeout)
    stops: list[int] = []
    # Whoever stops a service, or closes its terminal, means the same as Ctrl-C. A second one changes nothing:
    # it must not leave a broker half stopped.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: stops.append(number))
    _tell_up(kafka, json)
    if not json:
        note("Ctrl-C stops it" if len(kafka.brokers) == 1 else "Ctrl-C stops them")
    return _stand_by(kafka, stops)


def _opened(directory: Path, brokers: int | None, port: int | None) -> Kafka:
    from node.cluster import Locked
    from node.kafkaup.broker import Kafka
    from node.kafkaup.layout import BROKERS, FILE

    if brokers not in (None, *BROKERS):
        raise CliError(f"brokers={brokers} must be {' or '.join(map(str, BROKERS))}", BAD_USAGE)
    if port is not None and not 0 <= port <= 65_533:
        raise CliError(f"port={port} must be from 1 to 65533, or 0 for free ones", BAD_USAGE)
    if not (directory / FILE).exists():
        return Kafka.create(directory, brokers=brokers or 1, port=PORT if port is None else port)
    kafka = Kafka.open(directory)
    if running := kafka.running:
        pids = ", ".join(f"broker {each.number} is process {each.pid}" for each in running)
        raise Locked(
            f"the brokers of {kafka.dir} are up already ({pids}); stop them with: oncekeeper kafka down"
        )
    if brokers not in (None, len(kafka.brokers)):
        raise CliError(
            f"brokers={brokers}: {kafka.dir} was made with {len(kafka.brokers)}; name another directory",
            BAD_USAGE,
        )
    if port:
        kafka.set_port(port)
    return kafka


def _stand_by(kafka: Kafka, stops: Sequence[int]) -> int:
    """Until we are told to stop, or a broker ends by itself. The brokers are stopped in any case."""
    from node.kafkaup.broker import EXIT_ASKED

    ended = None
    while ended is None and not stops:
        time.sleep(LOOK_S)
        ended = next((each for each in kafka.brokers.values() if each.exit_code is not None), None)
    killed = kafka.stop()
    if killed:
        note(f"did not stop in time and were killed: {', '.join(map(str, killed))}")
    if ended is not None and ended.exit_code not in EXIT_ASKED:
        raise CliError(f"broker {ended.number} ended with {ended.exit_code}. It said:\n{ended.said()}")
    return DONE


@kafka_app.command("down")
def down(
    dir: DirOption = DIRECTORY,
    timeout: Annotated[
        float, typer.Option(help="Seconds until a broker that does not stop is killed.")
    ] = 20.0,
    json: JsonOption = False,
) -> int:
    """Stop the brokers. What they hold stays in the directory."""
    from node.kafkaup.broker import Kafka

    kafka = Kafka.open(dir)
    stopped = [each.number for each in kafka.running]
    killed = kafka.stop(timeout)
    if json:
        print_json({"dir": str(kafka.dir), "stopped": stopped, "killed": killed})
    elif stopped:
        print(f"stopped {_named(stopped)} of {kafka.dir}")
    else:
        print(f"nothing is running in {kafka.dir}")
    if killed:
        note(f"did not stop within {timeout:g} s and were killed: {_named(killed)}")
    return FAILED if killed else DONE


def _named(numbers: list[int]) -> str:
    return ", ".join(f"broker {each}" for each in numbers)


@kafka_app.command("status")
def status(dir: DirOption = DIRECTORY, json: JsonOption = False) -> int:
    """Each broker's process and address, and whether it answers; 3 if none does."""
    from node.kafkaup.broker import Kafka

    document = _document(Kafka.open(dir))
    if json:
        print_json(document)
    else:
        rows = [
            (each["broker"], each["pid"], each["address"], each["answers"], each["rss_mb"], each["log"])
            for each in document["brokers"]
        ]
        print_table(("broker", "pid#", "address", "answers", "MB#", "log"), rows)
    return DONE if any(each["answers"] for each in document["brokers"]) else UNREACHABLE


def _tell_up(kafka: Kafka, as_json: bool) -> None:
    document = _document(kafka)
    if as_json:
        print_json(document)
        return
    print(f"bootstrap.servers={document['bootstrap']}")
    note(f"data is in {kafka.dir}; for a cluster: --log {document['url']}")


def _document(kafka: Kafka) -> dict[str, Any]:
    rows = []
    for each in kafka.brokers.values():
        # It answers when it counts itself among the living.
        answers = each.up and each.number in each.alive()
        rows.append(
            {
                "broker": each.number,
                "pid": each.pid or None,
                "address": f"127.0.0.1:{each.port()}",
                "answers": answers,
                "rss_mb": round(each.rss_bytes / 1e6) or None,
                "log": str(each.log),
            }
        )
    bootstrap = kafka.bootstrap()
    return {"dir": str(kafka.dir), "bootstrap": bootstrap, "url": f"kafka://{bootstrap}", "brokers": rows}
