"""What a consumer group's thread has fetched and its node's loop has not taken yet, and what the loop asks of the
thread: all that both sides touch, under one lock.

The thread opens and closes partitions and fills them; the loop reads, commits, and says what may be skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

from oncekeeper.log.kafka_stretch import Stretch
from oncekeeper.log.port import Item


class Lost(Exception):
    """This membership cannot go on; the next one begins from the committed positions."""


class Buffers:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stretches: dict[int, Stretch] = {}
        self._stuck: dict[int, tuple[int, int]] = {}  # (the position, the lowest offset that is left)
        self._skips: set[int] = set()
        self._commits: dict[int, int] = {}

    # --- the loop's side --------------------------------------------------------------------------------------

    def read(self, partition: int, offset: int, tasks_max: int, bytes_max: int) -> list[Item]:
        """What was fetched, from ``offset`` on; what lies below is forgotten. Lost: it is not among that."""
        with self._lock:
            stretch = self._stretches.get(partition)
            if stretch is None or partition in self._stuck:
                return []
            if not stretch.low <= offset <= stretch.high:
                # Believing a jump would lose what it jumps over.
                raise Lost(f"partition {partition}: {offset} is not within {stretch.low}..{stretch.high}")
            return stretch.read(offset, tasks_max, bytes_max)

    def commit(self, positions: Mapping[int, int]) -> None:
        with self._lock:
            self._commits.update(positions)

    def skip(self, partition: int) -> bool:
        """Whether it is stuck, and so may go on."""
        with self._lock:
            if partition not in self._stuck:
                return False
            self._skips.add(partition)
            return True

    @property
    def stuck(self) -> dict[int, tuple[int, int]]:
        with self._lock:
            return dict(self._stuck)

    # --- the thread's side ------------------------------------------------------------------------------------

    def open(self, positions: Mapping[int, int], new: Iterable[int]) -> None:
        """Partitions that are ours from now on. Those that nobody ever committed are committed at once: what is
        deleted above a position is an alarm, and without one it would be a silent loss."""
        with self._lock:
            for number, position in positions.items():
                self._stretches[number] = Stretch(position)
                self._commits.pop(number, None)  # of a former time: somebody else may have come further since
            self._commits.update((number, positions[number]) for number in new)

    def reopen(self, number: int, position: int) -> None:
        """It goes on from there, as somebody said."""
        with self._lock:
            self._stuck.pop(number, None)
            self._stretches[number] = Stretch(position)

    def close(self, numbers: Iterable[int]) -> None:
        with self._lock:
            for number in numbers:
                self._stretches.pop(number, None)
                self._stuck.pop(number, None)

    def close_stuck(self) -> None:
        with self._lock:
            self._stuck.clear()

    def block(self, number: int, position: int, low: int) -> None:
        """Kafka has deleted what lies between: nothing of it is read until somebody accepts that."""
        with self._lock:
            self._stuck[number] = (position, low)

    def add(self, number: int, found: Sequence[Item], end: int) -> tuple[bool, bool]:
        """Whether the loop has news of it, and whether no more may be fetched now. ``end``: the partition's, if it
        was seen; else below 0."""
        with self._lock:
            stretch = self._stretches.get(number)
            if stretch is None:
                return False, False  # it was given up
            if found:
                stretch.add(found)
            news = end >= 0 and stretch.ends_at(number, end)
            pause = stretch.is_full(len(self._stretches)) and not stretch.paused
            stretch.paused |= pause
        return bool(found) or news, pause

    def fetched_up_to(self, number: int) -> int:
        with self._lock:
            stretch = self._stretches.get(number)
            return stretch.high if stretch is not None else 0

    def with_room(self) -> tuple[list[int], bool]:
        """Paused partitions that have room again, and are paused no more; whether others are still."""
        with self._lock:
            owned = len(self._stretches)
            paused = {number: stretch for number, stretch in self._stretches.items() if stretch.paused}
            again = [number for number, stretch in paused.items() if stretch.has_room(owned)]
            for number in again:
                paused.pop(number).paused = False
        return again, bool(paused)

    def take_commits(self) -> dict[int, int]:
        """What was asked for of the partitions that are ours; what is no longer, its owner commits."""
        with self._lock:
            positions, self._commits = self._commits, {}
            return {number: at for number, at in positions.items() if number in self._stretches}

    def take_skips(self) -> list[int]:
        with self._lock:
            skips, self._skips = self._skips, set()
        return sorted(skips)
