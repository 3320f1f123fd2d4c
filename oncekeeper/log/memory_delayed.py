"""Delayed tasks in memory, for tests: same port, same conformance suite, nothing durable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from dedup.ids import TaskId
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.delayed import Deferral, Delayed, Place, after_in, enqueued, gathered
from oncekeeper.log.port import Appended, Fetched, Located, Undecodable


class MemoryDelays:
    """DelayStore over a dictionary of single places; rows are what neighbours with one due time look like."""

    def __init__(
        self,
        read_one: Callable[[int, int], Fetched | Undecodable],
        find: Callable[[TaskId], list[Located]],
        append_to: Callable[[int, TaskBatch], Appended],
    ) -> None:
        self._read_one = read_one
        self._find = find
        self._append_to = append_to
        self._rows: dict[tuple[int, int], Delayed] = {}  # by the place where a row begins

    def holds(self, partition: int, start: int, end: int) -> bool:
        return any(
            row.partition == partition and row.offset < end and row.end > start for row in self._rows.values()
        )

    def defer(self, tasks: Sequence[Deferral]) -> None:
        for task in tasks:
            end = task.offset + len(task.batch)
            start = task.offset
            for offset in range(task.offset, end + 1):
                if offset == end or self.holds(task.partition, offset, offset + 1):
                    if start < offset:
                        self._put(Delayed(task.due_ms, task.partition, start, offset - start, task.then))
                    start = offset + 1

    def _put(self, row: Delayed) -> None:
        self._rows[row.partition, row.offset] = row

    def _carve(self, places: Iterable[Place], was_ms: int | None = None) -> list[Delayed]:
        taken: list[Delayed] = []
        for place in gathered(places):
            start, end = place.offset, place.offset + place.count
            for row in sorted(self._rows.values(), key=lambda row: (row.partition, row.offset)):
                low, high = max(row.offset, start), min(row.end, end)
                if row.partition != place.partition or low >= high or was_ms not in (None, row.due_ms):
                    continue
                del self._rows[row.partition, row.offset]
                taken.append(_part(row, low, high))
                for left in (_part(row, row.offset, low), _part(row, high, row.end)):
                    if left.count:
                        self._put(left)
        return taken

    def move(self, places: Sequence[Place], due_ms: int, was_ms: int | None = None) -> int:
        moved = self._carve(places, was_ms)
        for row in moved:
            self._put(msgspec.structs.replace(row, due_ms=due_ms))
        return sum(row.count for row in moved)

    def drop(self, places: Iterable[Place]) -> int:
        return sum(row.count for row in self._carve(places))

    def enqueue(self, rows: Sequence[Delayed]) -> list[Appended]:
        appended = []
        for row, item in self.fetch(rows):
            if isinstance(item, Fetched):
                self._carve((Place(row.partition, row.offset, row.count),))
                appended.append(self._append_to(row.partition, enqueued(item.batch, row.due_ms)))
        return appended

    def due(
        self, partitions: Iterable[int], until_ms: int, after: Delayed | None, limit: int
    ) -> list[Delayed]:
        wanted = set(partitions)
        return sorted(
            row
            for row in self._rows.values()
            if row.partition in wanted
            and row.due_ms <= until_ms
            and (row.due_ms, row.offset) > after_in(row.partition, after)
        )[:limit]

    def fetch(self, rows: Sequence[Delayed]) -> list[tuple[Delayed, Fetched | Undecodable]]:
        found: list[tuple[Delayed, Fetched | Undecodable]] = []
        for row in rows:
            for standing in sorted(self._rows.values()):
                part = _part(standing, max(standing.offset, row.offset), min(standing.end, row.end))
                if (part.partition, part.due_ms) != (row.partition, row.due_ms) or part.count <= 0:
                    continue
                item = self._read_one(part.partition, part.offset)
                if isinstance(item, Fetched):
                    found.append((part, Fetched(part.partition, part.offset, item.batch.part(0, part.count))))
                else:
                    found.append((part, msgspec.structs.replace(item, count=part.count)))
        return found

    def find(self, task_id: TaskId) -> list[Delayed]:
        return sorted(
            _part(row, located.offset, located.offset + 1)
            for located in self._find(task_id)
            for row in self._rows.values()
            if row.partition == located.partition and row.offset <= located.offset < row.end
        )

    def standing(self, place: Place) -> list[Delayed]:
        end = place.offset + place.count
        parts = [
            _part(row, max(row.offset, place.offset), min(row.end, end))
            for row in self._rows.values()
            if row.partition == place.partition
        ]
        return sorted((part for part in parts if part.count > 0), key=lambda part: part.offset)

    def counts(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for row in sorted(self._rows.values(), key=lambda row: row.partition):
            counts[row.partition] = counts.get(row.partition, 0) + row.count
        return counts


def _part(row: Delayed, start: int, end: int) -> Delayed:
    return msgspec.structs.replace(row, offset=start, count=end - start)
