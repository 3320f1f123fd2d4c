"""The memory that makes proposals idempotent: (proposer, sequence) -> first answers.

Who got no answer proposes the same again, and must get the first answers and no second effect. The memory is
bounded: of each proposer the last sequences, of all together so many spans and so many proposers. A sequence that
has left its window is refused, never applied, as it may have been applied before. So a proposer keeps fewer
proposals in flight than its window, and starts under a new random number. A proposer that was forgotten whole
(idle for an hour of ledger time, or the least recently used of too many) would be taken for a new one: nobody
may propose again what is an hour old.
"""

from __future__ import annotations

import msgspec

from raft.commands import Answer, Answered, Rejected

UINT64_MAX = 2**64 - 1


class ProposerRow(msgspec.Struct, frozen=True, array_like=True):
    """A proposer in a snapshot; rows are ordered by last use."""

    proposer: int
    highest: int
    floor: int
    used_ms: int
    window: tuple[tuple[int, tuple[Answer, ...]], ...]


class _Proposer:
    __slots__ = ("floor", "highest", "spans", "used_ms", "window")

    def __init__(self, highest: int, floor: int) -> None:
        self.highest = highest
        self.floor = floor  # this sequence and those below it are refused
        self.used_ms = 0
        self.spans = 0
        self.window: dict[int, tuple[Answer, ...]] = {}  # by sequence, ascending


class Tokens:
    def __init__(self, per_proposer: int, spans_max: int, proposers_max: int, idle_ms: int) -> None:
        self._per_proposer = per_proposer
        self._spans_max = spans_max
        self._proposers_max = proposers_max
        self._idle_ms = idle_ms
        self._spans = 0
        self._proposers: dict[int, _Proposer] = {}  # the least recently used first

    def __len__(self) -> int:
        return len(self._proposers)

    def recall(self, proposer: int, sequence: int, commands: int) -> tuple[Answer, ...] | None:
        """The first answers to this token, refusals if they are forgotten, or None if it is new."""
        known = self._proposers.get(proposer)
        if known is None:
            return None
        answers = known.window.get(sequence)
        if answers is None and sequence <= known.floor:
            refusal = Rejected(
                f"sequence={sequence} must be above {known.floor}: older answers are forgotten"
            )
            return (refusal,) * commands
        if answers is not None and len(answers) != commands:
            refusal = Rejected(f"sequence={sequence} was used for a proposal of {len(answers)} commands")
            return (refusal,) * commands
        return answers

    def keep(self, proposer: int, sequence: int, answers: tuple[Answer, ...], now_ms: int) -> None:
        """Remember the answers to a token that ``recall`` did not know."""
        known = self._proposers.pop(proposer, None)
        if known is None:
            known = _Proposer(0, 0)
        self._proposers[proposer] = known
        known.used_ms = now_ms
        self._insert(known, sequence, answers)
        if sequence - self._per_proposer > known.floor:
            known.floor = sequence - self._per_proposer
            while (oldest := next(iter(known.window))) <= known.floor:
                self._drop_oldest(known, oldest)
        self._make_room()

    def retire(self, now_ms: int) -> None:
        """Forget the proposers that were idle for too long."""
        while self._proposers:
            proposer = next(iter(self._proposers))
            if self._proposers[proposer].used_ms + self._idle_ms > now_ms:
                return
            self._forget(proposer)

    def rows(self) -> tuple[ProposerRow, ...]:
        return tuple(
            ProposerRow(proposer, known.highest, known.floor, known.used_ms, tuple(known.window.items()))
            for proposer, known in self._proposers.items()
        )

    def load(self, rows: tuple[ProposerRow, ...]) -> None:
        self._proposers.clear()
        self._spans = 0
        for row in rows:
            known = self._proposers[row.proposer] = _Proposer(0, row.floor)
            known.used_ms = row.used_ms
            for sequence, answers in row.window:
                self._insert(known, sequence, answers)
            known.highest = row.highest

    def _insert(self, known: _Proposer, sequence: int, answers: tuple[Answer, ...]) -> None:
        weight = _weight(answers)
        known.spans += weight
        self._spans += weight
        known.window[sequence] = answers
        if sequence >= known.highest:
            known.highest = sequence
        else:
            # Out of order, after a proposal was lost and sent again: rare, so sorting is cheap enough.
            known.window = dict(sorted(known.window.items()))

    def _make_room(self) -> None:
        """Full: the least recently used proposers go; the last one left loses its oldest answers."""
        while len(self._proposers) > 1 and (
            len(self._proposers) > self._proposers_max or self._spans > self._spans_max
        ):
            self._forget(next(iter(self._proposers)))
        if self._spans > self._spans_max:
            (known,) = self._proposers.values()
            while self._spans > self._spans_max and len(known.window) > 1:
                self._drop_oldest(known, next(iter(known.window)))

    def _drop_oldest(self, known: _Proposer, oldest: int) -> None:
        weight = _weight(known.window.pop(oldest))
        known.spans -= weight
        self._spans -= weight
        known.floor = max(known.floor, oldest)

    def _forget(self, proposer: int) -> None:
        self._spans -= self._proposers.pop(proposer).spans


def _weight(answers: tuple[Answer, ...]) -> int:
    weight = 1
    for answer in answers:
        weight += len(answer.spans) if type(answer) is Answered else 1
    return weight
