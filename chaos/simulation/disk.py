"""A disk that loses power: what of unsynced writes and names may be left, by seed.

The one model for both users: ``SimulatedFiles`` (files.py), which lives in memory, and ``Recording``
(tests/support/powerloss.py), which replays what real processes did. The rules are those of ``raft/files.py``: a
file's bytes are durable once that file was synced, a name once its directory was. Until then each 512-byte sector
of each write, each truncation and each change of names survives or not, as the dice fall; a rename is atomic.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

SECTOR_BYTES = 512


class Loss(Enum):
    """What a power loss leaves of what was not synced."""

    ALL = "all"  # nothing unsynced is left
    RANDOM = "random"  # any part of it, torn at sectors
    NONE = "none"  # everything is left: what SIGKILL alone does


@dataclass(slots=True)
class Write:
    offset: int
    data: bytes


@dataclass(slots=True)
class Truncate:
    size: int


Change = Write | Truncate


def apply_change(content: bytearray, change: Change) -> None:
    if isinstance(change, Truncate):
        if change.size < len(content):
            del content[change.size :]
        else:
            content.extend(bytes(change.size - len(content)))
        return
    if change.offset > len(content):
        content.extend(bytes(change.offset - len(content)))
    content[change.offset : change.offset + len(change.data)] = change.data


@dataclass(slots=True)
class FileState:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)
    changes_total: int = 0  # ever made: a count that tells which changes a sync covers

    def add(self, change: Change) -> None:
        self.pending.append(change)
        self.changes_total += 1

    def sync(self, covered: int | None = None) -> None:
        """Make durable the changes that were made before the count stood at ``covered``; all, if None."""
        synced = self.changes_total - len(self.pending)
        count = len(self.pending) if covered is None else max(0, covered - synced)
        for change in self.pending[:count]:
            apply_change(self.durable, change)
        del self.pending[:count]

    def forget(self) -> None:
        """A sync failed: the kernel marks the pages clean, so no later sync writes what was pending."""
        self.pending.clear()

    def content(self) -> bytearray:
        """As a living process sees it."""
        content = bytearray(self.durable)
        for change in self.pending:
            apply_change(content, change)
        return content

    def after_power_loss(self, loss: Loss, rng: random.Random) -> bytes:
        if loss is Loss.NONE:
            return bytes(self.content())
        content = bytearray(self.durable)
        if loss is Loss.RANDOM:
            for change in _survivors(self.pending, rng):
                apply_change(content, change)
        return bytes(content)


def _survivors(pending: list[Change], rng: random.Random) -> list[Change]:
    """Some of the changes: none, all, all up to a torn one, or any sectors of any."""
    style = rng.randrange(4)
    if style == 0 or not pending:
        return []
    if style == 1:
        return pending
    if style == 2:
        cut = rng.randrange(len(pending))
        torn = pending[cut]
        head = pending[:cut]
        if isinstance(torn, Write) and torn.data:
            head.append(Write(torn.offset, torn.data[: rng.randrange(len(torn.data))]))
        return head
    share = rng.random()
    kept: list[Change] = []
    for change in pending:
        if isinstance(change, Truncate):
            if rng.random() < share:
                kept.append(change)
            continue
        kept += [piece for piece in _sectors(change) if rng.random() < share]
    return kept


def _sectors(write: Write) -> list[Write]:
    pieces = []
    at = write.offset
    end = write.offset + len(write.data)
    while at < end:
        stop = min(end, (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
        pieces.append(Write(at, write.data[at - write.offset : stop - write.offset]))
        at = stop
    return pieces


FileKey = Hashable


@dataclass(slots=True)
class NameChange:
    """One atomic change of names: path -> file, or None where the name is gone."""

    names: dict[str, FileKey | None]
    number: int

    def directories(self) -> set[str]:
        return {path.rpartition("/")[0] for path in self.names}


class Disk:
    """Files by key (an inode's identity) and names by path. Directories are taken to be durable when made."""

    def __init__(self) -> None:
        self.files: dict[FileKey, FileState] = {}
        self.names: dict[str, FileKey] = {}  # as living processes see them
        self._durable_names: dict[str, FileKey] = {}
        self._pending: list[NameChange] = []
        self.name_changes_total = 0

    def file(self, key: FileKey) -> FileState:
        return self.files.setdefault(key, FileState())

    def add_durable(self, path: str, key: FileKey, content: bytes) -> None:
        self.files[key] = FileState(bytearray(content))
        self.names[path] = self._durable_names[path] = key

    def change_names(self, names: dict[str, FileKey | None]) -> None:
        self._pending.append(NameChange(names, self.name_changes_total))
        self.name_changes_total += 1
        _apply_names(self.names, names)

    def sync_directory(self, directory: str, covered: int | None = None) -> None:
        """Make durable the changes in ``directory`` made before ``name_changes_total`` stood at ``covered``."""
        covered = self.name_changes_total if covered is None else covered
        rest = []
        for change in self._pending:
            if change.number < covered and directory in change.directories():
                _apply_names(self._durable_names, change.names)
            else:
                rest.append(change)
        self._pending = rest

    def after_power_loss(self, loss: Loss, seed: int) -> dict[str, bytes]:
        """Path -> content of every file that is left. The disk itself is not changed."""
        rng = random.Random(seed)
        names = dict(self._durable_names)
        for change in self._surviving_changes(loss, rng):
            _apply_names(names, change.names)
        contents: dict[FileKey, bytes] = {}
        for path in sorted(names):
            key = names[path]
            if key not in contents:
                contents[key] = self.file(key).after_power_loss(loss, rng)
        return {path: contents[key] for path, key in sorted(names.items())}

    def _surviving_changes(self, loss: Loss, rng: random.Random) -> list[NameChange]:
        if loss is Loss.ALL:
            return []
        if loss is Loss.NONE:
            return self._pending
        if rng.random() < 0.5:  # as a journaled file system does: in order
            return self._pending[: rng.randrange(len(self._pending) + 1)]
        return [change for change in self._pending if rng.random() < 0.5]


def _apply_names(names: dict[str, FileKey], changes: dict[str, FileKey | None]) -> None:
    for path, key in changes.items():
        if key is None:
            names.pop(path, None)
        else:
            names[path] = key
