"""The journal's bytes: segment header, batch, record, and the mark of what is known to be synced. Pure.

A segment is a header and then batches, each written once and never again:

    segment  magic 8 | version u32 | header length u32 | number u64 | cluster 16 | next index u64 | oldest u64
             | length of the segment before u64 | term u64 | vote length u16 (0xFFFF: none) | vote | CRC32C u32
    batch    magic 4 | CRC32C u32 | segment number u64 | own offset u64 | body length u32 | records u32 | records
    record   CRC32C u32 | payload length u32 | kind u8 | index u64 | term u64 | payload
    mark     magic 4 | CRC32C u32 | turn u64 | segment number u64 | offset u64 | commit index u64

A batch is what one ``sync`` made durable, and it is the unit of belief: whole, or never written. Its header names
its segment and its own offset, so bytes that strayed from elsewhere are not taken for a batch, and a batch can be
found beyond damage, where lengths are not to be trusted. All integers are little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from google_crc32c import extend as crc32c_extend
from google_crc32c import value as crc32c

FORMAT_VERSION = 1
SEGMENT_MAGIC = b"OKJSEG\r\n"
BATCH_MAGIC = b"OKB\x97"
MARK_MAGIC = b"OKM\x97"
NO_VOTE = 0xFFFF
VOTE_BYTES_MAX = 1024

_SEGMENT = Struct("<8sIIQ16sQQQQH")
_BATCH = Struct("<4sIQQII")
_RECORD = Struct("<IIBQQ")
_TAIL = Struct("<IBQQ")
_MARK = Struct("<4sIQQQQ")
_U32 = Struct("<I")

SEGMENT_HEADER_BYTES_MAX = _SEGMENT.size + VOTE_BYTES_MAX + 4
BATCH_HEADER_BYTES = _BATCH.size
RECORD_HEADER_BYTES = _RECORD.size
BATCH_BODY_BYTES_MAX = 0xFFFF_FFFF


class Kind(IntEnum):
    """What a record does to the journal. Values are part of the format: never renumber."""

    ENTRY = 1  # index, term, payload = command: appended at index
    TERM = 2  # term, payload = vote (index 1) or none (index 0)
    CUT = 3  # entries from index on are gone: they conflicted with the leader's
    HEAD = 4  # entries below index are gone: a snapshot holds them; term = oldest segment still needed
    RESET = 5  # all entries are gone; the next may have any index; term = oldest segment still needed


class Record(NamedTuple):
    kind: int
    at: int  # an index
    term: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """State at the segment's start, so that older segments can be dropped without losing term or vote."""

    number: int
    cluster: bytes
    next_index: int  # 0: any
    oldest: int  # the oldest segment needed when this one was made
    length_before: int  # of segment number - 1 when it was closed; 0 for the first
    term: int
    vote: str | None

    def encode(self) -> bytes:
        vote = b"" if self.vote is None else self.vote.encode()
        head = _SEGMENT.pack(
            SEGMENT_MAGIC,
            FORMAT_VERSION,
            _SEGMENT.size + len(vote) + 4,
            self.number,
            self.cluster,
            self.next_index,
            self.oldest,
            self.length_before,
            self.term,
            NO_VOTE if self.vote is None else len(vote),
        )
        return head + vote + _U32.pack(crc32c(head + vote))


def segment_version(data: bytes) -> int | None:
    """The format version that the file names, or None if it is not a segment at all."""
    if len(data) < 12 or data[:8] != SEGMENT_MAGIC:
        return None
    return int(_U32.unpack_from(data, 8)[0])


