"""``raft.files.Files`` in memory, on a disk that can lose power, rot, fill up and fail: deterministic by seed.

files = SimulatedFiles()
files.power_fails_at(17)             # the 17th operation from now raises PowerLost, and so does every later one
files.fail_next("fdatasync", errno.EIO)
files = files.after_power_loss(seed) # the disk as the next boot finds it
"""

from __future__ import annotations

import errno
import os
import random
from collections import deque
from collections.abc import Callable

from chaos.simulation.disk import Change, Disk, FileKey, Loss, Truncate, Write, apply_change


class PowerLost(Exception):
    """The machine is off. No OSError: code under test must not mistake it for an error that it can act on."""


class SimulatedFile:
    def __init__(self, files: SimulatedFiles, key: int) -> None:
        self._files = files
        self._key = key
        self._open = True

    def _check(self) -> None:
        if not self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        self._check()
        whole = bytes(data)
        room = self._files.room_for(self._key, offset, len(whole))
        try:
            self._files.step("pwrite", lambda: self._files.change(self._key, Write(offset, whole[:room])))
        except OSError:
            self._files.change(self._key, Write(offset, whole[: room // 2]))  # an error may come halfway
            raise
        if room < len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def pread(self, size: int, offset: int) -> bytes:
        self._check()
        self._files.step("pread")
        return bytes(self._files.live(self._key)[offset : offset + size])

    def truncate(self, size: int) -> None:
        self._check()
        self._files.step("truncate", lambda: self._files.change(self._key, Truncate(size)))

    def size(self) -> int:
        return len(self._files.live(self._key))

    def fdatasync(self) -> None:
        self._sync("fdatasync")

    def fsync(self) -> None:
        self._sync("fsync")

    def _sync(self, operation: str) -> None:
        self._check()
        state = self._files.disk.file(self._key)
        self._files.live(self._key)
        try:
            self._files.step(operation)
        except OSError:
            state.forget()
            raise
        state.sync()

    def close(self) -> None:
        self._open = False


class SimulatedFiles:
    def __init__(self, disk: Disk | None = None) -> None:
        self.disk = disk or Disk()
        self.steps = 0
        self.bytes_max: int | None = None
        """The size of the disk; writes beyond it are cut short and fail with ENOSPC. None: without end."""
        self.before_step: Callable[[str], None] | None = None
        """Called with each operation's name; may raise, or run another part of a simulation."""
        self.on_failure: Callable[[str], None] | None = None
        """Told of each operation that fails because of ``fail_next``."""
        self._power_fails_at: int | None = None
        self._failures: dict[str, deque[int]] = {}
        self._live: dict[int, bytearray] = {}
        self._directories: set[str] = {"", "/"}
        self._keys = max((key for key in self.disk.files if isinstance(key, int)), default=0)
        for path in self.disk.names:
            self._add_directories(path.rpartition("/")[0])

    # --- faults

    def power_fails_at(self, steps: int) -> None:
        """The ``steps``-th operation from now, counted from 1, does not return."""
        self._power_fails_at = self.steps + steps

    def fail_next(self, operation: str, error: int, after: int = 0) -> None:
        """The next ``operation`` (a method's name), after ``after`` good ones, raises OSError(error)."""
        self._failures.setdefault(operation, deque()).extend([0] * after + [error])

    def mend(self) -> None:
        """What was to fail and has not yet, will not."""
        self._failures.clear()
        self.on_failure = None
        self.bytes_max = None

    def flip_bit(self, path: str, bit: int) -> None:
        """Rot: on the platter and in memory alike, so that it is seen with or without a power loss."""
        key = self._key(path)
        state = self.disk.file(key)
        state.sync()
        state.durable[bit // 8] ^= 1 << bit % 8
        self._live.pop(key, None)

    def lose(self, path: str) -> None:
        """The file is gone, for good."""
        self.disk.change_names({path: None})
        self.disk.sync_directory(path.rpartition("/")[0])

    def after_power_loss(self, seed: int, loss: Loss = Loss.RANDOM) -> SimulatedFiles:
        """The machine boots again: a new file system of what is left. Faults are not carried over."""
        disk = Disk()
        for number, (path, content) in enumerate(self.disk.after_power_loss(loss, seed).items(), 1):
            disk.add_durable(path, number, content)
        files = SimulatedFiles(disk)
        files._directories |= self._directories
        return files

    def after_kill(self) -> SimulatedFiles:
        """Only the process died: the page cache is intact, and still not synced."""
        files = SimulatedFiles(self.disk)
        files._directories |= self._directories
        files._live = self._live
        return files

    # --- the port

    def open(self, path: str, *, create: bool = False) -> SimulatedFile:
        if create:
            if path in self.disk.names:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            self._need_directory(path)
            self._keys += 1
            self.disk.file(self._keys)
            self.step("open", lambda: self.disk.change_names({path: self._keys}))
            return SimulatedFile(self, self._keys)
        key = self._key(path)
        self.step("open")
        return SimulatedFile(self, key)

    def read(self, path: str) -> bytes:
        key = self._key(path)
        self.step("read")
        return bytes(self.live(key))

    def exists(self, path: str) -> bool:
        return path in self.disk.names or path in self._directories

    def size(self, path: str) -> int:
        return len(self.live(self._key(path)))

    def list(self, directory: str) -> list[str]:
        prefix = f"{directory}/"
        below = [*self.disk.names, *self._directories]
        return sorted(
            {path[len(prefix) :].partition("/")[0] for path in below if path.startswith(prefix)} - {""}
        )

    def make_directory(self, path: str) -> None:
        self.step("make_directory", lambda: self._add_directories(path))

    def rename(self, source: str, target: str) -> None:
        self._need_directory(target)
        names: dict[str, FileKey | None] = {source: None, target: self._key(source)}
        self.step("rename", lambda: self.disk.change_names(names))

    def unlink(self, path: str) -> None:
        self._key(path)
        self.step("unlink", lambda: self.disk.change_names({path: None}))

    def sync_directory(self, path: str) -> None:
        self.step("sync_directory")
        self.disk.sync_directory(path)

    # --- below the port

    def step(self, operation: str, effect: Callable[[], None] = lambda: None) -> None:
        """One operation: an error comes before its effect; a power loss after, when it may survive in part."""
        self.steps += 1
        if self._power_fails_at is not None and self.steps > self._power_fails_at:
            raise PowerLost(f"at operation {self.steps}, {operation}")
        if self.before_step is not None:
            self.before_step(operation)
        failures = self._failures.get(operation)
        if failures and (error := failures.popleft()):
            if self.on_failure is not None:
                self.on_failure(operation)
            raise OSError(error, os.strerror(error))
        effect()
        if self.steps == self._power_fails_at:
            raise PowerLost(f"at operation {self.steps}, {operation}")

    def change(self, key: int, change: Change) -> None:
        self.live(key)
        self.disk.file(key).add(change)
        apply_change(self._live[key], change)

    def live(self, key: int) -> bytearray:
        if key not in self._live:
            self._live[key] = self.disk.file(key).content()
        return self._live[key]

    def room_for(self, key: int, offset: int, length: int) -> int:
        if self.bytes_max is None:
            return length
        used = sum(len(self.live(self._key(path))) for path in self.disk.names)
        growth = max(0, offset + length - len(self.live(key)))
        return length - max(0, used + growth - self.bytes_max)

    def _key(self, path: str) -> int:
        key = self.disk.names.get(path)
        if not isinstance(key, int):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return key

    def _need_directory(self, path: str) -> None:
        if path.rpartition("/")[0] not in self._directories:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def _add_directories(self, path: str) -> None:
        while path and path not in self._directories:
            self._directories.add(path)
            path = path.rpartition("/")[0]


def any_bit(files: SimulatedFiles, path: str, rng: random.Random) -> int:
    return rng.randrange(files.size(path) * 8)
