"""Dying at a named step, so that recovery from a death at exactly that step can be shown.

Off unless ``crash_at`` is configured. The death is SIGKILL: nothing is flushed, nothing is said.
"""

from __future__ import annotations

import os
import signal


class CrashPoint:
    def __init__(self, crash_at: str) -> None:
        """``crash_at``: "" or "STEP" or "STEP:N", the N-th time that the step is reached."""
        step, _, times = crash_at.partition(":")
        self._step = step
        self._left = int(times or 1)

    def reached(self, step: str, really: bool = True) -> None:
        if step != self._step or not really:
            return
        self._left -= 1
        if self._left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
