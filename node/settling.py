"""Closing claims: from what a worker reported to what the ledger is told (pure)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dedup.ids import Ids
from node.pieces import Piece, gather_ids, is_keyed
from node.records_model import Attempt, Ending
from node.workers.port import Ended, HandlerInfo, Mode, Work
from raft.commands import Result, Settlement


@dataclass(slots=True)
class Closing:
    """A claimed piece on its way out: the claim, how it ended, and what the work history will say."""

    piece: Piece
    fence: int
    session: int
    attempt: int
    claimed_ms: int
    started_ms: int = 0
    ended_ms: int = 0
    results: tuple[bytes, ...] | None = None
    error: str = ""
    trace: str = ""
    number: int = 0  # the Work it was handed over in; 0: none, or released already
    number_at: int = 0
    result: Result = Result.DONE
    delay_ms: int = 0

    def ended(self, result: Result, delay_ms: int = 0) -> Closing:
        self.result = result
        self.delay_ms = delay_ms
        return self

    def part(self, at: int, count: int) -> Closing:
        if count == self.piece.count:
            return self
        results = self.results[at : at + count] if self.results is not None else None
        return replace(self, piece=self.piece.part(at, count), results=results, number_at=self.number_at + at)

    def for_history(self, node: str, late: bool) -> Attempt:
        """``late``: the ledger did not take it as a settle."""
        batch = self.piece.batch
        return Attempt(
            ids=self.piece.ids,
            queue=batch.queue,
            handler=batch.handler,
            node=node,
            fence=self.fence,
            attempt=self.attempt,
            claimed_ms=self.claimed_ms,
            started_ms=self.started_ms,
            ended_ms=self.ended_ms,
            ending=Ending.LAPSED if late else _ENDINGS[self.result],
            results=self.results,
            error=self.error,
            trace=self.trace,
            traceparent=batch.traceparent,
        )


_ENDINGS = {
    Result.DONE: Ending.DONE,
    Result.RETRY: Ending.RETRY,
    Result.DEAD: Ending.DEAD,
    Result.DOUBT: Ending.DOUBT,
    Result.RELEASED: Ending.RELEASED,
}


class Closings:
    """Closings that wait for the next proposal."""

    def __init__(self) -> None:
        self._waiting: list[Closing] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def append(self, closing: Closing) -> None:
        self._waiting.append(closing)

    def extend(self, closings: Iterable[Closing]) -> None:
        self._waiting.extend(closings)

    def gather(self) -> Iterator[tuple[int, tuple[Settlement, ...], list[Closing]]]:
        """All that waits, a Settle a session: (session, settlements, closings in the settlements' order)."""
        waiting, self._waiting = self._waiting, []
        # Those of one fence and one result share a settlement. Range ids and keyed ids do not: ``Ids`` would
        # change their order, and the answer runs in that order.
        groups: dict[int, dict[tuple[int, Result, int, bool], list[Closing]]] = {}
        for closing in waiting:
            alike = (closing.fence, closing.result, closing.delay_ms, is_keyed(closing.piece))
            groups.setdefault(closing.session, {}).setdefault(alike, []).append(closing)
        for session, by_kind in groups.items():
            settlements = tuple(
                Settlement(fence, gather_ids(closing.piece for closing in closings), result, delay_ms)
                for (fence, result, delay_ms, _), closings in by_kind.items()
            )
            yield session, settlements, [closing for closings in by_kind.values() for closing in closings]


def closings_of(closing: Closing, ended: Ended, info: HandlerInfo) -> Iterator[Closing]:
    """What the ledger is to be told of a claim that was started and ended so. What is DEAD is put aside first."""
    match ended:
        case Ended.DONE:
            yield closing.ended(Result.DONE)
        case Ended.INVALID:
            yield closing.ended(Result.DEAD)
        case Ended.RAISED:
            yield from _failed(closing, info)
        case Ended.CRASHED | Ended.TIMED_OUT if info.on_doubt == "rerun":
            yield from _failed(closing, info)
        case _:
            yield closing.ended(Result.DOUBT)


def _failed(closing: Closing, info: HandlerInfo) -> Iterator[Closing]:
    if closing.attempt > info.retries:
        yield closing.ended(Result.DEAD)
        return
    for at in range(closing.piece.count):
        single = closing.part(at, 1)
        yield single.ended(Result.RETRY, retry_delay_ms(single.piece.ids, closing.attempt, info))


def retry_delay_ms(ids: Ids, attempt: int, info: HandlerInfo) -> int:
    """Exponential backoff with full jitter over its upper half, drawn from the id: replayable, and still spread.

    Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    longest = min(info.retry_delay_ms_max, info.retry_delay_ms << min(attempt - 1, 30))
    text = f"{ids.runs}{ids.keys}{attempt}".encode()
    draw = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") / 2**32
    return int(longest * (0.5 + draw / 2))


def make_work(number: int, mode: Mode, piece: Piece, fence: int, attempt: int, info: HandlerInfo) -> Work:
    """What a worker is handed for a piece."""
    return Work(
        number=number,
        mode=mode,
        handler=info.name,
        ids=piece.ids,
        fence=fence,
        attempt=attempt,
        ttr_ms=piece.batch.ttr_ms or info.ttr_ms,
        bodies=piece.bodies,
        traceparent=piece.batch.traceparent,
        due_ms=piece.batch.due_ms,
    )
