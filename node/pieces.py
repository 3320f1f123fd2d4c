"""Pieces: neighbours of one batch of the log that are in the same state of a node's work.

A batch of 1,000 tasks is one piece as long as all of them fare alike; it is split where they do not. So the
node's work is counted in pieces, and a body is touched only when it is handed to a worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dedup.ids import Ids
from oncekeeper.envelope import ENQUEUED, TaskBatch
from oncekeeper.log.delayed import Delayed
from raft.commands import Span


class Piece:
    """``count`` tasks of ``batch`` from position ``at``, which stand at ``offset`` of a partition.

    ``epoch`` tells one ownership of the partition from the next: what belongs to an earlier one may still
    settle, but moves no position. ``row``: it was kept until it was due (oncekeeper/log/delayed.py), and came from
    there: its position was passed long ago.
    """

    __slots__ = ("_ids", "at", "batch", "count", "epoch", "offset", "partition", "row")

    def __init__(
        self,
        partition: int,
        epoch: int,
        offset: int,
        batch: TaskBatch,
        at: int,
        count: int,
        row: Delayed | None = None,
    ) -> None:
        self.partition = partition
        self.epoch = epoch
        self.offset = offset
        self.batch = batch
        self.at = at
        self.count = count
        self.row = row
        self._ids: Ids | None = None

    @property
    def ids(self) -> Ids:
        if self._ids is None:
            whole = self.at == 0 and self.count == len(self.batch)
            self._ids = self.batch.ids if whole else self.batch.ids.part(self.at, self.count)
        return self._ids

    @property
    def bodies(self) -> tuple[bytes, ...]:
        return self.batch.bodies[self.at : self.at + self.count]

    @property
    def is_delayed(self) -> bool:
        """Whether the log's store of delayed tasks says when it is due: it came from there, or would go there if
        somebody rescheduled it."""
        return self.row is not None or is_delayed(self.batch)

    def part(self, at: int, count: int) -> Piece:
        """The tasks ``at .. at + count - 1`` of this piece."""
        if at == 0 and count == self.count:
            return self
        return Piece(self.partition, self.epoch, self.offset + at, self.batch, self.at + at, count, self.row)

    def __repr__(self) -> str:
        return f"Piece({self.partition}@{self.offset}+{self.count} {self.batch.handler})"


def is_delayed(batch: TaskBatch) -> bool:
    """Whether it was submitted for a time, and does not wait for its turn in its queue by now."""
    return bool(batch.due_ms) and batch.then != ENQUEUED


class SpanReader:
    """Reads an answer that runs over the ids of several pieces in order, piece by piece."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._rest = iter(spans)
        self._span: Span | None = None
        self._left = 0

    def take(self, piece: Piece) -> list[tuple[Piece, Span]]:
        """The piece, cut where its answers differ, each part with its answer."""
        parts: list[tuple[Piece, Span]] = []
        at = 0
        while at < piece.count:
            if self._span is None or self._left == 0:
                self._span = next(self._rest)
                self._left = self._span.count
            count = min(self._left, piece.count - at)
            parts.append((piece.part(at, count), self._span))
            at += count
            self._left -= count
        return parts


def share_out(pieces: Iterable[Piece], spans: Iterable[Span]) -> Iterator[tuple[Piece, Span]]:
    """Give each piece, cut where needed, its part of an answer that runs over all their ids in order."""
    reader = SpanReader(spans)
    for piece in pieces:
        yield from reader.take(piece)


def gather_ids(pieces: Iterable[Piece]) -> Ids:
    """The ids of pieces that are all of range ids, or all of keyed ids, in order."""
    runs: list[tuple[int, int]] = []
    keys: list[bytes] = []
    for piece in pieces:
        runs.extend(piece.ids.runs)
        keys.extend(piece.ids.keys)
    return Ids(tuple(runs), tuple(keys))


def is_keyed(piece: Piece) -> bool:
    return bool(piece.batch.ids.keys)
