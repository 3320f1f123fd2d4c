"""Crashes that a test plans for runs in its own process."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chaos.testing.loops import beside_the_loop
from chaos.testing.member import NodeDied, WorkerDied
from chaos.testing.places import Place, Walk
from node.workers.calls import Calls
from oncekeeper.context import CurrentTask
from oncekeeper.handlers import Handler


@dataclass
class Plan:
    line: int | None
    at: str
    death: type[WorkerDied]
    file: str
    times: int


class Crashes:
    def __init__(self) -> None:
        self._plans: dict[str, list[Plan]] = {}

    def plan(self, handler: Handler, at: str | int, *, node: bool, times: int) -> None:
        if times < 1:
            raise ValueError(f"times={times} must be at least 1")
        function = inspect.unwrap(handler.function)
        line = None if at in ("start", "end") else _line(function, at)
        death = NodeDied if node else WorkerDied
        plans = self._plans.setdefault(handler.name, [])
        plans.append(Plan(line, str(at), death, function.__code__.co_filename, times))

    def run(self, task: CurrentTask, calls: Calls, arguments: Any) -> object:
        plans = self._plans.get(calls.info.name)
        if not plans:
            return _call(task, calls, arguments)
        plan = plans[0]
        plan.times -= 1
        if not plan.times:
            plans.pop(0)
        if plan.at == "start":
            raise plan.death
        if plan.line is None:
            _call(task, calls, arguments)
            raise plan.death

        def arrive(place: Place) -> None:
            if place.kind == "line" and place.line == plan.line:
                raise plan.death

        return Walk({plan.file}, arrive).run(lambda: _call(task, calls, arguments))


def _call(task: CurrentTask, calls: Calls, arguments: Any) -> object:
    if not calls.info.is_async:
        # In a context of its own: workers leave the current task standing, and the test goes on here.
        return contextvars.copy_context().run(calls.run, task, arguments)
    return beside_the_loop(lambda: asyncio.run(calls.run(task, arguments)))


def _line(function: Callable[..., Any], at: str | int) -> int:
    """The number of the line that is meant. ValueError names what the handler has."""
    source, first = inspect.getsourcelines(function)
    if isinstance(at, int):
        if not first <= at < first + len(source):
            raise ValueError(
                f"at={at} must be a line of the handler, from {first} to {first + len(source) - 1}"
            )
        return at
    found = [first + number for number, text in enumerate(source) if at in text]
    if len(found) != 1:
        raise ValueError(f"at={at!r} must be in exactly one line of the handler, not in {len(found)}")
    return found[0]
