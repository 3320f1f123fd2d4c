"""What this replica has proposed, and what became of each.

The outcomes are ``Applied``, ``Refused`` (not in the log, now or ever) and ``Unknown`` (sent, and nothing
more can be said in time).

How a lost proposal becomes certain. It is sent under a *key*: the term, and the generation of links. The log's
order follows keys: a leader takes proposals of its own term only, a link delivers in order, and a new link
drops what the old one had not delivered. So when an entry of a later term, or one of our own with a later key,
is applied before a proposal was, that proposal never can be: it goes into the queue again, within its time,
without risk of a second effect. What a leader's snapshot skipped over is ``Unknown``.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from raft.wire import INDEX_MAX, NO_OP, command, token_numbers

DEADLINE_STEP_S: Final = 0.02
TAKE_BYTES_MAX: Final = 16 * 1024 * 1024
PROBE_MS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Applied:
    index: int
    result: Any
    """What ``machine.apply`` returned on this replica."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Not in the log, and never will be."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """It may or may not have been applied, or may yet be."""

    reason: str


Outcome = Applied | Refused | Unknown

Key = tuple[int, int]


class Pending:
    __slots__ = ("command", "future", "key", "sequence")

    def __init__(self, sequence: int, command_bytes: bytes, future: asyncio.Future[Outcome]) -> None:
        self.sequence = sequence
        self.command = command_bytes
        self.future = future
        self.key: Key | None = None  # None: not sent


