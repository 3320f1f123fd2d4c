"""The application under the tests with real clusters. Its home, given by the environment, is outside the cluster.

A task does one effect: a record in the sink. What else befalls it is said by ``do`` ("PLACE:DEED"), and happens
once, to whoever takes the trap ``HOME/traps/NAME`` away: the second attempt finds none, and just does its effect.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from oncekeeper import App, current_task
from tests.support.real_sink import Sink

HOME = Path(os.environ["ONCE_TEST_HOME"])
app = App("real")
sink = Sink(HOME / "effects")


def befall(name: str, do: str, place: str) -> None:
    """Do the deed if it is for this place and its trap is still set."""
    where, _, deed = do.partition(":")
    if where != place:
        return
    try:
        (HOME / "traps" / name).unlink()
    except FileNotFoundError:
        return
    if deed == "kill_node":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # the kernel kills us with our parent
    elif deed == "kill_me":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "segfault":
        ctypes.string_at(0)
    elif deed == "exit":
        os._exit(3)
    elif deed == "system_exit":
        sys.exit(3)
    elif deed == "hang":
        time.sleep(600)
    elif deed == "eat":
        hoard = []
        while True:
            hoard.append(bytearray(os.urandom(1) * (8 << 20)))
    elif deed == "raise":
        raise RuntimeError("as told")
    elif deed == "wait":
        note = HOME / "caught" / name
        note.with_suffix(".new").write_text(f"{os.getpid()} {os.getppid()}")
        note.with_suffix(".new").rename(note)
        while not (HOME / "released" / name).exists():
            time.sleep(0.005)
    else:
        raise ValueError(f"do={do!r}")


def effect(name: str, do: str) -> None:
    befall(name, do, "before")
    task = current_task()
    sink.append(task.id_text, task.fence)
    befall(name, do, "after")


@app.task(on_doubt="check", ttr=60, retries=3, retry_delay=0.05)
def once(name: str, do: str = "") -> str:
    effect(name, do)
    return name


@once.check
def was_once(name: str, do: str = "") -> bool:
    return sink.has(current_task().id_text)


@app.task(on_doubt="check", kind="cpu", ttr=60, retries=3, retry_delay=0.05)
def reckon(name: str, do: str = "") -> str:
    effect(name, do)
    return name


@reckon.check
def was_reckoned(name: str, do: str = "") -> bool:
    return sink.has(current_task().id_text)


@app.task(on_doubt="check", ttr=60, retries=3, retry_delay=0.05)
async def drift(name: str, do: str = "") -> str:
    await asyncio.sleep(0)
    effect(name, do)
    return name


@drift.check
def was_drifted(name: str, do: str = "") -> bool:
    return sink.has(current_task().id_text)


@app.task(on_doubt="check", ttr=0.3, retries=3, retry_delay=0.05)
def hasty(name: str, do: str = "") -> str:
    """As ``once``, with a deadline that a hanging one meets soon."""
    effect(name, do)
    return name


@hasty.check
def was_hasty(name: str, do: str = "") -> bool:
    return sink.has(current_task().id_text)


@app.task(on_doubt="rerun", ttr=60, retries=3, retry_delay=0.05)
def again(name: str, do: str = "") -> None:
    effect(name, do)


@app.task(on_doubt="skip", ttr=60)
def atmost(name: str, do: str = "") -> None:
    effect(name, do)


@app.task(on_doubt="hold", ttr=60)
def careful(name: str, do: str = "") -> None:
    effect(name, do)


@app.task(on_doubt="check", retries=2, retry_delay=0.05)
def stubborn(name: str) -> None:
    """Fails until somebody mends it."""
    with open(HOME / "tries", "a") as tries:
        tries.write(f"{name}\n")
    if not (HOME / "mended").exists():
        raise RuntimeError("not mended yet")
    effect(name, "")


@stubborn.check
def was_stubborn(name: str) -> bool:
    return sink.has(current_task().id_text)
