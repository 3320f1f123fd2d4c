"""What a node has fetched of one partition of Kafka's and its coordinator has not taken yet (pure)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from oncekeeper.log.port import READ_ITEMS_MAX, Fetched, Gap, Item, Undecodable

# Fetched and not taken, of a partition: above, it is paused, and goes on at a quarter.
TASKS_HIGH, BYTES_HIGH = 32_768, 8 << 20
TASKS_TOTAL, BYTES_TOTAL = 262_144, 64 << 20  # of all partitions together, and what one round brings above it


class Stretch:
    """What was fetched of one partition: every offset from ``low`` to ``high``, in order."""

    def __init__(self, position: int) -> None:
        self.low = self.high = position
        self.tasks = 0
        self.bytes = 0
        self.paused = False
        self._items: deque[Item] = deque()

    def add(self, found: Sequence[Item]) -> None:
        """``found`` may begin above ``high``: what lies between holds nothing."""
        if found[0].base > self.high:
            self._push(Gap(found[0].partition, self.high, found[0].base - self.high))
        for item in found:
            if item.end > self.high:  # below: an older fetch brought it already
                self._push(_from(item, self.high))

    def ends_at(self, number: int, offset: int) -> bool:
        """The partition's end was seen there; True when that is news."""
        if offset > self.high:
            self._push(Gap(number, self.high, offset - self.high))
            return True
        return False

    def _push(self, item: Item) -> None:
        self._items.append(item)
        self.high = item.end
        self.tasks += item.end - item.base
        self.bytes += _size(item)

    def read(self, offset: int, tasks_max: int, bytes_max: int) -> list[Item]:
        """From ``offset`` on; what lies below is forgotten."""
        while self._items and self._items[0].end <= offset:
            item = self._items.popleft()
            self.tasks -= item.end - item.base
            self.bytes -= _size(item)
        self.low = offset
        found: list[Item] = []
        tasks = size = 0
        for item in self._items:
            tasks += item.end - max(item.base, offset)
            size += _size(item)
            if found and (tasks > tasks_max or size > bytes_max or len(found) == READ_ITEMS_MAX):
                break
            found.append(_from(item, offset))
        return found

    def is_full(self, stretches: int) -> bool:
        """Whether it has its share: what a node holds in all is bounded, however many partitions it has."""
        tasks, size = _share(stretches)
        return self.tasks > tasks or self.bytes > size

    def has_room(self, stretches: int) -> bool:
        tasks, size = _share(stretches)
        return self.tasks < tasks // 4 and self.bytes < size // 4


def _share(stretches: int) -> tuple[int, int]:
    return min(TASKS_HIGH, TASKS_TOTAL // stretches), min(BYTES_HIGH, BYTES_TOTAL // stretches)


def _size(item: Item) -> int:
    if isinstance(item, Fetched):
        return sum(map(len, item.batch.bodies))
    return len(item.raw) if isinstance(item, Undecodable) else 0


def _from(item: Item, offset: int) -> Item:
    if item.base >= offset:
        return item
    if isinstance(item, Fetched):
        return Fetched(item.partition, offset, item.batch.part(offset - item.base, item.end - offset))
    return Gap(item.partition, offset, item.end - offset)  # Undecodable is always of one record
