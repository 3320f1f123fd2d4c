"""The application that the fault suite runs by default: its effect is one record in the sink, and nothing else.

So the sink tells exactly what took effect, and the check of each handler is sound: it looks into the sink.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from chaos.sink import EFFECT, START, Sink
from chaos.traps import AFTER, BEFORE, HOME, befall
from oncekeeper import App, current_task

home = Path(os.environ.get(HOME, "chaos-home"))
app = App("chaos")
sink = Sink(home / "effects")


def act() -> None:
    task = current_task()
    sink.append(START, task.id_text, task.fence)
    befall(home, task.id_text, BEFORE)
    sink.append(EFFECT, task.id_text, task.fence)
    befall(home, task.id_text, AFTER)


def has_acted() -> bool:
    return sink.has_effect(current_task().id_text)


@app.task(on_doubt="check", ttr=60, retries=3, retry_delay=0.05)
def write(n: int = 0) -> None:
    act()


@write.check
def was_written(n: int = 0) -> bool:
    return has_acted()


@app.task(on_doubt="check", kind="cpu", ttr=60, retries=3, retry_delay=0.05)
def reckon(n: int = 0) -> int:
    act()
    return n * n


@reckon.check
def was_reckoned(n: int = 0) -> bool:
    return has_acted()


@app.task(on_doubt="check", ttr=60, retries=3, retry_delay=0.05)
async def drift(n: int = 0) -> None:
    await asyncio.sleep(0)
    act()


@drift.check
def has_drifted(n: int = 0) -> bool:
    return has_acted()


class StaleFence(Exception):
    """The sink refused this claim's fence: its holder had lost it."""


@app.task(on_doubt="check", ttr=60, retries=3, retry_delay=0.05)
def fenced(n: int = 0, ms: int = 0) -> None:
    """Takes its time, and then asks the sink whether it still may."""
    task = current_task()
    sink.append(START, task.id_text, task.fence)
    time.sleep(ms / 1000)
    if not sink.append_fenced(task.id_text, task.fence):
        raise StaleFence(f"fence {task.fence} was closed")


@fenced.check
def was_fenced(n: int = 0, ms: int = 0) -> bool:
    task = current_task()
    return sink.close_fence(task.id_text, task.fence)


@app.task(on_doubt="rerun", ttr=60, retries=3, retry_delay=0.05)
def unfenced(n: int = 0, ms: int = 0) -> None:
    """The same on a sink that takes whatever comes."""
    task = current_task()
    sink.append(START, task.id_text, task.fence)
    time.sleep(ms / 1000)
    sink.append(EFFECT, task.id_text, task.fence)


@app.task(on_doubt="rerun", ttr=60, retries=3, retry_delay=0.05)
def again(n: int = 0) -> None:
    act()


@app.task(on_doubt="skip", ttr=60)
def at_most(n: int = 0) -> None:
    act()


@app.task(on_doubt="hold", ttr=60)
def careful(n: int = 0) -> None:
    act()


@app.task(on_doubt="check", ttr=0.5, retries=3, retry_delay=0.05)
def hasty(n: int = 0) -> None:
    act()


@hasty.check
def was_hasty(n: int = 0) -> bool:
    return has_acted()


@app.task(on_doubt="check", kind="cpu", ttr=0.5, retries=3, retry_delay=0.05)
def hasty_reckon(n: int = 0) -> None:
    act()


@hasty_reckon.check
def was_hasty_reckoned(n: int = 0) -> bool:
    return has_acted()
