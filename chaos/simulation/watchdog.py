"""Ends a step that does not end by itself: a bug that was put in may loop for ever within one callback.

By CPU time, so that a busy machine does not matter, and per step, of which a sound one takes milliseconds.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STEP_CPU_S = 1.5


class Hung(KeyboardInterrupt):
    """Raised in the midst of the step. Of its base, because asyncio lets only that one through a task."""


@contextlib.contextmanager
def watching(steps: Callable[[], int]) -> Iterator[None]:
    """Raises Hung when ``steps()`` has stood still for so long. Outside of the main thread it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -1

    def look(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = steps()
        if now == last:
            where = f" at {frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}" if frame else ""
            raise Hung(f"a step takes more than {STEP_CPU_S} s of CPU{where}")
        last = now

    before = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, STEP_CPU_S, STEP_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
