"""A ledger with a hand on it: one command an entry, whole answers back."""

from __future__ import annotations

from dedup.ids import Ids
from raft.commands import (
    Advance,
    AllocateIds,
    Answer,
    Answered,
    Claim,
    Command,
    Effects,
    Event,
    Join,
    Joined,
    Outcome,
    Proposal,
    Result,
    Settle,
    Settlement,
    Span,
)
from raft.ledger import Ledger, LedgerSettings


class Driver:
    """Entries get the indexes 1, 2, 3, …; ``check`` runs after each of them."""

    def __init__(self, settings: LedgerSettings | None = None) -> None:
        self.ledger = Ledger(3, settings)
        self.index = 0
        self.events: tuple[Event, ...] = ()

    def apply(self, *commands: Command, proposer: int = 1, sequence: int | None = None) -> Effects:
        self.index += 1
        token = self.index if sequence is None else sequence
        effects = self.ledger.apply_proposal(self.index, Proposal(proposer, token, commands))
        self.events = effects.events
        self.ledger.check_invariants()
        return effects

    def do(self, command: Command) -> Answer:
        (answer,) = self.apply(command).answers
        return answer

    def said(self, command: Command) -> list[tuple[int, Outcome, int, int]]:
        """The spans of an answer about ids, as (count, outcome, fence, detail)."""
        answer = self.do(command)
        assert isinstance(answer, Answered), answer
        return rows(answer.spans)

    def outcomes(self, command: Command) -> list[tuple[int, Outcome]]:
        return [(count, outcome) for count, outcome, _, _ in self.said(command)]

    def join(self, node: str = "n1", incarnation: int = 1, timeout_ms: int = 4000) -> int:
        answer = self.do(Join(node, incarnation, timeout_ms))
        assert isinstance(answer, Joined), answer
        return answer.session

    def allocate(self, count: int = 1000) -> None:
        self.do(AllocateIds(count))

    def claim(self, session: int, ids: Ids) -> int:
        """Claim what must be granted whole; the fence."""
        ((count, outcome, fence, _),) = self.said(Claim(session, ids))
        assert (count, outcome) == (len(ids), Outcome.GRANTED)
        return fence

    def settle(
        self, session: int, fence: int, ids: Ids, result: Result, delay_ms: int = 0
    ) -> list[tuple[int, Outcome]]:
        return self.outcomes(Settle(session, (Settlement(fence, ids, result, delay_ms),)))

    def pass_ms(self, elapsed_ms: int, timekeeper: str = "t") -> None:
        while elapsed_ms > 0:
            self.do(Advance(timekeeper, min(elapsed_ms, 1000)))
            elapsed_ms -= 1000


def rows(spans: tuple[Span, ...]) -> list[tuple[int, Outcome, int, int]]:
    return [(span.count, span.outcome, span.fence, span.detail) for span in spans]


def run_of(start: int, count: int = 1) -> Ids:
    return Ids(((start, count),))


KEY = b"k" * 16