class Proposals:
    """Single-threaded, on one loop. ``wake`` is called when there is something to take."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wake: Callable[[], None],
        applied_term: int,
        pending_max: int,
        pending_bytes_max: int,
        origin: int | None = None,
    ) -> None:
        """``origin``: a random number, another one at each start; simulations give theirs."""
        self._loop = loop
        self._wake = wake
        self._pending_max = pending_max
        self._pending_bytes_max = pending_bytes_max
        # A new origin at each start: an entry of an earlier life must not answer a proposal of this one.
        self.origin = secrets.randbelow(INDEX_MAX) + 1 if origin is None else origin
        self._sequence = 0
        self._queue: deque[Pending] = deque()
        self._pending: dict[int, Pending] = {}
        self._pending_bytes = 0
        self._in_flight: dict[Key, int] = {}
        self._generation = 0
        self._applied_term = applied_term
        self._barrier: Pending | None = None
        self._deadlines: dict[int, list[Pending]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._pending)

    # --- in -----------------------------------------------------------------------------------------------------

    def propose(self, kind: int, payload: bytes, timeout_ms: int) -> asyncio.Future[Outcome]:
        future: asyncio.Future[Outcome] = self._loop.create_future()
        if self._closed:
            future.set_result(Refused("the replica is not running"))
        elif len(self._pending) >= self._pending_max or self._pending_bytes > self._pending_bytes_max:
            future.set_result(Refused(f"{len(self._pending)} proposals are pending: slow down"))
        else:
            self._add(kind, payload, future, timeout_ms)
        return future

    def _add(self, kind: int, payload: bytes, future: asyncio.Future[Outcome], timeout_ms: int) -> Pending:
        self._sequence += 1
        sequence = self._sequence
        pending = Pending(sequence, command(kind, self.origin, sequence, payload), future)
        self._pending[sequence] = pending
        self._pending_bytes += len(pending.command)
        self._queue.append(pending)
        self._expect_by(pending, self._loop.time() + timeout_ms / 1000)
        self._wake()
        return pending

    def barrier(self) -> asyncio.Future[Outcome]:
        """A no-op whose place in the log comes after this call; all callers share one until it is sent."""
        shared = self._barrier
        if shared is None or shared.key is not None or shared.future.done():
            future: asyncio.Future[Outcome] = self._loop.create_future()
            if self._closed:
                future.set_result(Refused("the replica is not running"))
                return future
            shared = self._barrier = self._add(NO_OP, b"", future, PROBE_MS)
        return shared.future

    # --- to the engine ------------------------------------------------------------------------------------------

    def take(self, term: int, bytes_max: int) -> list[bytes]:
        """The oldest unsent ones, which from now on count as sent."""
        queue = self._queue
        if not queue:
            return []
        key = (term, self._generation)
        commands: list[bytes] = []
        room = min(bytes_max, TAKE_BYTES_MAX)
        while queue and room > 0:
            pending = queue.popleft()
            if pending.sequence not in self._pending:
                continue  # its time ran out while it waited
            pending.key = key
            commands.append(pending.command)
            room -= len(pending.command)
        if commands:
            self._in_flight[key] = self._in_flight.get(key, 0) + len(commands)
        if queue:
            self._wake()
        return commands

    # --- what became of them ------------------------------------------------------------------------------------

    def applied(self, index: int, term: int, command_bytes: bytes, result: object) -> None:
        if term > self._applied_term:
            self._applied_term = term
            self._lost_before((term, 0))
        origin, sequence = token_numbers(command_bytes)
        if origin != self.origin:
            return
        pending = self._pending.get(sequence)
        if pending is None:
            return
        key = pending.key
        self._resolve(pending, Applied(index, result))
        if key is not None and self._in_flight and min(self._in_flight) < key:
            self._lost_before(key)

    def refused(self, tokens: list[bytes]) -> None:
        """By a replica that does not lead their term: they may go to the one that does."""
        lost = []
        for token in tokens:
            origin, sequence = token_numbers(b"\0" + token)
            pending = self._pending.get(sequence) if origin == self.origin else None
            if pending is not None and pending.key is not None:
                lost.append(pending)
        self._send_again(lost)

    def restored(self, index: int, term: int) -> None:
        self._applied_term = max(self._applied_term, term)
        for pending in [p for p in self._pending.values() if p.key is not None]:
            self._resolve(pending, Unknown(f"a snapshot up to index {index} may hold it"))

    def new_link(self) -> None:
        """A link was made anew. An own entry of the new generation will show which older ones were lost."""
        self._generation += 1
        if self._in_flight and not self._closed:
            self._add(NO_OP, b"", self._loop.create_future(), PROBE_MS)

    def close(self, reason: str) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for pending in list(self._pending.values()):
            self._resolve(pending, Refused(reason) if pending.key is None else Unknown(reason))
        self._queue.clear()

    def _lost_before(self, key: Key) -> None:
        self._send_again([p for p in self._pending.values() if p.key is not None and p.key < key])

    def _send_again(self, lost: list[Pending]) -> None:
        """First in the queue, in their old order."""
        if not lost:
            return
        for pending in lost:
            self._unsend(pending)
        self._queue.extendleft(sorted(lost, key=lambda pending: pending.sequence, reverse=True))
        self._wake()

    def _unsend(self, pending: Pending) -> None:
        key, pending.key = pending.key, None
        if key is None:
            return
        left = self._in_flight[key] - 1
        if left:
            self._in_flight[key] = left
        else:
            del self._in_flight[key]

    def _resolve(self, pending: Pending, outcome: Outcome) -> None:
        del self._pending[pending.sequence]
        self._pending_bytes -= len(pending.command)
        self._unsend(pending)
        pending.command = b""  # its deadline holds on to it for a while
        if not pending.future.done():
            pending.future.set_result(outcome)

    # --- deadlines: in steps of 20 ms, so that there is one timer for all and none a proposal -------------------

    def _expect_by(self, pending: Pending, at: float) -> None:
        step = int(at / DEADLINE_STEP_S) + 1
        waiting = self._deadlines.get(step)
        if waiting is not None:
            waiting.append(pending)
            return
        self._deadlines[step] = [pending]
        if self._timer is None or self._timer.when() > step * DEADLINE_STEP_S:
            self._arm(step)

    def _arm(self, step: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(step * DEADLINE_STEP_S, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        for step in sorted(step for step in self._deadlines if step * DEADLINE_STEP_S <= now + 0.001):
            for pending in self._deadlines.pop(step):
                if pending.sequence not in self._pending:
                    continue
                if pending.key is None:
                    self._resolve(pending, Refused("no leader was reached in time"))
                else:
                    self._resolve(pending, Unknown("no answer in time"))
        if self._deadlines:
            self._arm(min(self._deadlines))
