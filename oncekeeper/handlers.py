"""A handler: a user's function with what a node and a worker must know of it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import Token
from functools import cached_property
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from oncekeeper import context
from oncekeeper.arguments import Arguments, Signature, encode_json
from oncekeeper.context import CurrentTask
from oncekeeper.envelope import BODY_BYTES_MAX, TTR_MS_MAX
from oncekeeper.errors import InvalidHandler, InvalidSchedule, InvalidTask, UnencodableResult
from oncekeeper.schedules import Every, check

KINDS = ("io", "cpu")
LENGTHS = ("short", "long")
POLICIES = ("rerun", "check", "skip", "hold")
RETRIES_MAX = 1000
RESULT_BYTES_MAX = BODY_BYTES_MAX


@runtime_checkable
class CheckStrategy(Protocol):
    """How to find out whether a task took effect; an instance is given as ``on_doubt``.

    Both run in a worker process, possibly in several threads at a time.
    """

    def recording(self, task: CurrentTask) -> AbstractContextManager[object]:
        """Entered around every run of the handler, in its thread or asyncio task."""
        ...

    def took_effect(self, task: CurrentTask, arguments: Mapping[str, Any]) -> bool | None:
        """Whether the task took effect; None if that cannot be told now. ``arguments``: by name.

        The process that ran it is gone, and with it all that it had not committed: False must be final.
        """
        ...


class Handler:
    """What the worker calls. Its attributes are those of the node's HandlerInfo (``info``)."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        kind: str,
        length: str,
        ttr: float,
        retries: int,
        retry_delay: float,
        retry_delay_max: float,
        on_doubt: str | CheckStrategy,
        queue: str,
        schedule: str | Every | None = None,
        tz: str = "",
        catch_up: str = "latest",
    ) -> None:
        _one_of(name, "kind", kind, KINDS)
        _one_of(name, "length", length, LENGTHS)
        _within(name, "ttr", ttr, 0.001, TTR_MS_MAX / 1000, "seconds")
        _within(name, "retries", retries, 0, RETRIES_MAX, "tries after the first")
        _within(name, "retry_delay", retry_delay, 0, 86400, "seconds")
        _within(name, "retry_delay_max", retry_delay_max, retry_delay, 30 * 86400, "seconds")
        self.name = name
        self.function = function
        self.kind = kind
        self.length = length
        self.is_async = inspect.iscoroutinefunction(function)
        self.ttr_ms = round(ttr * 1000)
        self.retries = retries
        self.retry_delay_ms = round(retry_delay * 1000)
        self.retry_delay_ms_max = round(retry_delay_max * 1000)
        self.queue = queue
        self.schedule, self.tz, self.catch_up = _schedule(name, schedule, tz, catch_up)
        self.strategy: CheckStrategy | None = None
        self.check_function: Callable[..., Any] | None = None
        self.delayed_function: Callable[..., Any] | None = None
        if isinstance(on_doubt, str):
            _one_of(name, "on_doubt", on_doubt, POLICIES)
            self.on_doubt = on_doubt
        elif isinstance(on_doubt, CheckStrategy):
            self.on_doubt, self.strategy = "check", on_doubt
        else:
            raise InvalidHandler(
                f"{name}: on_doubt={on_doubt!r} must be one of {', '.join(POLICIES)}, or a check strategy "
                "with the methods recording and took_effect"
            )
        if self.is_async and kind == "cpu":
            raise InvalidHandler(f'{name}: an async handler waits for others, so it must be kind="io"')

    @cached_property
    def signature(self) -> Signature:
        """Made at the first use, when all names that its type hints mention are there."""
        return Signature(self.name, self.function)

    def verify(self) -> None:
        """Raise InvalidHandler if this cannot work as it was declared."""
        signature = self.signature
        if self.on_doubt == "check" and self.strategy is None and self.check_function is None:
            short = self.function.__name__
            raise InvalidHandler(
                f'{self.name}: on_doubt="check" needs a check: decorate a function with @{short}.check, or give '
                "a strategy such as on_doubt=checks.sql(engine)"
            )
        if self.check_function is not None:
            signature.verify_check(self.check_function)
        if self.delayed_function is not None:
            signature.verify_delayed(self.delayed_function)
        if self.schedule:
            try:
                signature.decode(b"{}")
            except InvalidTask as error:
                raise InvalidHandler(
                    f"{self.name}: its schedule calls it without arguments ({error.rule}): give its parameters "
                    "defaults, or put the schedule with a body: oncekeeper schedule put"
                ) from None

    def info(self) -> dict[str, Any]:
        """The fields of the node's HandlerInfo, by name."""
        return {
            "name": self.name,
            "kind": self.kind,
            "length": self.length,
            "is_async": self.is_async,
            "ttr_ms": self.ttr_ms,
            "retries": self.retries,
            "retry_delay_ms": self.retry_delay_ms,
            "retry_delay_ms_max": self.retry_delay_ms_max,
            "on_doubt": self.on_doubt,
            "queue": self.queue,
            "schedule": self.schedule,
            "tz": self.tz,
            "catch_up": self.catch_up,
        }

    # --- in the worker ----------------------------------------------------------------------------------------

    def decode(self, body: bytes) -> Arguments:
        """What to call the handler with; InvalidTask if the body does not fit its types."""
        return self.signature.decode(body)

    def running(self, task: CurrentTask) -> Running:
        """A context manager: inside of it ``task`` runs (current_task, and the check strategy's recording)."""
        return Running(task, self.strategy)

    def run(self, arguments: Arguments, due_ms: int = 0) -> Any:
        """Call the function: its value, or a coroutine if ``is_async``. Inside of ``running``.

        ``due_ms``: of a task that was delayed; there may be another function for those.
        """
        function = (self.delayed_function or self.function) if due_ms else self.function
        return function(*arguments.args, **arguments.kwargs)

    def check(self, task: CurrentTask, arguments: Arguments) -> bool | None:
        """Whether the task took effect; None if that cannot be told. May block; not for an event loop's thread."""
        if self.strategy is not None:
            return self.strategy.took_effect(task, self.signature.by_name(arguments))
        if self.check_function is None:
            return None
        with Running(task, None):
            answer = self.check_function(*arguments.args, **arguments.kwargs)
            if inspect.iscoroutine(answer):
                answer = asyncio.run(answer)
        if answer is not None and not isinstance(answer, bool):
            raise TypeError(f"{self.name}: the check must answer True, False or None, not {answer!r}")
        return answer

    def encode_result(self, value: object) -> bytes:
        """The JSON text of what the handler returned; UnencodableResult if it has none."""
        if value is None:
            return b"null"
        try:
            result = encode_json(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            text = str(error).replace("`", "")
            raise UnencodableResult(f"{self.name}: the result has no JSON form: {text}") from None
        if len(result) > RESULT_BYTES_MAX:
            raise UnencodableResult(
                f"{self.name}: the result has {len(result)} bytes, the most is {RESULT_BYTES_MAX}: "
                "store it and return a reference"
            )
        return result


class Running:
    """Makes ``task`` the current one; cheap, because it stands in the way of every task."""

    __slots__ = ("_recording", "_strategy", "_task", "_token")

    def __init__(self, task: CurrentTask, strategy: CheckStrategy | None) -> None:
        self._task = task
        self._strategy = strategy
        self._token: Token[CurrentTask | None] | None = None
        self._recording: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        self._token = context.enter(self._task)
        if self._strategy is not None:
            self._recording = self._strategy.recording(self._task)
            try:
                self._recording.__enter__()
            except BaseException:
                context.leave(self._token)
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._recording is not None:
                self._recording.__exit__(kind, error, trace)
        finally:
            if self._token is not None:
                context.leave(self._token)


def _one_of(name: str, field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidHandler(f"{name}: {field}={value!r} must be one of {', '.join(allowed)}")


def _schedule(name: str, schedule: str | Every | None, tz: str, catch_up: str) -> tuple[str, str, str]:
    if schedule is None:
        if tz or catch_up != "latest":
            raise InvalidHandler(f"{name}: tz and catch_up go with a schedule, and there is none")
        return "", "", catch_up
    try:
        return check(schedule, tz, catch_up)
    except InvalidSchedule as error:
        raise InvalidHandler(f"{name}: {error}") from None


def _within(name: str, field: str, value: float, low: float, high: float, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InvalidHandler(f"{name}: {field}={value!r} must be from {low:g} to {high:g} {unit}")
