"""The effect recorder: outside of the system, and nothing in it is unique.

A file opened with O_APPEND; one record of a fixed size a moment, in one write, so that records of many processes do
not mix and a record is there or not. Handlers append to it, checks look into it, and all of it is read at the end:
what took effect twice stands there twice.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import NamedTuple

RECORD = Struct("<B39sQIQ")  # what, the id as text, the fence, the pid, CLOCK_BOOTTIME in ns
START, EFFECT, CLOSED = 1, 2, 3


class Moment(NamedTuple):
    what: int
    id_text: str
    fence: int
    pid: int
    t_ns: int


class Sink:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._fd = -1
        self._read_to = 0
        self._seen: set[bytes] = set()
        self._closed: dict[bytes, int] = {}

    def append(self, what: int, id_text: str, fence: int) -> None:
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        os.write(self._open(), RECORD.pack(what, id_text.encode(), fence, os.getpid(), now_ns))

    def has_effect(self, id_text: str) -> bool:
        """Whether the effect was recorded by now. Records are only ever added, so what was read is kept."""
        with self._lock:
            self._catch_up()
            return id_text.encode() in self._seen

    def _catch_up(self) -> None:
        fd = self._open()
        whole = (os.fstat(fd).st_size // RECORD.size) * RECORD.size
        data = os.pread(fd, whole - self._read_to, self._read_to)
        self._read_to += len(data)
        for what, padded, fence, _, _ in RECORD.iter_unpack(data):
            name = padded.rstrip(b"\0")
            if what == EFFECT:
                self._seen.add(name)
            elif what == CLOSED:
                self._closed[name] = max(fence, self._closed.get(name, 0))

    # --- a sink that fences ---------------------------------------------------------------------------------

    def append_fenced(self, id_text: str, fence: int) -> bool:
        """Take effect, unless this fence was closed; whether it did. Of all processes one at a time."""
        with self._alone():
            if fence <= self._closed.get(id_text.encode(), 0):
                return False
            self.append(EFFECT, id_text, fence)
            return True

    def close_fence(self, id_text: str, fence: int) -> bool:
        """Whether the effect is there. If not, it will not come under this fence or an older one any more."""
        with self._alone():
            if id_text.encode() in self._seen:
                return True
            self.append(CLOSED, id_text, fence)
            return False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Among threads and processes, and knowing every record so far."""
        fd = self._open()
        with self._lock:
            # A lock of the open file description; the kernel lets go of it when its process is killed.
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                self._catch_up()
                yield
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)

    def read(self, from_byte: int = 0) -> Iterator[Moment]:
        """Every record from there on, in order."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(from_byte)
            data = file.read()
        data = data[: len(data) // RECORD.size * RECORD.size]
        for what, name, fence, pid, t_ns in RECORD.iter_unpack(data):
            yield Moment(what, name.rstrip(b"\0").decode(), fence, pid, t_ns)

    def size(self) -> int:
        """In bytes; for ``read``."""
        try:
            whole = self.path.stat().st_size
        except FileNotFoundError:
            return 0
        return whole // RECORD.size * RECORD.size

    def _open(self) -> int:
        with self._lock:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            return self._fd
