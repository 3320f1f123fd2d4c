"""Where a client's ids come from: ranges of the cluster, asked for ahead of need.

Requests start small and grow, so that a program that submits one task does not leave a hole of 65,535 ids behind,
and one that submits a million does not ask a thousand times. When no node answers, ids are random keyed ones:
submitting goes on, at the price of bulkier bookkeeping.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from dedup.ids import KEY_BYTES, Ids
from oncekeeper.errors import OncekeeperError

RANGE_IDS_MIN = 64
RANGE_IDS_MAX = 65_536
_GROWTH = 8
_PAUSE_S = 1.0  # after a failure: a submit must not wait for dead nodes each time


class IdSource:
    """Safe for threads. ``fetch(count)`` answers (start, count); what it raises means that no node answers."""

    def __init__(
        self,
        fetch: Callable[[int], tuple[int, int]],
        monotonic: Callable[[], float] = time.monotonic,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._fetch = fetch
        self._monotonic = monotonic
        self._random_bytes = random_bytes
        self._lock = threading.Lock()
        self._runs: list[tuple[int, int]] = []
        self._left = 0
        self._size = RANGE_IDS_MIN // _GROWTH
        self._pause_until = float("-inf")
        self._ahead: threading.Thread | None = None
        self._arrived: list[tuple[int, int]] = []

    def take(self, count: int) -> Ids:
        """``count`` fresh ids: runs, or keys only."""
        with self._lock:
            while self._left < count:
                if self._ahead is not None:
                    self._ahead.join()
                    self._ahead = None
                elif self._monotonic() < self._pause_until:
                    return self._random(count)
                else:
                    self._grow(count - self._left)
                    self._ask()
                if not self._collect() and self._ahead is None and self._monotonic() < self._pause_until:
                    return self._random(count)
            ids = self._pop(count)
            if self._left < self._size // 2 and self._ahead is None and self._size > RANGE_IDS_MIN:
                # The next range is asked for before this one is used up.
                self._grow(0)
                self._ahead = threading.Thread(target=self._ask, name="oncekeeper-ids", daemon=True)
                self._ahead.start()
            return ids

    def _grow(self, need: int) -> None:
        self._size = min(RANGE_IDS_MAX, max(need, self._size * _GROWTH))

    def _ask(self) -> None:
        try:
            start, count = self._fetch(self._size)
        except OncekeeperError:
            # Not an error yet: random ids take over, and after a pause the nodes are asked again.
            self._pause_until = self._monotonic() + _PAUSE_S
            return
        self._arrived.append((start, count))

    def _collect(self) -> bool:
        arrived, self._arrived = self._arrived, []
        self._runs += arrived
        self._left += sum(count for _, count in arrived)
        return bool(arrived)

    def _pop(self, count: int) -> Ids:
        taken: list[tuple[int, int]] = []
        self._left -= count
        while count:
            start, length = self._runs[0]
            used = min(count, length)
            taken.append((start, used))
            count -= used
            if used == length:
                del self._runs[0]
            else:
                self._runs[0] = (start + used, length - used)
        return Ids(tuple(taken))

    def _random(self, count: int) -> Ids:
        source = self._random_bytes(KEY_BYTES * count)
        return Ids(keys=tuple(source[at : at + KEY_BYTES] for at in range(0, len(source), KEY_BYTES)))
