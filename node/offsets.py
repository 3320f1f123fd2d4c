"""The lowest contiguous settled position of a partition.

Tasks settle out of order; a log knows only one committed position a partition. ``Offsets`` keeps the settled
intervals above the position, merged, so that its size is the number of gaps and not of tasks. Committing above
an unsettled task would lose it on a crash; that is the one mistake this module exists to make impossible.
"""

from __future__ import annotations

from bisect import bisect_left


class Offsets:
    """Settled offsets of one partition, from the position that stood when it was taken over."""

    def __init__(self, position: int) -> None:
        self.position = position
        """Everything below is settled; this offset is not."""
        self._starts: list[int] = []
        self._ends: list[int] = []

    def settle(self, start: int, count: int) -> bool:
        """Mark ``count`` offsets from ``start`` on; True when the position moved."""
        end = start + count
        if end <= self.position:
            return False
        start = max(start, self.position)
        # All intervals that touch [start, end] become one.
        low = bisect_left(self._ends, start)
        high = low
        while high < len(self._starts) and self._starts[high] <= end:
            start = min(start, self._starts[high])
            end = max(end, self._ends[high])
            high += 1
        if start == self.position:
            del self._starts[:high], self._ends[:high]
            self.position = end
            return True
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]
        return False

    @property
    def settled_above(self) -> int:
        """How many offsets above the position are settled."""
        return sum(self._ends) - sum(self._starts)

    @property
    def gaps(self) -> int:
        """How many settled intervals wait above an unsettled offset."""
        return len(self._starts)
