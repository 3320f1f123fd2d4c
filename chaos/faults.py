"""Faults come in pairs, and the healer always runs: after an error, at Ctrl-C, and though another healer failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from chaos.history import Fault as Struck
from chaos.history import History

_log = logging.getLogger("oncekeeper.chaos")


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Fault:
    """``where``: the nodes ("n1") and links ("n2-n1") it strikes. ``heal`` must be safe after half a ``strike``."""

    name: str
    where: tuple[str, ...]
    strike: Callable[[], None]
    heal: Callable[[], None]


class Faults:
    """The faults that stand, and their record."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._standing: list[Fault] = []

    def strike(self, fault: Fault) -> int:
        """When it struck, in ns. It stands until ``heal``."""
        self._standing.append(fault)
        at_ns = now_ns()
        self._history.faults.append(Struck(at_ns, "FAULT", fault.name, fault.where))
        fault.strike()
        return at_ns

    def heal(self, fault: Fault) -> int:
        self._standing.remove(fault)
        fault.heal()
        at_ns = now_ns()
        self._history.faults.append(Struck(at_ns, "HEAL", fault.name, fault.where))
        return at_ns

    @contextmanager
    def standing(self, fault: Fault) -> Iterator[int]:
        try:
            yield self.strike(fault)
        finally:
            if fault in self._standing:
                self.heal(fault)

    def heal_all(self) -> None:
        """The last one first. A healer that fails is told, and the others run all the same."""
        for fault in reversed(self._standing[:]):
            try:
                self.heal(fault)
            except Exception:  # noqa: BLE001  # told, and the rest goes on
                # What it stood on is about to be ended anyway; the others must not stay standing for it.
                _log.exception("%s could not be healed", fault.name)
