"""The node's end of the guard (node/workers/guard.py): lease and groups in one page, and a pipe to wake it."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from node.workers import guard

RESTART_DELAY_S = 0.2


class GuardLink:
    """Keeps one guard alive. Without it nothing runs wrong; but a paused node's running tasks would go on."""

    def __init__(self, path: Path, on_restart: Callable[[int], None]) -> None:
        self._path = path
        self._on_restart = on_restart
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, guard.TABLE_BYTES)
            self._map = mmap.mmap(fd, guard.TABLE_BYTES)
        finally:
            os.close(fd)
        view = memoryview(self._map)
        self._lease = view[guard.LEASE_AT : guard.LEASE_AT + 8].cast("Q")
        self._groups = view[guard.GROUPS_AT : guard.GROUPS_AT + 4 * guard.GROUP_COUNT].cast("I")
        self._process: subprocess.Popen[bytes] | None = None
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        self._pidfd = self._pipe = -1

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(write_end, False)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(self._path)],
                stdin=read_end,
                stdout=subprocess.DEVNULL,
                process_group=0,
            )
        finally:
            os.close(read_end)
        self._pipe = write_end
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._exited)

    def set_lease(self, until_ns: int) -> None:
        before = self._lease[0]
        self._lease[0] = until_ns
        # While a lease runs, the guard looks again at its end by itself: only other changes need a nudge.
        if self._pipe >= 0 and (before <= time.clock_gettime_ns(time.CLOCK_BOOTTIME) or until_ns < before):
            with contextlib.suppress(OSError):  # full, or it has just died: a new one looks by itself
                os.write(self._pipe, b".")

    def add(self, group: int) -> None:
        for position, known in enumerate(self._groups):
            if known == 0:
                self._groups[position] = group
                return
        raise RuntimeError(f"more than {guard.GROUP_COUNT} workers")

    def remove(self, group: int) -> None:
        for position, known in enumerate(self._groups):
            if known == group:
                self._groups[position] = 0
                return

    def stop(self) -> None:
        """After the workers are gone: it would kill what it still finds."""
        self._stopping = True
        self._let_go()
        if self._process is not None:
            self._process.kill()  # it may be paused
            self._process.wait()

    def _exited(self) -> None:
        self._let_go()
        status = self._process.wait() if self._process is not None else 0
        self._on_restart(status)
        self._loop.call_later(RESTART_DELAY_S, self._restart)

    def _let_go(self) -> None:
        if self._pidfd < 0:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        os.close(self._pipe)
        self._pidfd = self._pipe = -1

    def _restart(self) -> None:
        if self._stopping:
            return
        try:
            self.start()
        except OSError:
            # Out of processes or descriptors: until there is a guard again, the node's own clock must do.
            self._loop.call_later(RESTART_DELAY_S, self._restart)