def decode_segment_header(data: bytes) -> tuple[SegmentHeader, int] | None:
    """The header and its length, or None if any bit of it is wrong."""
    if len(data) < _SEGMENT.size + 4 or data[:8] != SEGMENT_MAGIC:
        return None
    _, version, length, number, cluster, next_index, oldest, before, term, vote_length = _SEGMENT.unpack_from(
        data
    )
    vote_bytes = 0 if vote_length == NO_VOTE else vote_length
    if version != FORMAT_VERSION or length != _SEGMENT.size + vote_bytes + 4 or len(data) < length:
        return None
    if crc32c(data[: length - 4]) != _U32.unpack_from(data, length - 4)[0]:
        return None
    try:
        vote = None if vote_length == NO_VOTE else data[_SEGMENT.size : length - 4].decode()
    except UnicodeDecodeError:
        return None  # the checksum holds, but we never write a name that is no text
    return SegmentHeader(number, cluster, next_index, oldest, before, term, vote), length


def encode_record(kind: int, index: int, term: int, payload: bytes = b"") -> bytes:
    tail = _TAIL.pack(len(payload), kind, index, term)
    return _U32.pack(crc32c_extend(crc32c(tail), payload)) + tail + payload


def encode_batch_header(segment: int, offset: int, body_bytes: int, records: int) -> bytes:
    head = _BATCH.pack(BATCH_MAGIC, 0, segment, offset, body_bytes, records)
    return BATCH_MAGIC + _U32.pack(crc32c(head[8:])) + head[8:]


def _batch_at(data: bytes, segment: int, offset: int) -> tuple[int, int] | None:
    """(body length, records) of the batch header at ``offset``, or None if there is none."""
    if offset + _BATCH.size > len(data) or data[offset : offset + 4] != BATCH_MAGIC:
        return None
    _, crc, number, own_offset, body_bytes, records = _BATCH.unpack_from(data, offset)
    if crc != crc32c(data[offset + 8 : offset + _BATCH.size]) or (number, own_offset) != (segment, offset):
        return None
    return body_bytes, records


def decode_batch(data: bytes, segment: int, offset: int) -> tuple[list[Record], int] | None:
    """The records of the batch at ``offset`` and the offset of its end, or None unless all of it is right."""
    header = _batch_at(data, segment, offset)
    if header is None:
        return None
    at = offset + _BATCH.size
    end = at + header[0]
    if end > len(data):
        return None
    records = []
    while at < end:
        if at + _RECORD.size > end:
            return None
        crc, length, kind, index, term = _RECORD.unpack_from(data, at)
        stop = at + _RECORD.size + length
        if stop > end or crc32c(data[at + 4 : stop]) != crc:
            return None
        records.append(Record(kind, index, term, data[at + _RECORD.size : stop]))
        at = stop
    return (records, end) if len(records) == header[1] else None


def decode_batches(data: bytes, segment: int, offset: int) -> Iterator[tuple[list[Record], int]]:
    """Batches from ``offset`` on, each with the offset of its end, up to the first that is not whole."""
    while (batch := decode_batch(data, segment, offset)) is not None:
        yield batch
        offset = batch[1]


def batch_beyond(data: bytes, segment: int, offset: int) -> int | None:
    """The offset of a batch header after ``offset``: proof that what lies before it had been synced."""
    at = offset
    while (at := data.find(BATCH_MAGIC, at + 1)) >= 0:
        if _batch_at(data, segment, at) is not None:
            return at
    return None


class Mark(NamedTuple):
    """Segment ``segment`` is synced up to ``offset``; ``commit_index`` is a hint and no promise."""

    turn: int
    segment: int
    offset: int
    commit_index: int

    def encode(self) -> bytes:
        tail = _MARK.pack(MARK_MAGIC, 0, *self)[8:]
        return MARK_MAGIC + _U32.pack(crc32c(tail)) + tail


MARK_SLOT_BYTES = 512  # one sector a slot: the write of one cannot tear the other


def decode_marks(data: bytes) -> Mark:
    """The furthest mark of the two slots; a slot that fails its check is no evidence, and so is ignored."""
    best = Mark(0, 0, 0, 0)
    for at in (0, MARK_SLOT_BYTES):
        if at + _MARK.size > len(data):
            continue
        magic, crc, *fields = _MARK.unpack_from(data, at)
        if magic == MARK_MAGIC and crc == crc32c(data[at + 8 : at + _MARK.size]):
            best = max(best, Mark(*fields))
    return best
