"""Handlers that are coroutines, in tests that may themselves run in an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar, cast

T = TypeVar("T")


def beside_the_loop(work: Callable[[], T]) -> T:
    """Call ``work``, which runs an event loop: in a thread of its own where this one has a loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    outcome: list[tuple[T | None, BaseException | None]] = []
    context = contextvars.copy_context()

    def act() -> None:
        try:
            outcome.append((context.run(work), None))
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            outcome.append((None, error))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    value, error = outcome[0]
    if error is not None:
        raise error
    return cast(T, value)
