"""Opening a journal again: what to believe, what to cut, and when to refuse.

Only two things end a journal early. A *torn tail* is the last batch, cut off by a crash before its sync returned:
nobody was told of it, so it is cut. *Damage* is a bad byte in what had been synced: entries that others count on,
or a vote, may be gone, so the store is refused as a whole and the node may not vote with it. Bytes look alike in
both cases; these are the proofs that something had been synced:
- a batch further on in the file, for it was written only after the sync before it returned;
- a later segment, for it was made only after the one before was closed, and it tells that one's length;
- the mark, written after each sync. It survives the death of the process at once, and a power loss once a second
  has passed since (``Journal.onOneSecondTimer``). What stays open is a bit that rots in the very last batch
  before a power loss within that second: it is taken for a torn tail.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field

from raft.files import Files
from raft.journal_format import (
    FORMAT_VERSION,
    Kind,
    Mark,
    Record,
    SegmentHeader,
    batch_beyond,
    decode_batches,
    decode_marks,
    decode_segment_header,
    segment_version,
)

MARK_NAME = "synced"
REJOINING_NAME = "rejoining"
_SEGMENT_NAME = re.compile(r"[0-9]{16}\.segment")

Entry = tuple[bytes, int, int]
"""(command, index, term): the shape in which the engine reads the journal."""


class JournalError(Exception):
    """The journal cannot be used; the message says why and what to do."""


class JournalDamaged(JournalError):
    """Synced data is wrong or missing. The node must not vote with this store."""

    def __init__(self, path: str, offset: int, what: str) -> None:
        super().__init__(
            f"{path}, offset {offset}: {what}. Synced entries or votes may be lost, so this node must not vote "
            "with this store: move it aside (raft.journal.quarantine) and let the node rejoin from its peers"
        )
        self.path, self.offset, self.what = path, offset, what


class JournalRefused(JournalError):
    """The store is sound, but it is not ours to open: a newer format, or another cluster's."""


class JournalFailed(JournalError):
    """A write or sync failed. What reached the disk is unknown, so this journal refuses everything from now on."""


def segment_name(number: int) -> str:
    return f"{number:016d}.segment"


@dataclass(slots=True)
class Contents:
    """What the records of a journal add up to. ``runs``: (first live index, segment that has it), ascending."""

    next_index: int  # 0: any
    term: int
    vote: str | None
    oldest: int
    entries: list[Entry] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)

    def apply(self, record: Record, segment: int) -> str | None:
        """Take one record in; the answer is a complaint if it does not follow from those before."""
        kind, index, term, payload = record
        if kind == Kind.ENTRY:
            if self.next_index not in (0, index):
                return f"entry {index} where {self.next_index} must follow"
            if not self.runs or self.runs[-1][1] != segment:
                self.runs.append((index, segment))
            self.entries.append((payload, index, term))
            self.next_index = index + 1
        elif kind == Kind.TERM:
            try:
                self.term, self.vote = term, payload.decode() if index else None
            except UnicodeDecodeError:
                return f"the vote of term {term} is no name"
        elif kind == Kind.CUT:
            self.cut(index)
        elif kind == Kind.HEAD:
            if index > self.next_index:
                return f"head {index} beyond the next entry {self.next_index}"
            self.drop(index)
            self.oldest = term
        elif kind == Kind.RESET:
            self.entries, self.runs, self.next_index, self.oldest = [], [], 0, term
        else:
            return f"unknown record kind {kind}"
        return None

    def cut(self, index: int) -> None:
        """Forget entries from ``index`` on."""
        if self.entries:
            del self.entries[max(0, index - self.entries[0][1]) :]
        while self.runs and self.runs[-1][0] >= index:
            self.runs.pop()
        self.next_index = index

    def drop(self, index: int) -> None:
        """Forget entries below ``index``."""
        if self.entries:
            del self.entries[: max(0, index - self.entries[0][1])]
        self.runs = runs_from(self.runs, index) if self.entries else []


def runs_from(runs: list[tuple[int, int]], index: int) -> list[tuple[int, int]]:
    """The runs that hold entries from ``index`` on, the first one shortened to begin there."""
    at = bisect_left(runs, (index + 1,)) - 1
    return [(index, runs[at][1]), *runs[at + 1 :]] if at >= 0 else runs


@dataclass(slots=True)
class Recovered:
    """A journal as found. ``doubtful`` from ``proven_end`` to ``end`` must be written again before it is synced."""

    contents: Contents
    segment: int
    end: int  # of the last good batch in the last segment
    proven_end: int
    doubtful: bytes
    file_bytes: int  # of the last segment, torn tail included
    mark: Mark
    segment_sizes: dict[int, int]
    obsolete: list[str]

    @property
    def torn_bytes(self) -> int:
        return self.file_bytes - self.end


