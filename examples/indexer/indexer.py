"""An index of Python files, one task a file.

The result of a file is one row in a SQLite database. ``checks.sql`` records the task's id in the transaction that
inserts the row, so afterwards the database itself can tell whether a file was indexed.

``examine`` is a plain function without effects: the serial loop in run.py calls it too.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Integer, MetaData, Table, Text, create_engine, event, insert
from sqlalchemy.schema import CreateTable

from oncekeeper import App, checks

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
RESULTS = Path(os.environ.get("INDEXER_RESULTS", "index.db")).absolute()
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}

app = App("indexer")

# No unique constraint: should a file be indexed twice, both rows are to be seen.
files = Table(
    "files",
    MetaData(),
    Column("row", Integer, primary_key=True),
    Column("path", Text, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("lines", Integer, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("functions", Integer, nullable=False),
    Column("classes", Integer, nullable=False),
    Column("identifiers", Integer, nullable=False),  # different ones
    Column(
        "error", Text, nullable=False
    ),  # why the file is no Python; some of the library's own tests are none
)
engine = create_engine(f"sqlite:///{RESULTS}", connect_args={"timeout": 30})


@event.listens_for(engine, "connect")
def _prepare(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")  # survives kill -9; FULL would survive a power cut, too
    connection.execute(str(CreateTable(files, if_not_exists=True).compile(engine)))


def library_files() -> list[str]:
    """Every .py file of the standard library, as a path relative to it."""
    found = (path.relative_to(LIBRARY) for path in LIBRARY.rglob("*.py"))
    return sorted(str(path) for path in found if not NOT_THE_LIBRARY & set(path.parts))


def examine(path: str) -> Mapping[str, str | int]:
    """What the index says of a file."""
    content = (LIBRARY / path).read_bytes()
    counts, error = {"functions": 0, "classes": 0, "identifiers": 0}, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like, in files that test for them
            tree = ast.parse(content)
        counts = _counts(tree)
    except (SyntaxError, ValueError, RecursionError) as wrong:
        error = type(wrong).__name__
    return {
        "path": path,
        "bytes": len(content),
        "lines": content.count(b"\n"),
        "sha256": hashlib.sha256(content).hexdigest(),
        **counts,
        "error": error,
    }


def _counts(tree: ast.AST) -> dict[str, int]:
    functions = classes = 0
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                functions += 1
                names.add(name)
            case ast.ClassDef(name=name):
                classes += 1
                names.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                names.add(name)
            case _:
                pass
    return {"functions": functions, "classes": classes, "identifiers": len(names)}


@app.task(kind="cpu", ttr=60, on_doubt=checks.sql(engine))
def index(path: str) -> None:
    row = examine(path)
    with engine.begin() as transaction:
        transaction.execute(insert(files).values(**row))
