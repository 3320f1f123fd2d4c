"""What becomes of suspects in this node's partitions: who is asked, and in which order (pure).

The claim's holder was lost before it settled, so the task may have run. Evidence decides, best first:

1. *Testimony*: the holder's node, restarted, reads its work journal and tells the ledger "never started" or
   "finished" (which close the suspect there, without us), or "started". We wait ``testimony_wait_ms`` for its
   word, or less where it has spoken. The holder itself is surely stopped: it fenced itself before its session
   could lapse, or its next incarnation holds the locks of its workers' journals.
2. *The handler's policy*: ``rerun`` and ``skip`` rule at once; ``check`` runs the user's check in a worker.
   What could not be decoded has no handler and never ran: it is ruled so at once.
3. *A human*: what ``hold`` says, and what a check could not tell after ``check_tries``. The task is put aside
   (durably) and ruled "held"; then its partition moves on.

Each ruling names the fence of the claim that was lost, so that it can never hit a later one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from dedup.suspects import Suspect
from node import messages as m
from node.pieces import Piece, gather_ids, is_keyed
from node.settling import make_work
from node.views import CoordinatorSettings, LedgerReads
from node.workers.port import Ended, HandlerInfo, Mode, Report
from raft.commands import Rule, Verdict


class _Step(Enum):
    WAITING = 1  # for testimony, or for the next check
    CHECKING = 2
    PARKING = 3  # being put aside


@dataclass(slots=True)
class _Doubt:
    piece: Piece
    fence: int
    attempt: int
    since_ms: int
    look_ms: int
    step: _Step = _Step.WAITING
    tries: int = 0
    reason: str = ""


@dataclass(slots=True)
class _Ruling:
    piece: Piece
    fence: int
    verdict: Verdict
    by: str
    reason: str


LOOK_MS = 50


class Doubts:
    def __init__(self, ledger: LedgerReads, settings: CoordinatorSettings, numbers: Iterator[int]) -> None:
        self._ledger = ledger
        self._settings = settings
        self._numbers = numbers
        self.handlers: Mapping[str, HandlerInfo] = {}
        self._doubts: list[_Doubt] = []
        self._checking: dict[int, tuple[_Doubt, int]] = {}
        self._rulings: list[_Ruling] = []
        self._returned: list[Piece] = []
        self._to_park: list[tuple[Piece, str]] = []
        self._held: list[Piece] = []

    def add(self, piece: Piece, fence: int, now_ms: int) -> None:
        self._doubts.append(_Doubt(piece, fence, 1, now_ms, now_ms))

    def drop(self, partitions: frozenset[int]) -> None:
        """These partitions are another node's now, and so are their suspects."""
        self._doubts = [doubt for doubt in self._doubts if doubt.piece.partition not in partitions]

    def pieces(self) -> list[Piece]:
        return [doubt.piece for doubt in self._doubts] + [ruling.piece for ruling in self._rulings]

    def next_look_ms(self) -> int | None:
        return min((d.look_ms for d in self._doubts if d.step is _Step.WAITING), default=None)

    # --- looking at the evidence ------------------------------------------------------------------------------

    def look(self, now_ms: int, session: int) -> list[m.Effect]:
        """Go through what waits; returns checks to dispatch. Without a session nothing is decided."""
        if not self._doubts or not session:
            return []
        effects: list[m.Effect] = []
        kept: list[_Doubt] = []
        for doubt in self._doubts:
            if doubt.step is not _Step.WAITING or doubt.look_ms > now_ms:
                kept.append(doubt)
                continue
            kept.extend(self._look_at(doubt, now_ms, effects))
        self._doubts = kept
        return effects

    def _look_at(self, doubt: _Doubt, now_ms: int, effects: list[m.Effect]) -> list[_Doubt]:
        """The doubts that remain of one: its tasks may stand differently by now."""
        remaining: list[_Doubt] = []
        at = 0
        for count, suspect in self._ledger.suspicions(doubt.piece.ids):
            part = doubt.piece.part(at, count)
            at += count
            if suspect is None or suspect.fence != doubt.fence:
                self._returned.append(part)
            elif suspect.held_by:
                self._held.append(part)
            else:
                piece_doubt = doubt if part is doubt.piece else self._split(doubt, part)
                piece_doubt.attempt = suspect.attempt
                if self._decide(piece_doubt, suspect, now_ms, effects):
                    remaining.append(piece_doubt)
        return remaining

    def _split(self, doubt: _Doubt, piece: Piece) -> _Doubt:
        return _Doubt(piece, doubt.fence, doubt.attempt, doubt.since_ms, doubt.look_ms, tries=doubt.tries)

    def _decide(self, doubt: _Doubt, suspect: Suspect, now_ms: int, effects: list[m.Effect]) -> bool:
        """Whether it stays a doubt here."""
        if not suspect.testified and now_ms - doubt.since_ms < self._settings.testimony_wait_ms:
            doubt.look_ms = now_ms + LOOK_MS
            return True
        handler = doubt.piece.batch.handler
        if not handler:
            # Held for a human it would lie aside, and what frees it later could not append it again: it is no task.
            self._rule(doubt, Verdict.NOT_EXECUTED, "policy:undecodable", "what cannot be decoded never ran")
            return False
        info = self.handlers.get(handler)
        match info.on_doubt if info is not None else "unknown":
            case "rerun":
                self._rule(doubt, Verdict.NOT_EXECUTED, "policy:rerun", "the handler may run more than once")
                return False
            case "skip":
                self._rule(doubt, Verdict.EXECUTED, "policy:skip", "the handler must not run twice")
                return False
            case "check" if info is not None:
                self._check(doubt, info, effects)
            case "hold":
                self._park(doubt, "the handler asks for a human where a task may have run")
            case _:
                self._park(doubt, f"handler={handler!r} is not registered any more")
        return True

    def _check(self, doubt: _Doubt, info: HandlerInfo, effects: list[m.Effect]) -> None:
        doubt.step = _Step.CHECKING
        number = next(self._numbers)
        self._checking[number] = (doubt, doubt.piece.count)
        work = make_work(number, Mode.CHECK, doubt.piece, doubt.fence, doubt.attempt, info)
        effects.append(m.Dispatch(work))

    def _rule(self, doubt: _Doubt, verdict: Verdict, by: str, reason: str) -> None:
        self._rulings.append(_Ruling(doubt.piece, doubt.fence, verdict, by, reason))

    def _park(self, doubt: _Doubt, reason: str) -> None:
        doubt.step = _Step.PARKING
        doubt.reason = reason
        self._to_park.append((doubt.piece, reason))

    # --- answers ----------------------------------------------------------------------------------------------

    def reported(self, report: Report, now_ms: int) -> bool:
        """Take a check's report; False: it is not about a check."""
        found = self._checking.get(report.number)
        if found is None:
            return False
        doubt, left = found
        at_end = left - sum(part.count for part in report.parts)
        if at_end > 0:
            self._checking[report.number] = (doubt, at_end)
        else:
            del self._checking[report.number]
            self._doubts = [other for other in self._doubts if other is not doubt]
        for part in report.parts:
            piece_doubt = self._split(doubt, doubt.piece.part(part.at, part.count))
            self._checked(piece_doubt, part.ended, part.error, now_ms)
        return True

    def _checked(self, doubt: _Doubt, ended: Ended, error: str, now_ms: int) -> None:
        match ended:
            case Ended.TRUE:
                self._rule(doubt, Verdict.EXECUTED, "check", "the handler's check found its effect")
            case Ended.FALSE:
                self._rule(doubt, Verdict.NOT_EXECUTED, "check", "the handler's check found no effect")
            case Ended.NOT_STARTED:
                doubt.look_ms = now_ms + LOOK_MS
                self._doubts.append(doubt)
            case _:
                doubt.tries += 1
                self._doubts.append(doubt)
                if doubt.tries >= self._settings.check_tries:
                    self._park(doubt, f"the check could not tell: {error or 'it answered None'}")
                else:
                    doubt.look_ms = now_ms + self._settings.check_retry_ms * doubt.tries

    def parked(self, piece: Piece) -> bool:
        """A piece was put aside; False: it was not ours."""
        for doubt in self._doubts:
            if doubt.piece is piece and doubt.step is _Step.PARKING:
                self._rulings.append(_Ruling(piece, doubt.fence, Verdict.HELD, "policy:hold", doubt.reason))
                self._doubts = [other for other in self._doubts if other is not doubt]
                return True
        return False

    # --- what the coordinator takes ---------------------------------------------------------------------------

    def returned(self) -> list[Piece]:
        """Pieces that are no suspects any more."""
        taken, self._returned = self._returned, []
        return taken

    def to_park(self) -> list[tuple[Piece, str]]:
        taken, self._to_park = self._to_park, []
        return taken

    def held(self) -> list[Piece]:
        """Held for a human, and put aside before that: their partition may move on."""
        taken, self._held = self._held, []
        return taken

    def rulings(self) -> Iterator[tuple[Rule, list[Piece]]]:
        """Rulings to propose, one command for those that are alike."""
        rulings, self._rulings = self._rulings, []
        groups: dict[tuple[int, Verdict, str, str, bool], list[Piece]] = {}
        for ruling in rulings:
            alike = (ruling.fence, ruling.verdict, ruling.by, ruling.reason, is_keyed(ruling.piece))
            groups.setdefault(alike, []).append(ruling.piece)
        for (fence, verdict, by, reason, _), pieces in groups.items():
            yield Rule(gather_ids(pieces), verdict, by, reason, fence), pieces
