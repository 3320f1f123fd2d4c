"""A tiny application for tests of the command line, and a way to run commands as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from node.supervisor import child_environment

APP = """
from oncekeeper import App

app = App("mini")


@app.task(on_doubt="rerun")
def add(a: int, b: int) -> int:
    return a + b


@app.task(on_doubt="rerun", retries=0)
def fail() -> None:
    raise RuntimeError("as told")
"""


def write_app(folder: Path) -> None:
    (folder / "mini.py").write_text(APP)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from node.cli import main; main()", *arguments]


def oncekeeper(folder: Path, *arguments: str, expect: int = 0) -> Any:
    """Run a command with --json in a folder; its document."""
    ran = subprocess.run(
        command(*arguments, "--json"),
        cwd=folder,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == expect, f"{arguments}: {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return json.loads(ran.stdout)


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
