"""`demo`: three nodes, a leader that is killed, and an account of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from node.cli.output import BAD_USAGE, DONE, FAILED, CliError, JsonOption, print_json

ORDERS_MIN = 100  # fewer are done before anything can be killed
ORDERS_MAX = 10_000_000


def demo(
    orders: Annotated[int, typer.Option("--orders", help="How many orders are charged.")] = 20_000,
    dir: Annotated[
        Path | None, typer.Option("--dir", help="Keep everything there; by default a temporary directory.")
    ] = None,
    log: Annotated[
        str,
        typer.Option(
            "--log",
            help="The task log: embedded; kafka (a broker of its own, which is killed too); or kafka://HOST:PORT.",
        ),
    ] = "embedded",
    json: JsonOption = False,
) -> int:
    """Three nodes charge orders while the leader and workers are killed; the money is then counted."""
    if not ORDERS_MIN <= orders <= ORDERS_MAX:
        raise CliError(f"orders={orders} must be from {ORDERS_MIN} to {ORDERS_MAX}", BAD_USAGE)
    if dir is not None and dir.exists() and (not dir.is_dir() or any(dir.iterdir())):
        raise CliError(f"dir={dir} must be new or empty: the demo counts what it finds there", BAD_USAGE)
    from node.demo.run import run_demo
    from node.kafkaup.trial import check_log

    check_log(log)
    outcome = run_demo(orders, dir, json, log)
    if json:
        print_json(outcome.document())
    return DONE if outcome.is_right else FAILED
