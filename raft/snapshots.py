"""The snapshot: the ledger's state at one index, in one file that is whole and checked, or not there.

Theory. A snapshot stands for all entries up to its index, so the journal may forget those only once the file is
durable. It is written under another name and synced beside the loop; the call that ``write`` returns moves it into
place and syncs the directory. Only the living process makes that call (stock PySyncObj's forked child could finish
its rename after a restart, over a newer file); temporary files of the dead are removed when the store is opened.
What is read, and what came from a peer, is believed only after its checksum was.

    file     magic 8 | version u32 | header length u32 | cluster 16 | last index u64 | last term u64
             | body length u64 | body CRC32C u32 | header CRC32C u32 | body

The file travels as it is, in chunks by offset; the receiver checks the whole before it takes the old one's place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from google_crc32c import extend as crc32c_extend
from google_crc32c import value as crc32c

from raft.files import OS_FILES, File, Files
from raft.journal import Journal

FORMAT_VERSION = 1
MAGIC = b"OKSNAP\r\n"
NAME = "snapshot"
_TEMPORARY = ".new"
_HEADER = Struct("<8sII16sQQQII")
_HEADER_CHECKED_BYTES = _HEADER.size - 4
_READ_BYTES = 1 << 20


class SnapshotError(Exception):
    """The snapshot cannot be used; the message says why and what to do."""


class SnapshotDamaged(SnapshotError):
    """Bytes are wrong or missing: the state must come from a peer."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(
            f"{path}: {what}. Entries that only this snapshot held are lost on this node, so it must not vote: "
            "move its store aside and let it rejoin from its peers"
        )
        self.path, self.what = path, what


class SnapshotRefused(SnapshotError):
    """The snapshot is sound, but not ours to open: a newer format, or another cluster's."""


class SnapshotGap(SnapshotError):
    """Snapshot and journal do not meet: entries or votes were lost on this node, so it must not vote."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. Entries or votes are lost on this node, so it must not vote: move its store aside "
            "(raft.journal.quarantine) and let it rejoin from its peers"
        )


class SnapshotHeader(NamedTuple):
    cluster: bytes
    last_index: int
    last_term: int
    body_bytes: int
    body_crc32c: int

    @property
    def file_bytes(self) -> int:
        return _HEADER.size + self.body_bytes

    def encode(self) -> bytes:
        head = _HEADER.pack(MAGIC, FORMAT_VERSION, _HEADER.size, *self, 0)[:_HEADER_CHECKED_BYTES]
        return bytes(head + crc32c(head).to_bytes(4, "little"))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The machine's ``state`` with all entries up to ``index``, whose entry has ``term``."""

    index: int
    term: int
    state: bytes


