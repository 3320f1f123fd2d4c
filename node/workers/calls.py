"""The application as a worker sees it: each handler as a few bare callables, so that the hot loop looks up nothing.

The one place in the worker that knows the shape of ``oncekeeper.app``.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from node.workers.port import Ended, HandlerInfo
from oncekeeper import context, handlers
from oncekeeper.app import load_app
from oncekeeper.context import CurrentTask
from oncekeeper.errors import InvalidTask, SecondTransaction
from oncekeeper.handlers import Handler

ERROR_CHARS_MAX = 500
TRACE_FRAMES = 6
TRACE_CHARS_MAX = 4000
_OURS = (os.path.dirname(__file__), handlers.__file__)


class Calls(msgspec.Struct, frozen=True):
    """One handler."""

    info: HandlerInfo
    decode: Callable[[bytes], Any]  # raises if the body does not fit the handler's types
    run: Callable[[CurrentTask, Any], Any]  # with what decode returned; an awaitable where info.is_async
    check: Callable[[CurrentTask, Any], bool | None]  # blocks
    encode: Callable[[object], bytes]


def load_calls(app_ref: str, app_dir: str) -> dict[str, Calls]:
    """Import the application; whatever its modules raise goes through."""
    return {name: calls_of(handler) for name, handler in load_app(app_ref, app_dir or None).handlers.items()}


def calls_of(handler: Handler) -> Calls:
    info = HandlerInfo(**handler.info())
    run = _run_async(handler) if handler.is_async else _run(handler)
    return Calls(info, handler.signature.decode, run, handler.check, handler.encode_result)


def _run(handler: Handler) -> Callable[[CurrentTask, Any], Any]:
    function, enter = handler.function, context.enter
    delayed = handler.delayed_function or function

    def plain(task: CurrentTask, arguments: Any) -> Any:
        # Not undone: the next task in this context overwrites it, and nothing but tasks runs in it.
        enter(task)
        return (delayed if task.due_ms else function)(*arguments.args, **arguments.kwargs)

    def recorded(task: CurrentTask, arguments: Any) -> Any:
        with handler.running(task):
            return handler.run(arguments, task.due_ms)

    return plain if handler.strategy is None else recorded


def _run_async(handler: Handler) -> Callable[[CurrentTask, Any], Any]:
    async def run(task: CurrentTask, arguments: Any) -> Any:
        with handler.running(task):
            return await handler.run(arguments, task.due_ms)

    return run


def encode_result(calls: Calls, value: object) -> tuple[bytes | None, str]:
    """A result as JSON, or why it cannot be kept. The task is done in either case: its effect is there."""
    if value is None:
        return None, ""
    try:
        return calls.encode(value), ""
    except Exception as error:  # noqa: BLE001 - UnencodableResult, or whatever a foreign type raises
        return None, f"the result was dropped: {one_line(error)}"


def current_id() -> str:
    """The text form of the current task's id; "" outside of any."""
    task = context.running_task()
    return "" if task is None else task.id_text


def one_line(error: BaseException) -> str:
    """``ValueError: what it says``, on one line and bounded; our own word on a body needs no name."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - a broken __str__ in foreign code: its type must do
        text = "(its text cannot be had)"
    name = type(error).__name__
    if isinstance(error, InvalidTask):
        return text[:ERROR_CHARS_MAX]
    return (f"{name}: {text}" if text else name)[:ERROR_CHARS_MAX]


def raised(error: BaseException) -> Ended:
    """How a task ended whose handler raised ``error``."""
    # The handler itself is wrong, and part of its effect may stand: the next try would meet the same rule.
    return Ended.INVALID if isinstance(error, SecondTransaction) else Ended.RAISED


def short_trace(error: BaseException) -> str:
    """The last frames of a traceback, without the worker's own."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None and tb.tb_frame.f_code.co_filename.startswith(_OURS):
        tb = tb.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, tb, limit=-TRACE_FRAMES))
    except Exception:  # noqa: BLE001 - as above: a trace is a help, never a reason to fail
        return ""
    return text if len(text) <= TRACE_CHARS_MAX else "…" + text[-TRACE_CHARS_MAX:]
