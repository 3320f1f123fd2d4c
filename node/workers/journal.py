"""The work journal: what a node handed to a worker process, and how far that got, where kill -9 cannot reach it.

One file for each worker slot, mapped MAP_SHARED by the node and by the worker. A plain byte stored in such a
mapping belongs to the page cache the moment it is stored, so it survives the death of either process (though not
of the machine: hence the boot id in the header). Who writes what:

- the node writes *records*: an entry in the directory (fence, ids, where the state bytes are), committed by the
  store of one aligned word after all else is in place, before the work is sent; and it frees them, by clearing
  that word, only after the settle was confirmed. Where the data area has room is known in memory only;
- the worker stores one *state byte* a task, before and after it runs, and the time its running tasks began
  (*cells*), by which the node's scan finds what has outrun its time-to-run, without a message a task;
- the node stores the *lease*: until when (CLOCK_BOOTTIME, ns) work may be started. Workers read it before each
  task, so a node that was paused starts nothing by having been continued.

A worker holds an flock on its file for life: whoever gets the lock knows that no orphan is still running.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import zlib
from bisect import bisect_left
from enum import IntEnum
from pathlib import Path

from dedup.ids import KEY_BYTES, Ids
from node.workers.port import Mode

MAGIC = b"OKWORK\r\n"
VERSION = 1
BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"
BOOT_ID_VARIABLE = "OK_BOOT_ID"  # lets a test reboot the machine

HEADER = struct.Struct("<8sIIQ64s")  # magic, version, file bytes, incarnation, boot id; then its CRC32
LEASE_AT = 128
LOSSY_AT = 136  # 1: records had to be dropped, so that absence from this file proves nothing
CELLS_AT = 4096
CELL_COUNT = 512  # pairs of words: started_ns (0: nothing runs), entry << 32 | position
ENTRIES_AT = CELLS_AT + 16 * CELL_COUNT
ENTRY = struct.Struct("<QIIIIII")  # fence, mode, data_at, runs, keys, count, crc; it follows the commit word
ENTRY_BYTES = 64
ENTRY_COUNT = 4096
DATA_AT = ENTRIES_AT + ENTRY_BYTES * ENTRY_COUNT
FILE_BYTES = 4 * 1024 * 1024
GRANULE = 64
SOME_POSITION = 0xFFFFFFFF  # in a cell: whichever position of the entry is marked as started
RUN = struct.Struct("<QQ")


class State(IntEnum):
    """A task's state byte."""

    NOT_STARTED = 0
    STARTED = 1
    FINISHED = 2
    FAILED = 3  # ended without effect by its own account: the handler raised, or was never called


def read_boot_id() -> str:
    """What changes with every start of the machine."""
    return os.environ.get(BOOT_ID_VARIABLE) or Path(BOOT_ID_FILE).read_text().strip()


def pack_header(size: int, incarnation: int, boot_id: str) -> bytes:
    header = HEADER.pack(MAGIC, VERSION, size, incarnation, boot_id.encode()[:64])
    return header + zlib.crc32(header).to_bytes(4, "little")


def pack_ids(ids: Ids) -> bytes:
    return b"".join([RUN.pack(start, count) for start, count in ids.runs]) + b"".join(ids.keys)


def entry_crc(fence: int, mode: int, data_at: int, runs: int, keys: int, count: int, packed: bytes) -> int:
    return zlib.crc32(ENTRY.pack(fence, mode, data_at, runs, keys, count, 0), zlib.crc32(packed))


class Space:
    """First fit over the free stretches of the data area, in granules; known to the node only."""

    def __init__(self, start: int, end: int) -> None:
        self._free: list[tuple[int, int]] = [(start, end - start)]

    def take(self, size: int) -> int | None:
        for position, (at, length) in enumerate(self._free):
            if length > size:
                self._free[position] = (at + size, length - size)
                return at
            if length == size:
                del self._free[position]
                return at
        return None

    def give(self, at: int, size: int) -> None:
        position = bisect_left(self._free, (at, 0))
        if position < len(self._free) and self._free[position][0] == at + size:
            size += self._free.pop(position)[1]
        if position > 0 and sum(self._free[position - 1]) == at:
            position -= 1
            at, length = self._free.pop(position)
            size += length
        self._free.insert(position, (at, size))