class SnapshotStore:
    """The one snapshot of a node, in ``directory``. One owner, one thread."""

    __slots__ = ("_cluster", "_directory", "_files", "path")

    def __init__(
        self, directory: str | os.PathLike[str], *, files: Files = OS_FILES, cluster_id: str = ""
    ) -> None:
        self._directory, self._files = os.fspath(directory), files
        self._cluster = bytes.fromhex(cluster_id).rjust(16, b"\0")
        if len(self._cluster) != 16:
            raise ValueError(f"cluster_id has {len(self._cluster)} bytes; it must have 16 (32 hex digits)")
        self.path = f"{self._directory}/{NAME}"
        files.make_directory(self._directory)
        for name in files.list(self._directory):
            if name.startswith(NAME) and name.endswith(_TEMPORARY):
                files.unlink(f"{self._directory}/{name}")

    # --- writing

    def write(self, snapshot: Snapshot) -> Callable[[], None]:
        """Write and sync beside the present one; may run in a thread, one at a time.

        The returned call, for the loop, makes it the present one, durable when it returns. Until then the old one
        stands, whatever fails (OSError). The call raises ValueError if a later snapshot took the place meanwhile.
        """
        path = f"{self.path}.written{_TEMPORARY}"
        self._remove(path)
        state = snapshot.state
        header = SnapshotHeader(self._cluster, snapshot.index, snapshot.term, len(state), crc32c(state))
        file = self._files.open(path, create=True)
        try:
            file.pwrite(header.encode(), 0)
            file.pwrite(state, _HEADER.size)
            file.fsync()
        finally:
            file.close()
        return lambda: self.install(path, header)

    def install(self, path: str, header: SnapshotHeader) -> None:
        present = self.header()
        if present is not None and header.last_index < present.last_index:
            raise ValueError(f"snapshot {header.last_index} would replace the later {present.last_index}")
        self._files.rename(path, self.path)
        self._files.sync_directory(self._directory)

    def _remove(self, path: str) -> None:
        if self._files.exists(path):
            self._files.unlink(path)

    # --- reading

    def header(self) -> SnapshotHeader | None:
        """The header, checked; None: there is no snapshot. The body is not looked at."""
        if not self._files.exists(self.path):
            return None
        file = self._files.open(self.path)
        try:
            return self._decode_header(self.path, file.pread(_HEADER.size, 0), file.size())
        finally:
            file.close()

    def load(self) -> Snapshot | None:
        """The snapshot, every byte checked; None: there is none. Raises SnapshotDamaged, SnapshotRefused."""
        if not self._files.exists(self.path):
            return None
        data = self._files.read(self.path)
        header = self._decode_header(self.path, data[: _HEADER.size], len(data))
        body = data[_HEADER.size :]
        if crc32c(body) != header.body_crc32c:
            raise SnapshotDamaged(self.path, "the body fails its check")
        return Snapshot(header.last_index, header.last_term, body)

    def _decode_header(self, path: str, data: bytes, file_bytes: int) -> SnapshotHeader:
        if len(data) < _HEADER.size or data[:8] != MAGIC:
            raise SnapshotDamaged(path, "this is no whole snapshot header")
        _, version, _, *fields, crc = _HEADER.unpack(data)
        if version > FORMAT_VERSION:
            raise SnapshotRefused(
                f"{path} has snapshot format {version}, and this program knows formats up to {FORMAT_VERSION}: "
                "start it with the version that wrote it, or a later one"
            )
        if crc32c(data[:_HEADER_CHECKED_BYTES]) != crc:
            raise SnapshotDamaged(path, "the header fails its check")
        header = SnapshotHeader(*fields)
        if header.cluster != self._cluster:
            raise SnapshotRefused(
                f"{path} belongs to cluster {header.cluster.hex()}, and this node to {self._cluster.hex()}"
            )
        if file_bytes != header.file_bytes:
            raise SnapshotDamaged(path, f"the file has {file_bytes} bytes instead of {header.file_bytes}")
        return header

    # --- sending and receiving

    def sender(self) -> SnapshotSender | None:
        """A reader of the present snapshot, which stays whole though a newer one may take its place meanwhile."""
        header = self.header()
        return None if header is None else SnapshotSender(self._files.open(self.path), header)

    def receiver(self) -> SnapshotReceiver:
        """Takes a snapshot in from a peer; the one begun before, if any, is given up."""
        path = f"{self.path}.received{_TEMPORARY}"
        self._remove(path)
        return SnapshotReceiver(self, self._files.open(path, create=True), path)

    def check_received(self, path: str, file: File) -> SnapshotHeader:
        header = self._decode_header(path, file.pread(_HEADER.size, 0), file.size())
        at, crc = _HEADER.size, 0
        while part := file.pread(_READ_BYTES, at):
            crc = crc32c_extend(crc, part)
            at += len(part)
        if crc != header.body_crc32c:
            raise SnapshotDamaged(path, "the body fails its check")
        return header


class SnapshotSender:
    """One transmission, by offset, so that a lost chunk can be asked for again."""

    __slots__ = ("_file", "header")

    def __init__(self, file: File, header: SnapshotHeader) -> None:
        self._file, self.header = file, header

    def chunk(self, offset: int, size_max: int) -> bytes:
        """Bytes of the file at ``offset``; empty at its end."""
        return self._file.pread(size_max, offset)

    def close(self) -> None:
        self._file.close()


class SnapshotReceiver:
    """One reception into a temporary file. Chunks must come in order; ``offset`` is what is wanted next."""

    __slots__ = ("_file", "_path", "_store", "offset")

    def __init__(self, store: SnapshotStore, file: File, path: str) -> None:
        self._store, self._file, self._path = store, file, path
        self.offset = 0

    def take(self, offset: int, chunk: bytes) -> bool:
        """False: not the chunk that is wanted; nothing was taken, ask again from ``offset``."""
        if offset != self.offset:
            return False
        self._file.pwrite(chunk, offset)
        self.offset += len(chunk)
        return True

    def install(self) -> SnapshotHeader:
        """Check the whole and put it in the old one's place; durable on return. The receiver is used up.

        Raises SnapshotDamaged, SnapshotRefused, OSError, ValueError (older than the present one): that one stays.
        """
        try:
            self._file.fsync()
            header = self._store.check_received(self._path, self._file)
        finally:
            self._file.close()
        self._store.install(self._path, header)
        return header

    def abandon(self) -> None:
        self._file.close()


def check_alignment(journal: Journal, snapshot: SnapshotHeader | None) -> None:
    """At start: raise SnapshotGap unless snapshot and journal together hold every entry that this node ever synced.

    A journal that begins below the snapshot is whole: its head is trimmed, not thrown away (PySyncObj's defect 2).
    An empty journal beside a snapshot was lost, and a vote with it: a journal that was ever used holds an entry.
    """
    first = journal[0][1] if len(journal) else 0
    if snapshot is None and first > 1:
        raise SnapshotGap(f"the journal begins at entry {first}, and there is no snapshot of those before")
    if snapshot is None or journal.rejoining:
        return
    if not first:
        raise SnapshotGap(f"there is a snapshot of entry {snapshot.last_index}, and the journal is empty")
    if first > snapshot.last_index + 1:
        raise SnapshotGap(
            f"the snapshot ends at entry {snapshot.last_index} and the journal begins at {first}"
        )
