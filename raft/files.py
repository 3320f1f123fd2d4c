"""The file port: the few file operations on which durability rests, so that a test can take the disk's place.

What the users of this port may rely on, and no more (POSIX promises no more either):
- bytes written are durable only after ``fdatasync`` or ``fsync`` of the file returned;
- a name made, moved or removed is durable only after ``sync_directory`` of its directory returned;
- before that, any part of it may survive a power loss, in any order, torn at any sector;
- after a sync has failed, what was written since the last good one is unknown for ever: the kernel may have marked
  the pages clean, so a second sync that succeeds proves nothing.
Every method raises ``OSError``; none retries.
"""

from __future__ import annotations

import os
from typing import Protocol


class File(Protocol):
    """One open file. Offsets and sizes are bytes."""

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of ``data``; an error may leave any part of it written."""

    def pread(self, size: int, offset: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the file."""

    def truncate(self, size: int) -> None: ...

    def size(self) -> int: ...

    def fdatasync(self) -> None: ...

    def fsync(self) -> None: ...

    def close(self) -> None: ...


class Files(Protocol):
    """A file system. Paths are plain strings; a directory's path has no trailing slash."""

    def open(self, path: str, *, create: bool = False) -> File:
        """Open for reading and writing. ``create``: the file must not exist, and is made with mode 0600."""

    def read(self, path: str) -> bytes:
        """The whole file."""

    def exists(self, path: str) -> bool: ...

    def list(self, directory: str) -> list[str]:
        """Names in the directory, sorted; ``[]`` when there is no such directory."""

    def make_directory(self, path: str) -> None:
        """Make it and its missing parents, each durable in its own parent; nothing happens if it exists."""

    def rename(self, source: str, target: str) -> None:
        """Replace ``target`` at once."""

    def unlink(self, path: str) -> None: ...

    def sync_directory(self, path: str) -> None: ...


class OsFile:
    """A ``File`` on a descriptor of the operating system."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        written = os.pwrite(self._fd, data, offset)
        if written == len(data):
            return
        # A short write comes before the error that explains it (a full disk); go on until it shows itself.
        view = memoryview(data)
        while written < len(view):
            written += os.pwrite(self._fd, view[written:], offset + written)

    def pread(self, size: int, offset: int) -> bytes:
        parts = []
        while size > 0:
            part = os.pread(self._fd, size, offset)
            if not part:
                break
            parts.append(part)
            size -= len(part)
            offset += len(part)
        return b"".join(parts)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def fdatasync(self) -> None:
        os.fdatasync(self._fd)

    def fsync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class OsFiles:
    """The real file system."""

    __slots__ = ()

    def open(self, path: str, *, create: bool = False) -> File:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        return OsFile(os.open(path, flags, 0o600))

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def list(self, directory: str) -> list[str]:
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError:
            return []

    def make_directory(self, path: str) -> None:
        if os.path.isdir(path):
            return
        parent = os.path.dirname(os.path.abspath(path))
        self.make_directory(parent)
        os.mkdir(path, 0o700)
        self.sync_directory(parent)

    def rename(self, source: str, target: str) -> None:
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_directory(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


OS_FILES = OsFiles()
"""Stateless, so one will do for all."""
