"""Bytes that run code in whoever unpickles them: they make a directory that a test can look for."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

CRATER = Path(tempfile.gettempdir()) / f"oncekeeper-test-unpickled-{os.getpid()}"


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(CRATER),))


def bomb(protocol: int = 2) -> bytes:
    return pickle.dumps(Bomb(), protocol)


def went_off() -> bool:
    """Whether it did; and clears up."""
    if not CRATER.exists():
        return False
    CRATER.rmdir()
    return True
