"""The effect recorder of the tests with real clusters: outside of the system, and nothing in it is unique.

A file opened with O_APPEND; one record of a fixed size an effect, in one write. Handlers append to it, checks
look into it, and the test reads it all at the end: what took effect twice stands there twice.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from struct import Struct

RECORD = Struct("<40sQI")  # the id as text, the fence, the pid


class Sink:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._fd = -1
        self._read_to = 0
        self._seen: set[bytes] = set()

    def append(self, task_id: str, fence: int) -> None:
        os.write(self._open(), RECORD.pack(task_id.encode(), fence, os.getpid()))

    def has(self, task_id: str) -> bool:
        """Whether the effect was recorded by now. Records are only ever added, so what was read is kept."""
        fd = self._open()
        with self._lock:
            whole = (os.fstat(fd).st_size // RECORD.size) * RECORD.size
            data = os.pread(fd, whole - self._read_to, self._read_to)
            self._read_to += len(data)
            self._seen.update(name.rstrip(b"\0") for name, _, _ in RECORD.iter_unpack(data))
            return task_id.encode() in self._seen

    def read(self) -> list[tuple[str, int, int]]:
        """(id, fence, pid) of every effect, in order."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = (
            len(data) // RECORD.size * RECORD.size
        )  # of a write that crosses a page, a reader may see half
        return [
            (name.rstrip(b"\0").decode(), fence, pid) for name, fence, pid in RECORD.iter_unpack(data[:whole])
        ]

    def _open(self) -> int:
        with self._lock:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            return self._fd
