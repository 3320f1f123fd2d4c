"""How a test measures the effect of a task, by means of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from chaos.testing.report import MORE, NONE, ONCE, PART


class OracleError(Exception):
    """The measure does not say what it must say when nothing is in doubt."""


class Oracle(Protocol):
    def expect_none(self, values: Mapping[str, Any], *, fresh_arguments: bool) -> None:
        """Raise OracleError unless the world is without the effect now."""
        ...

    def learn(self, values: Mapping[str, Any]) -> None:
        """A whole run has ended: raise OracleError unless its effect is seen."""
        ...

    def effect(self, values: Mapping[str, Any]) -> str:
        """none, once, in part, or more than once."""
        ...


class Counted:
    def __init__(self, effects: Callable[..., int]) -> None:
        self._effects = effects
        self._takes_arguments = bool(inspect.signature(effects).parameters)

    def _count(self, values: Mapping[str, Any]) -> int:
        count = self._effects(**values) if self._takes_arguments else self._effects()
        if not isinstance(count, int):
            raise TypeError(f"effects must answer how many times the effect stands, not {count!r}")
        return int(count)

    def expect_none(self, values: Mapping[str, Any], *, fresh_arguments: bool) -> None:
        if count := self._count(values):
            raise OracleError(f"effects is {count} already, and must be 0: {_advice(fresh_arguments)}")

    def learn(self, values: Mapping[str, Any]) -> None:
        if (count := self._count(values)) != 1:
            raise OracleError(f"effects is {count}, and must be 1")

    def effect(self, values: Mapping[str, Any]) -> str:
        count = self._count(values)
        return NONE if count == 0 else ONCE if count == 1 else MORE


class Observed:
    def __init__(self, observe: Callable[[], Any]) -> None:
        self._observe = observe
        self._before: Any = None
        self._after: Any = None
        self._began = False

    def expect_none(self, values: Mapping[str, Any], *, fresh_arguments: bool) -> None:
        if fresh_arguments:
            raise OracleError(
                "what observe answers cannot be compared: each run has other arguments; use effects"
            )
        seen = self._observe()
        if not self._began:
            self._before, self._began = seen, True
        elif seen != self._before:
            raise OracleError(f"observe does not answer what it did at first: {_advice(False)}")

    def learn(self, values: Mapping[str, Any]) -> None:
        self._after = self._observe()
        if self._after == self._before:
            raise OracleError("observe answers what it did before: it does not see the effect")

    def effect(self, values: Mapping[str, Any]) -> str:
        seen = self._observe()
        return NONE if seen == self._before else ONCE if seen == self._after else PART


def oracle_of(effects: Callable[..., int] | None, observe: Callable[[], Any] | None) -> Oracle:
    if (effects is None) == (observe is None):
        raise TypeError("give one of effects=... and observe=...: how the test itself sees the effect")
    return Counted(effects) if effects is not None else Observed(observe)  # type: ignore[arg-type]


def _advice(fresh_arguments: bool) -> str:
    if fresh_arguments:
        return "arguments must give each run others"
    return "give setup=..., which undoes it, or other arguments to each run (arguments=lambda n: ...)"
