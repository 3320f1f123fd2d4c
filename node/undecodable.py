"""What stands in the log and is no task: it gets an id from its place, so that it is given to dead letters once."""

from __future__ import annotations

from dedup.ids import Ids, keyed_id
from node.pieces import Piece
from oncekeeper.envelope import TaskBatch, encode_task
from oncekeeper.log.delayed import enqueued
from oncekeeper.log.port import Undecodable


class Undecodables:
    def __init__(self) -> None:
        self._known: dict[bytes, Undecodable] = {}

    def batch(self, item: Undecodable) -> TaskBatch:
        """A batch in its stead, of no handler."""
        keys = tuple(
            keyed_id("undecodable", f"{item.partition}/{offset}")
            for offset in range(item.base, item.base + item.count)
        )
        self._known.update(dict.fromkeys(keys, item))
        return TaskBatch(queue="", handler="", ids=Ids((), keys), bodies=(b"{}",) * item.count)

    def reason(self, piece: Piece) -> str | None:
        """Why it could not be decoded; None: it is a task."""
        item = self._known.get(piece.ids.keys[0]) if self._may_be(piece) else None
        return item.reason if item is not None else None

    def message(self, piece: Piece, at: int) -> bytes:
        """What to put aside for the task ``at`` this place of the piece."""
        item = self._known.get(piece.ids.keys[at]) if self._may_be(piece) else None
        if item is not None:
            return item.raw
        batch = piece.batch.part(piece.at + at, 1)
        # It was due. If it comes back it takes its turn: its message may name a time from which it was moved.
        return encode_task(enqueued(batch) if batch.due_ms else batch)

    def settled(self, piece: Piece) -> None:
        if self._may_be(piece):
            for key in piece.ids.keys:
                self._known.pop(key, None)

    def _may_be(self, piece: Piece) -> bool:
        return not piece.batch.handler and bool(piece.batch.ids.keys)
