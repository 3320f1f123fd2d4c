"""The journal's files: the newest segment, which grows, the older ones, and the mark.

Every method may raise OSError, and the object must then not be used again: see the journal's theory (journal.py).
"""

from __future__ import annotations

from raft.files import File, Files
from raft.journal_format import (
    BATCH_HEADER_BYTES,
    MARK_SLOT_BYTES,
    Mark,
    SegmentHeader,
    encode_batch_header,
)
from raft.journal_recovery import MARK_NAME, Recovered, segment_name


class Segments:
    """``number`` is the newest segment's; ``sizes`` has the synced bytes of each."""

    __slots__ = (
        "_cluster",
        "_directory",
        "_file",
        "_files",
        "_mark",
        "_mark_is_synced",
        "_mark_turn",
        "number",
        "path",
        "sizes",
    )

    def __init__(self, files: Files, directory: str, cluster: bytes) -> None:
        self._files, self._directory, self._cluster = files, directory, cluster
        self._file: File | None = None
        self._mark: File | None = None
        self._mark_turn = 0
        self._mark_is_synced = True
        self.number = 0
        self.path = directory
        self.sizes: dict[int, int] = {}

    def create(self) -> None:
        """Make the mark, and no segment yet."""
        files, mark = self._files, f"{self._directory}/{MARK_NAME}"
        files.make_directory(self._directory)
        for name in files.list(self._directory):
            if name.endswith(".new"):
                files.unlink(f"{self._directory}/{name}")
        self._mark = files.open(mark, create=not files.exists(mark))
        self._mark.pwrite(bytes(2 * MARK_SLOT_BYTES), 0)
        self._mark.fsync()
        # The mark's name must be durable before any segment is: segments without a mark are damage.
        files.sync_directory(self._directory)

    def resume(self, found: Recovered) -> None:
        """Cut the torn tail, make durable what is believed, remove what is no longer needed."""
        files = self._files
        self.number, self.sizes = found.segment, found.segment_sizes
        self._mark_turn = found.mark.turn
        self.path = f"{self._directory}/{segment_name(found.segment)}"
        self._file = files.open(self.path)
        self._mark = files.open(f"{self._directory}/{MARK_NAME}")
        if found.torn_bytes:
            self._file.truncate(found.end)
        if found.doubtful:
            # The last owner may have died between write and sync, or its sync may have failed and left the pages
            # marked clean: only bytes written anew are sure to be covered by this sync.
            self._file.pwrite(found.doubtful, found.proven_end)
        self._file.fsync()
        for name in found.obsolete:
            files.unlink(f"{self._directory}/{name}")
        files.sync_directory(self._directory)
        self._write_mark(found.mark.commit_index)
        self.sync_mark()

    def append(self, body: list[bytes], body_bytes: int, records: int, commit_index: int) -> None:
        """Write one batch; durable on return."""
        assert self._file is not None
        end = self.sizes[self.number]
        header = encode_batch_header(self.number, end, body_bytes, records)
        self._file.pwrite(b"".join((header, *body)), end)
        self._file.fdatasync()
        self.sizes[self.number] = end + BATCH_HEADER_BYTES + body_bytes
        self._write_mark(commit_index)

    def begin_next(
        self, next_index: int, oldest: int, term: int, vote: str | None, commit_index: int
    ) -> None:
        """Close the newest segment and make the next; durable on return."""
        number = self.number + 1
        length_before = self.sizes.get(self.number, 0)
        header = SegmentHeader(number, self._cluster, next_index, oldest, length_before, term, vote).encode()
        path = f"{self._directory}/{segment_name(number)}"
        # Made under another name first: a segment that bears its own name has a whole header, or is damaged.
        file = self._files.open(f"{path}.new", create=True)
        file.pwrite(header, 0)
        file.fsync()
        self._files.rename(f"{path}.new", path)
        self._files.sync_directory(self._directory)
        if self._file is not None:
            self._file.close()
        self._file, self.path, self.number = file, path, number
        self.sizes[number] = len(header)
        self._write_mark(commit_index)

    def drop_below(self, oldest: int) -> None:
        """Unlink older segments. Not synced: what comes back after a power loss is unlinked at the next start."""
        for number in [number for number in self.sizes if number < oldest]:
            self._files.unlink(f"{self._directory}/{segment_name(number)}")
            del self.sizes[number]

    def _write_mark(self, commit_index: int) -> None:
        """Note how far the disk is known to hold the journal."""
        assert self._mark is not None
        self._mark_turn += 1
        mark = Mark(self._mark_turn, self.number, self.sizes[self.number], commit_index)
        self._mark.pwrite(mark.encode(), self._mark_turn % 2 * MARK_SLOT_BYTES)
        self._mark_is_synced = False

    def sync_mark(self) -> None:
        if self._mark is not None and not self._mark_is_synced:
            self._mark.fdatasync()
            self._mark_is_synced = True

    def close(self) -> None:
        for file in (self._file, self._mark):
            if file is not None:
                file.close()
        self._file = self._mark = None