class Record:
    """One Work in the journal, as the node holds it."""

    __slots__ = ("data_at", "data_bytes", "entry", "states", "states_at")

    def __init__(self, entry: int, data_at: int, data_bytes: int, states_at: int, states: memoryview) -> None:
        self.entry = entry
        self.data_at = data_at
        self.data_bytes = data_bytes
        self.states_at = states_at
        self.states = states


class Journal:
    """The node's side of one file."""

    def __init__(self, path: Path, incarnation: int, boot_id: str, size: int = FILE_BYTES) -> None:
        if size < DATA_AT + GRANULE:
            raise ValueError(
                f"size={size} must be at least {DATA_AT + GRANULE}: cells and directory come first"
            )
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Blocks are reserved now: on a full disk this fails, where a store into a hole would be a SIGBUS.
            os.posix_fallocate(fd, 0, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._view = memoryview(self._map)
        self._words = self._view.cast("Q")
        self._entries = list(range(ENTRY_COUNT - 1, -1, -1))  # free ones, the lowest last
        self._space = Space(DATA_AT, size - size % GRANULE)
        self.cells = self._words[CELLS_AT // 8 : CELLS_AT // 8 + 2 * CELL_COUNT]
        self.data_bytes_max = size - size % GRANULE - DATA_AT
        header = pack_header(size, incarnation, boot_id)
        self._view[: len(header)] = header

    def put(
        self, mode: Mode, fence: int, ids: Ids, count: int, state: int = State.NOT_STARTED
    ) -> Record | None:
        """Write a record, before its work is handed over; None when there is no room."""
        packed = pack_ids(ids)
        needed = -(-(len(packed) + count) // GRANULE) * GRANULE
        if not self._entries:
            return None
        data_at = self._space.take(needed)
        if data_at is None:
            return None
        entry = self._entries.pop()
        states_at = data_at + len(packed)
        view = self._view
        view[data_at:states_at] = packed
        states = view[states_at : states_at + count]
        states[:] = bytes((state,)) * count
        runs, keys = len(ids.runs), len(ids.keys)
        crc = entry_crc(fence, mode, data_at, runs, keys, count, packed)
        at = ENTRIES_AT + ENTRY_BYTES * entry
        ENTRY.pack_into(view, at + 8, fence, mode, data_at, runs, keys, count, crc)
        # The commit, one aligned store: killed before it, the work was never handed over; after it, all is there.
        self._words[at // 8] = 1
        return Record(entry, data_at, needed, states_at, states)

    def free(self, record: Record) -> None:
        """Forget a record whose settle was confirmed."""
        self._words[(ENTRIES_AT + ENTRY_BYTES * record.entry) // 8] = 0
        self._entries.append(record.entry)
        self._space.give(record.data_at, record.data_bytes)

    def needs(self, ids: Ids, count: int) -> int:
        """Bytes of the data area that a record would take."""
        return -(-(16 * len(ids.runs) + KEY_BYTES * len(ids.keys) + count) // GRANULE) * GRANULE

    def set_lease(self, until_ns: int) -> None:
        self._words[LEASE_AT // 8] = until_ns

    def set_lossy(self) -> None:
        self._words[LOSSY_AT // 8] = 1

    def reset_cells(self) -> None:
        """Before another process takes the slot over."""
        for position in range(0, len(self.cells), 2):
            if self.cells[position]:
                self.cells[position] = 0


class WorkerJournal:
    """The worker's side: lease to read, cells and state bytes to mark."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        # Waits for the slot's former process to be gone. Held until this process ends, however it ends.
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self._map = mmap.mmap(self._fd, os.fstat(self._fd).st_size)
        self._view = memoryview(self._map)
        words = self._view.cast("Q")
        self.lease = words[LEASE_AT // 8 : LEASE_AT // 8 + 1]
        self.cells = words[CELLS_AT // 8 : CELLS_AT // 8 + 2 * CELL_COUNT]

    def states(self, states_at: int, count: int) -> memoryview:
        return self._view[states_at : states_at + count]
