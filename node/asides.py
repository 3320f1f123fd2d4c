"""Dead letters and held suspects on their way to lie aside in the log's store, with their messages (pure)."""

from __future__ import annotations

from collections.abc import Iterator

from node import messages as m
from node.pieces import Piece
from node.settling import Closing
from node.undecodable import Undecodables
from oncekeeper.log.port import Aside


class Asides:
    def __init__(self, numbers: Iterator[int], undecodables: Undecodables) -> None:
        self._numbers = numbers
        self._undecodables = undecodables
        self._storing: dict[int, Closing | Piece] = {}

    def __bool__(self) -> bool:
        return bool(self._storing)

    def put(self, kind: str, put: Closing | Piece, reason: str, wall_ms: int) -> m.StoreAside:
        """A claim to be settled once its tasks lie aside, or tasks that nobody has claimed."""
        piece = put.piece if isinstance(put, Closing) else put
        ticket = next(self._numbers)
        self._storing[ticket] = put
        message = self._undecodables.message
        tasks = (
            Aside(kind, task_id, message(piece, at), reason, wall_ms) for at, task_id in enumerate(piece.ids)
        )
        return m.StoreAside(ticket, tuple(tasks))

    def stored(self, ticket: int) -> Closing | Piece:
        return self._storing.pop(ticket)
