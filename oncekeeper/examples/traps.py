"""Places in a handler where a demonstration may stop a worker process, in order to kill it there.

Whoever wants that puts a file into ``HOME/traps``. The first to come by removes it, so that a second
attempt passes, writes its pid to ``HOME/caught``, and waits to be killed. Without such a file this is one
failing system call.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

WAIT_S_MAX = 20.0


def set_trap(home: Path, place: str) -> None:
    for folder in ("traps", "caught"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "traps" / place).touch()


def caught(home: Path) -> dict[str, int]:
    """The places where a process waits to be killed, with its pid. Each is told once."""
    found: dict[str, int] = {}
    for path in sorted((home / "caught").glob("[!.]*")):
        found[path.name] = int(path.read_text())
        path.unlink()
    return found


def pause_if_told(home: Path, place: str) -> None:
    try:
        (home / "traps" / place).unlink()
    except FileNotFoundError:
        return
    note = home / "caught" / f".{place}"
    note.write_text(str(os.getpid()))
    note.rename(home / "caught" / place)
    deadline = time.monotonic() + WAIT_S_MAX
    while time.monotonic() < deadline:
        time.sleep(0.01)
