"""How much a node takes: pools, what runs in them, and what waits for them (pure).

A node claims only what it is about to start, so that little is in doubt when it dies. "About to" is a span of
time, not a number of tasks: twice what was finished of a handler in the last ``horizon_ms`` (an exponentially
weighted rate), and never less than a task for each free slot and a small prefetch. So a handler of one second is
claimed slot by slot, and a handler of five microseconds by the thousand. The factor of two lets the claim grow
as long as the workers keep up, doubling with each round trip as TCP's slow start does (Jacobson, 1988), and what
bounds the workers (their number, a lock, a disk) bounds the claim, without our having to know which it is.

Handlers whose doubt means ``rerun`` get a longer horizon: their suspects cost a rerun and no check.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from node.pieces import Piece
from oncekeeper.log.delayed import ENQUEUE

RATE_MS = 50.0  # over which the rate is weighted
GROWTH = 2.0
RUN_US_UNKNOWN = 10_000.0  # a first guess, replaced by the first report
WEIGHT = 0.3  # of a new measurement in the mean run time


class HandlerFlow:
    """What is known of one handler's pace."""

    __slots__ = ("_rate", "_rate_ms", "outstanding", "run_us")

    def __init__(self) -> None:
        self.run_us = RUN_US_UNKNOWN
        self.outstanding = 0  # claimed, or being claimed, and not ended
        self._rate = 0.0  # tasks a millisecond, at _rate_ms
        self._rate_ms = 0

    def measured(self, count: int, busy_us: int) -> None:
        """Handlers ran for ``busy_us`` in all to do ``count`` tasks."""
        mean = max(1.0, busy_us / count)
        if self.run_us == RUN_US_UNKNOWN:
            self.run_us = mean
        else:
            self.run_us += WEIGHT * (mean - self.run_us)

    def finished(self, count: int, now_ms: int) -> None:
        self._rate = self.rate(now_ms) + count / RATE_MS
        self._rate_ms = now_ms

    def rate(self, now_ms: int) -> float:
        """Tasks a millisecond that were finished of late."""
        return self._rate * math.exp((self._rate_ms - now_ms) / RATE_MS) if self._rate else 0.0


class _Queue:
    """What waits of one queue: what was delayed and is due comes before what takes its turn."""

    __slots__ = ("due", "usual")

    def __init__(self) -> None:
        self.due: deque[Piece] = deque()
        self.usual: deque[Piece] = deque()

    def __bool__(self) -> bool:
        return bool(self.due or self.usual)

    @property
    def first(self) -> deque[Piece]:
        return self.due or self.usual


class Lane:
    """One pool of workers, the handlers that run in it, and the pieces that wait for it, a deque a queue.

    Queues take turns, so that a deep one does not starve another.
    """

    def __init__(self, slots: int, horizon_ms: int, rerun_horizon_ms: int, claim_max: int) -> None:
        self.slots = slots
        self.ready_tasks = 0
        self._horizon_ms = {False: horizon_ms, True: rerun_horizon_ms}
        self._claim_max = claim_max
        self._handlers: dict[str, HandlerFlow] = {}
        self._ready: dict[str, _Queue] = {}
        self._turns: deque[str] = deque()

    def handler(self, name: str) -> HandlerFlow:
        flow = self._handlers.get(name)
        if flow is None:
            flow = self._handlers[name] = HandlerFlow()
        return flow

    @property
    def outstanding(self) -> int:
        return sum(flow.outstanding for flow in self._handlers.values())

    def room(self, name: str, rerun: bool, now_ms: int) -> int:
        """How many tasks of a handler may be claimed now."""
        outstanding = self.outstanding
        flow = self.handler(name)
        target = int(GROWTH * flow.rate(now_ms) * self._horizon_ms[rerun])
        by_time = target - flow.outstanding
        if by_time < target // 4:
            by_time = 0  # a claim costs three disks the same, however small it is: let more room gather
        by_slots = self.slots + max(1, self.slots // 4) - outstanding
        return min(self._claim_max - outstanding, max(by_time, by_slots))

    def chunk(self, name: str, work_ms: int, tasks_max: int) -> int:
        """How many tasks one Work holds: about ``work_ms`` of running."""
        return max(1, min(tasks_max, int(work_ms * 1000.0 / self.handler(name).run_us)))

    def push(self, piece: Piece) -> None:
        queue = piece.batch.queue
        waiting = self._ready.get(queue)
        if waiting is None:
            waiting = self._ready[queue] = _Queue()
            self._turns.append(queue)
        is_first = piece.row is not None or (piece.is_delayed and piece.batch.then != ENQUEUE)
        (waiting.due if is_first else waiting.usual).append(piece)
        self.ready_tasks += piece.count

    def next_piece(self, paused: frozenset[str]) -> Piece | None:
        """The next piece in turn whose queue is not paused; it stays until it is taken."""
        for _ in range(len(self._turns)):
            queue = self._turns[0]
            waiting = self._ready[queue]
            if not waiting:
                del self._ready[queue]
                self._turns.popleft()
                continue
            if queue not in paused:
                return waiting.first[0]
            self._turns.rotate(-1)
        return None

    def take(self, count: int) -> Piece:
        """Take ``count`` tasks of the piece that ``next_piece`` showed; the next queue has its turn."""
        queue = self._turns[0]
        waiting = self._ready[queue].first
        piece = waiting.popleft()
        if count < piece.count:
            waiting.appendleft(piece.part(count, piece.count - count))
            piece = piece.part(0, count)
        self._turns.rotate(-1)
        self.ready_tasks -= piece.count
        return piece

    def drop(self, partitions: frozenset[int]) -> list[Piece]:
        """Forget what waits of the named partitions; returns it."""
        return self._take_out(lambda piece: piece.partition in partitions)

    def drop_due(self, partitions: frozenset[int]) -> list[Piece]:
        """Forget what waits of their delayed tasks; returns it."""
        return self._take_out(lambda piece: piece.is_delayed and piece.partition in partitions)

    def _take_out(self, is_meant: Callable[[Piece], bool]) -> list[Piece]:
        dropped: list[Piece] = []
        for waiting in self._ready.values():
            for pieces in (waiting.due, waiting.usual):
                taken = [piece for piece in pieces if is_meant(piece)]
                if taken:
                    kept = [piece for piece in pieces if not is_meant(piece)]
                    pieces.clear()
                    pieces.extend(kept)
                    dropped.extend(taken)
        self.ready_tasks -= sum(piece.count for piece in dropped)
        return dropped

    def waiting(self) -> list[Piece]:
        return [piece for waiting in self._ready.values() for piece in (*waiting.due, *waiting.usual)]
