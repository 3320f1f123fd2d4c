"""What the clusters of a simulation have to do: the application, and what each run of its handlers will do."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from node.workers.port import HandlerInfo, Work

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster


def _handler(name: str, kind: str, on_doubt: str, retries: int = 3, ttr_ms: int = 3000) -> HandlerInfo:
    return HandlerInfo(name, kind, "short", False, ttr_ms, retries, 60, 400, on_doubt, "default")


HANDLERS = (
    _handler("pay", "cpu", "check"),
    _handler("mail", "io", "check"),
    _handler("slow", "io", "check", ttr_ms=1200),
    _handler("count", "cpu", "rerun"),
    _handler("crunch", "io", "rerun", ttr_ms=6000),
    _handler("post", "io", "skip"),
    _handler("wire", "io", "hold", ttr_ms=6000),
    _handler("bad", "cpu", "check", retries=1),
)
POLICY = {info.name: info.on_doubt for info in HANDLERS}
CODED = "count"
"""The handler that the code may give a schedule."""
EVERY_MS = (300, 700, 1100, 1900)
CATCH_UPS = ("none", "latest", "all")


def with_schedule(draw: random.Random) -> tuple[HandlerInfo, ...]:
    """The application in a version that declares a schedule."""
    when, catch_up = f"every {draw.choice(EVERY_MS)}ms", draw.choice(CATCH_UPS)
    return tuple(
        msgspec.structs.replace(info, schedule=when, catch_up=catch_up) if info.name == CODED else info
        for info in HANDLERS
    )


@dataclass(frozen=True)
class Plan:
    """What a handler will do this time."""

    before_s: float
    after_s: float
    tell_s: float
    raises: bool = False
    crash: str = ""


def plan(world: Cluster, work: Work) -> Plan:
    draw = world.random
    slow = work.handler in ("slow", "crunch")
    before = (0.1 + 0.4 * draw.random()) if slow else 0.0005 + 0.004 * draw.random()
    if work.handler == "crunch" and draw.random() < 0.3:
        before = 1.0 + 2.0 * draw.random()  # longer than what is left of a lease
    if work.handler in ("crunch", "wire") and world.long_work:
        before = 2.5 + 3.0 * draw.random()  # longer than what is left of a session
    raises = work.handler == "bad" or (work.handler == "mail" and draw.random() < 0.15)
    crash = ""
    # What a human has to rule on is lost more often than most, and again once it was ruled on.
    rate = world.crashy if work.handler != "wire" else 0.6 if work.attempt > 1 else 0.15
    if draw.random() < rate:
        crash = draw.choice(("before", "after", "finished"))
    if work.handler == "slow" and draw.random() < 0.02:
        before = 1.5  # beyond its time-to-run
    return Plan(before, 0.0003 + 0.002 * draw.random(), 0.0002, raises, crash)
