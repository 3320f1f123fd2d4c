"""The places at which a handler's process may die, found by walking through a run of it.

A *place* is what the interpreter tells a tracer: a line of the handler's own file that is about to be executed, or
a call into C that has just returned and by its name may have left something in the world outside (``write``,
``commit``, ``send``, ...), however deep in libraries it was made. Between two places next to each other nothing
reaches the world outside but by C code that calls itself something else.

Threads that the handler starts are not walked through; what runs in them is seen as the line that waits for it.
"""

from __future__ import annotations

import io
import linecache
import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_FILES = (
    "open write writelines flush close pwrite writev pwritev sendfile copy_file_range rename replace link symlink "
    "unlink remove mkdir rmdir truncate ftruncate fsync fdatasync chmod utime posix_fallocate"
)
_NETWORK = "send sendall sendto sendmsg produce publish"
_DATABASES = "execute executemany executescript commit exec_ exec_params exec_prepared query"
EFFECTFUL = frozenset(f"{_FILES} {_NETWORK} {_DATABASES}".split())
_IN_MEMORY = (io.StringIO, io.BytesIO, list, dict, set, str, bytes, bytearray)


class Place(msgspec.Struct, frozen=True):
    """``file`` and ``line`` are of the handler's own code, also where ``call`` was made deep below it."""

    kind: str
    """start (before the first line), line (about to be executed), call (has returned), end (of the handler)."""
    file: str = ""
    line: int = 0
    call: str = ""

    @property
    def source(self) -> str:
        return linecache.getline(self.file, self.line).strip() if self.file else ""


START = Place("start")
END = Place("end")


class Walk:
    """Runs a function, and tells ``on_place`` of each place before it goes on."""

    def __init__(self, files: Collection[str], on_place: Callable[[Place], None]) -> None:
        self._files = frozenset(files)
        self._on_place = on_place
        self._busy = False  # what on_place itself does is no part of the handler

    def run(self, function: Callable[[], T]) -> T:
        before = sys.gettrace(), sys.getprofile()  # a debugger, or the measuring of coverage
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            return function()
        finally:
            sys.settrace(before[0])
            sys.setprofile(before[1])

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._trace_line if frame.f_code.co_filename in self._files else None

    def _trace_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self._tell(Place("line", frame.f_code.co_filename, frame.f_lineno))
        return self._trace_line

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "c_return" or getattr(argument, "__name__", "") not in EFFECTFUL:
            return
        owner = getattr(argument, "__self__", None)
        if isinstance(owner, _IN_MEMORY) or owner is sys.stdout or owner is sys.stderr:
            return
        own: FrameType | None = frame
        while own is not None and own.f_code.co_filename not in self._files:
            own = own.f_back
        if own is not None:
            self._tell(Place("call", own.f_code.co_filename, own.f_lineno, argument.__name__))

    def _tell(self, place: Place) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            self._on_place(place)
        finally:
            self._busy = False


def some_of(places: list[Place], most: int) -> list[int]:
    """Which of the places of a run to die at, by number: all, or the first and last of each and some between."""
    if len(places) <= most:
        return list(range(len(places)))
    first: dict[Place, int] = {}
    last: dict[Place, int] = {}
    for number, place in enumerate(places):
        first.setdefault(place, number)
        last[place] = number
    chosen = sorted({*first.values(), *last.values()})
    if len(chosen) > most:
        chosen = [chosen[at * len(chosen) // most] for at in range(most)]
    rest = sorted(set(range(len(places))) - set(chosen))
    room = most - len(chosen)
    return sorted(chosen + [rest[at * len(rest) // room] for at in range(room)])