@dataclass(slots=True)
class _Segment:
    path: str
    header: SegmentHeader
    header_bytes: int
    data: bytes
    end: int
    records: list[Record]


def recover(files: Files, directory: str, cluster: bytes) -> Recovered | None:
    """Read the store and change nothing; None: there is none. Raises JournalDamaged, JournalRefused, OSError."""
    names = files.list(directory)
    if REJOINING_NAME in names and files.read(f"{directory}/{REJOINING_NAME}") != b"empty\n":
        raise JournalDamaged(
            f"{directory}/{REJOINING_NAME}", 0, "moving the damaged store aside was interrupted; do it again"
        )
    numbers = [int(name[:16]) for name in names if _SEGMENT_NAME.fullmatch(name)]
    mark = decode_marks(files.read(f"{directory}/{MARK_NAME}")) if MARK_NAME in names else None
    if not numbers:
        if mark is not None and mark.segment:
            raise JournalDamaged(f"{directory}/{segment_name(mark.segment)}", 0, "the segment is missing")
        return None
    if mark is None:
        raise JournalDamaged(f"{directory}/{MARK_NAME}", 0, "the file is missing beside existing segments")
    if mark.segment > numbers[-1]:
        raise JournalDamaged(f"{directory}/{segment_name(mark.segment)}", 0, "the newest segment is missing")

    last = _load(files, directory, numbers[-1], cluster)
    proven_end = mark.offset if mark.segment == numbers[-1] else last.header_bytes
    _refuse_damaged_tail(last, proven_end)
    oldest = last.header.oldest
    for record in last.records:
        if record.kind in (Kind.HEAD, Kind.RESET):
            oldest = record.term
    chain = [last]
    for number in range(numbers[-1] - 1, oldest - 1, -1):
        segment = _load(files, directory, number, cluster)
        _refuse_unclosed(segment, chain[-1].header.length_before)
        chain.append(segment)
    chain.reverse()
    return Recovered(
        contents=_replay(chain),
        segment=numbers[-1],
        end=last.end,
        proven_end=proven_end,
        doubtful=last.data[proven_end : last.end],
        file_bytes=len(last.data),
        mark=mark,
        segment_sizes={segment.header.number: segment.end for segment in chain},
        obsolete=[segment_name(n) for n in numbers if n < oldest] + [n for n in names if n.endswith(".new")],
    )


def _load(files: Files, directory: str, number: int, cluster: bytes) -> _Segment:
    path = f"{directory}/{segment_name(number)}"
    if not files.exists(path):
        raise JournalDamaged(path, 0, "the segment is missing")
    data = files.read(path)
    version = segment_version(data)
    if version is not None and version > FORMAT_VERSION:
        raise JournalRefused(
            f"{path} has journal format {version}, and this program knows formats up to {FORMAT_VERSION}: "
            "start it with the version that wrote it, or a later one"
        )
    decoded = decode_segment_header(data)
    if decoded is None or decoded[0].number != number:
        raise JournalDamaged(path, 0, "the segment's header fails its check")
    header, header_bytes = decoded
    if header.cluster != cluster:
        raise JournalRefused(
            f"{path} belongs to cluster {header.cluster.hex()}, and this node to {cluster.hex()}: "
            "give the node its own data directory"
        )
    records: list[Record] = []
    end = header_bytes
    for batch, stop in decode_batches(data, number, header_bytes):
        records += batch
        end = stop
    return _Segment(path, header, header_bytes, data, end, records)


def _refuse_damaged_tail(last: _Segment, proven_end: int) -> None:
    if last.end < proven_end:
        raise JournalDamaged(
            last.path, last.end, f"a bad or missing batch below offset {proven_end}, synced before"
        )
    beyond = batch_beyond(last.data, last.header.number, last.end)
    if beyond is not None:
        raise JournalDamaged(last.path, last.end, f"a bad batch, and a good one at offset {beyond} beyond it")


def _refuse_unclosed(segment: _Segment, length: int) -> None:
    if segment.end < length:
        raise JournalDamaged(segment.path, segment.end, f"a bad batch in a segment closed at {length} bytes")
    if len(segment.data) != length:
        raise JournalDamaged(segment.path, length, f"the segment was closed at {length} bytes and is longer")


def _replay(chain: list[_Segment]) -> Contents:
    first = chain[0].header
    contents = Contents(first.next_index, first.term, first.vote, chain[-1].header.oldest)
    for segment in chain:
        number = segment.header.number
        for record in segment.records:
            complaint = contents.apply(record, number)
            if complaint is not None:
                raise JournalDamaged(segment.path, segment.header_bytes, f"records contradict: {complaint}")
    return contents
