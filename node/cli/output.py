"""What a command says: to a person as text and tables, or to a program as one JSON document."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

if TYPE_CHECKING:
    from rich.console import Console

DONE = 0
FAILED = 1
BAD_USAGE = 2
UNREACHABLE = 3
INTERRUPTED = 130  # as shells have it: 128 + SIGINT; typer answers Ctrl-C with it

JsonOption = Annotated[bool, typer.Option("--json", help="Exactly one JSON document on standard output.")]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        "-c",
        envvar="ONCEKEEPER_CLUSTER",
        show_envvar=True,
        help="A data directory of this machine, or node addresses (http://HOST:PORT,…). "
        "By default ./oncekeeper-data.",
    ),
]


class CliError(Exception):
    """Ends the command with a message and an exit code."""

    def __init__(self, message: str, code: int = FAILED, **details: object) -> None:
        super().__init__(message)
        self.code = code
        self.details = details


def print_json(document: object) -> None:
    sys.stdout.write(msgspec.json.encode(document).decode() + "\n")
    sys.stdout.flush()


def console(*, for_errors: bool = False) -> Console:
    from rich.console import Console

    made = Console(stderr=for_errors, highlight=False)
    if not made.is_terminal:
        made.width = 200  # a pipe has no width; cutting what goes into grep would hide it
    return made


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Columns whose name ends in ``#`` are numbers, set to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for name in columns:
        table.add_column(name.rstrip("#"), justify="right" if name.endswith("#") else "left", overflow="fold")
    for row in rows:
        # As text, not as markup: a body or an error may hold brackets.
        table.add_row(*(Text(cell_text(cell)) for cell in row))
    console().print(table)


def cell_text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, dict | list):
        return msgspec.json.encode(cell).decode()
    return str(cell)


def note(text: str) -> None:
    """For people who watch; never on standard output."""
    print(text, file=sys.stderr, flush=True)
