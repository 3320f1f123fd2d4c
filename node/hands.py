"""The ids in a node's hands, from the asking for their claim to the answer of their settlement: each once (pure).

The ledger answers a repeated claim of one session with the same fence, so two records of one id must not both be
claimed here.
"""

from __future__ import annotations

from dedup.runmap import RunMap
from node.pieces import Piece


class Hands:
    def __init__(self) -> None:
        self._open: RunMap[int] = RunMap()

    def __len__(self) -> int:
        return len(self._open)

    def take(self, piece: Piece) -> tuple[list[Piece], list[Piece]]:
        """(the parts whose ids were not in hand, and now are; the others)."""
        free: list[Piece] = []
        others: list[Piece] = []
        ids = piece.ids
        if len(ids.keys) > 1 and len(set(ids.keys)) < len(ids.keys):
            for at in range(piece.count):
                taken, refused = self.take(piece.part(at, 1))
                free += taken
                others += refused
            return free, others
        at = 0
        for count, is_open in self._open.spans(ids):
            part = piece.part(at, count)
            at += count
            if is_open is None:
                self._open.set(part.ids, 1)
                free.append(part)
            else:
                others.append(part)
        return free, others

    def leave(self, piece: Piece) -> None:
        self._open.remove(piece.ids)
