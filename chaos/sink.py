"""The effect recorder: outside of the system, and nothing in it is unique.

A file opened with O_APPEND; one record of a fixed size a moment, in one write, so that records of many processes do
not mix and a record is there or not. Handlers append to it, checks look into it, and all of it is read at the end:
what took effect twice stands there twice.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import NamedTuple

RECORD = Struct("<B39sQIQ")  # what, the id as text, the fence, the pid, CLOCK_BOOTTIME in ns
START, EFFECT = 1, 2


class Moment(NamedTuple):
    what: int
    id_text: str
    fence: int
    pid: int
    t_ns: int


class Sink:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._fd = -1
        self._read_to = 0
        self._seen: set[bytes] = set()

    def append(self, what: int, id_text: str, fence: int) -> None:
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        os.write(self._open(), RECORD.pack(what, id_text.encode(), fence, os.getpid(), now_ns))

    def has_effect(self, id_text: str) -> bool:
        """Whether the effect was recorded by now. Records are only ever added, so what was read is kept."""
        fd = self._open()
        with self._lock:
            whole = (os.fstat(fd).st_size // RECORD.size) * RECORD.size
            data = os.pread(fd, whole - self._read_to, self._read_to)
            self._read_to += len(data)
            self._seen.update(
                name.rstrip(b"\0") for what, name, *_ in RECORD.iter_unpack(data) if what == EFFECT
            )
            return id_text.encode() in self._seen

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
