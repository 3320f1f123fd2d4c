"""Proposals in flight: what each asked of the ledger, in the order of its commands, until it is answered (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field

from node.pieces import Piece
from node.settling import Closing


@dataclass(slots=True)
class Ticket:
    session: int
    settles: list[list[Closing]] = field(default_factory=list)
    rulings: list[list[Piece]] = field(default_factory=list)
    claims: list[list[Piece]] = field(default_factory=list)


class Tickets:
    """Numbers grow from one proposal to the next."""

    def __init__(self) -> None:
        self._open: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, number: int, ticket: Ticket) -> None:
        self._open[number] = ticket

    def take(self, number: int) -> Ticket:
        return self._open.pop(number)

    @property
    def newest(self) -> int:
        return max(self._open, default=0)

    def answered_up_to(self, number: int) -> bool:
        return min(self._open, default=number + 1) > number
