"""What is with this node's workers: handed over under a fence, and reported on part by part (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from node import messages as m
from node.flow import Lane
from node.pieces import Piece
from node.settling import Closing, make_work
from node.views import CoordinatorSettings
from node.workers.port import Ended, HandlerInfo, Mode, Report
from raft.commands import Span


@dataclass(slots=True)
class _Running:
    piece: Piece
    fence: int
    session: int
    attempt: int
    claimed_ms: int
    remaining: int


class Working:
    def __init__(self, settings: CoordinatorSettings, numbers: Iterator[int]) -> None:
        self._settings = settings
        self._numbers = numbers
        self._running: dict[int, _Running] = {}

    def __bool__(self) -> bool:
        return bool(self._running)

    def hand_over(
        self, piece: Piece, span: Span, session: int, info: HandlerInfo, lane: Lane, wall_ms: int
    ) -> Iterator[m.Dispatch]:
        """A piece that was granted, in chunks."""
        s = self._settings
        chunk = lane.chunk(info.name, s.work_ms, s.work_tasks_max)
        for at in range(0, piece.count, chunk):
            part = piece.part(at, min(chunk, piece.count - at))
            number = next(self._numbers)
            self._running[number] = _Running(part, span.fence, session, span.detail, wall_ms, part.count)
            yield m.Dispatch(make_work(number, Mode.RUN, part, span.fence, span.detail, info))

    def piece(self, report: Report) -> Piece:
        """What was handed over as the Work that this is a report on."""
        return self._running[report.number].piece

    def reported(self, report: Report) -> list[tuple[Closing, Ended]]:
        """Each part's claim on its way out, and how it ended."""
        running = self._running[report.number]
        running.remaining -= sum(part.count for part in report.parts)
        if running.remaining == 0:
            del self._running[report.number]
        return [
            (
                Closing(
                    running.piece.part(part.at, part.count),
                    running.fence,
                    running.session,
                    running.attempt,
                    running.claimed_ms,
                    started_ms=report.started_ms,
                    ended_ms=report.ended_ms,
                    results=part.results,
                    error=part.error,
                    trace=part.trace,
                    number=report.number,
                    number_at=part.at,
                ),
                part.ended,
            )
            for part in report.parts
        ]
