"""Work in a forked child that may die: what it noted before its end is all that is left of it.

A child has the handler, the patches and the fixtures of the test that forked it, and none of its connections: an
inherited one would be spoken on by two processes. Engines of SQLAlchemy are given fresh pools in the child; what
else was connected before, the handler must connect itself.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

POLL_S = 0.0005
_engines: weakref.WeakSet[Any] = weakref.WeakSet()
_kept: list[Any] = []


class HungChild(Exception):
    """It did not end in time, and was killed."""


class Notes:
    """Where a child notes what its parent will read: what was noted stays, whatever becomes of the child."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by its owner, in two processes

    def add(self, note: object) -> None:
        self._file.write(msgspec.json.encode(note) + b"\n")

    def read(self) -> list[Any]:
        self._file.seek(0)
        return [msgspec.json.decode(line) for line in self._file.read().splitlines()]

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Ended:
    notes: list[Any]
    error: str = ""
    """The traceback of what the work raised."""
    killed: bool = False


def run_in_child(work: Callable[[Notes], None], timeout_s: float) -> Ended:
    """Fork, do ``work``, and leave. Raises HungChild."""
    notes = Notes()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _be_child(work, notes)
        status = _wait(pid, timeout_s)
        told = notes.read()
    finally:
        notes.close()
    errors = [note["raised"] for note in told if isinstance(note, dict) and "raised" in note]
    others = [note for note in told if not (isinstance(note, dict) and "raised" in note)]
    killed = os.WIFSIGNALED(status)
    error = errors[0] if errors else ""
    if not error and not killed and os.WEXITSTATUS(status) != 0:
        error = f"the process left with status {os.WEXITSTATUS(status)}"
    return Ended(others, error, killed)


def die() -> None:
    """As a power switch does it: nothing is flushed, closed or cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # a signal to oneself may take a moment; nothing may happen in it


def _be_child(work: Callable[[Notes], None], notes: Notes) -> None:
    code = 1
    try:
        gc.freeze()  # what is inherited is nobody's garbage, and looking through it would copy it
        _leave_connections()
        work(notes)
        code = 0
    except BaseException:  # noqa: BLE001 - told to the parent, which raises or counts it
        notes.add({"raised": traceback.format_exc()})
        code = 0
    finally:
        os._exit(code)  # not through pytest, whose report would be written twice


def watch_engines() -> None:
    """Know the SQLAlchemy engines that there are, and those that will be, so that children can leave them alone."""
    engine = getattr(sys.modules.get("sqlalchemy.engine"), "Engine", None)
    if engine is None:
        return
    # Here and not in the children: looking at every object would give each a copy of all memory.
    for each in gc.get_objects():
        if issubclass(type(each), engine):  # isinstance would ask proxies, which may do anything
            _engines.add(each)
    event: Any = sys.modules["sqlalchemy.event"]
    if not event.contains(engine, "engine_connect", _note_engine):
        event.listen(engine, "engine_connect", _note_engine)


def _note_engine(connection: Any) -> None:
    _engines.add(connection.engine)


def _leave_connections() -> None:
    for each in list(_engines):
        _kept.append(each.pool)  # or it would be collected, and its connections closed under the parent
        each.dispose(close=False)


def _wait(pid: int, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise HungChild(f"it did not end within {timeout_s:g} s")
        time.sleep(POLL_S)
