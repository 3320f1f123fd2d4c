"""What befalls one task, at one place, once: to whoever takes the trap away. The next attempt finds none.

A trap is a file named by the task's id that says PLACE:DEED. Without one this is a failing system call.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

BEFORE, AFTER = "before", "after"
"""The task's effect."""
HOME = "CHAOS_HOME"
"""The environment variable with the directory of traps and sink."""


def set_trap(home: Path, id_text: str, place: str, deed: str) -> None:
    part = home / "traps" / f".{id_text}"
    part.write_text(f"{place}:{deed}")
    part.rename(home / "traps" / id_text)


def is_taken(home: Path, id_text: str) -> bool:
    return not (home / "traps" / id_text).exists()


def befall(home: Path, id_text: str, place: str) -> None:
    trap = home / "traps" / id_text
    try:
        where, _, deed = trap.read_text().partition(":")
        if where != place:
            return
        trap.unlink()
    except FileNotFoundError:
        return
    DEEDS[deed](home, id_text)


def _kill_node(home: Path, id_text: str) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)  # the kernel kills us with our parent


def _kill_worker(home: Path, id_text: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash(home: Path, id_text: str) -> None:
    ctypes.string_at(0)


def _hang(home: Path, id_text: str) -> None:
    time.sleep(600)


def _hold_interpreter(home: Path, id_text: str) -> None:
    # Called as a part of the interpreter, which does not let go of its lock meanwhile.
    ctypes.PyDLL(None).sleep(600)


def _eat_memory(home: Path, id_text: str) -> None:
    hoard = []
    while True:
        hoard.append(bytearray(os.urandom(1) * (8 << 20)))


def _fail(home: Path, id_text: str) -> None:
    raise RuntimeError("as told")


def _wait(home: Path, id_text: str) -> None:
    """Until it is released, or for a minute."""
    (home / "caught" / id_text).write_text(f"{os.getpid()} {os.getppid()}")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (home / "released" / id_text).exists():
        time.sleep(0.01)


DEEDS = {
    "kill_node": _kill_node,
    "kill_worker": _kill_worker,
    "crash": _crash,
    "hang": _hang,
    "hold_interpreter": _hold_interpreter,
    "eat_memory": _eat_memory,
    "fail": _fail,
    "wait": _wait,
}
