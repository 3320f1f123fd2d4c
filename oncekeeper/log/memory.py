"""A task log in memory, for tests: same port, same conformance suite, nothing durable."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from dedup.ids import Ids, TaskId
from oncekeeper.envelope import TaskBatch, decode_batch, encode_batch
from oncekeeper.errors import InvalidTask, LogUnusable
from oncekeeper.log.cut import cut
from oncekeeper.log.memory_delayed import MemoryDelays
from oncekeeper.log.port import READ_ITEMS_MAX, Appended, Aside, Fetched, Gap, Item, Located, Undecodable


class MemoryLog:
    """TaskLog over lists. Messages are kept encoded, so that nothing passes that a real log would refuse."""

    def __init__(
        self, partitions: int = 12, clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    ) -> None:
        self._partitions = partitions
        self._clock_ms = clock_ms
        self._turn = 0
        self._rows: list[list[tuple[int, int, int, bytes]]] = [[] for _ in range(partitions)]
        self._ends = dict.fromkeys(range(partitions), 0)
        self._committed = dict.fromkeys(range(partitions), 0)
        self._aside: dict[tuple[TaskId, str], tuple[int, Aside]] = {}
        self._places = 0
        self.delays = MemoryDelays(self._read_one, self.find, self._append_to)

    @property
    def partitions(self) -> int:
        return self._partitions

    def close(self) -> None:
        """Nothing to let go of."""

    def append(self, batches: Sequence[TaskBatch]) -> list[Appended]:
        pieces = [
            (partition, len(row), encode_batch(row))
            for partition, row in cut(batches, self._partitions, self._turn)
        ]
        appended = []
        for partition, count, message in pieces:
            appended.append(self._put(partition, count, message))
            self._turn = partition + 1
        return appended

    def _append_to(self, partition: int, batch: TaskBatch) -> Appended:
        return self._put(partition, len(batch), encode_batch(batch))

    def _put(self, partition: int, count: int, message: bytes) -> Appended:
        base = self._ends[partition]
        self._rows[partition].append((base, count, self._clock_ms(), message))
        self._ends[partition] = base + count
        return Appended(partition, base, count)

    def _read_one(self, partition: int, offset: int) -> Fetched | Undecodable:
        (item,) = self.read(partition, offset, 1, 1)
        if isinstance(item, Gap):
            raise LogUnusable(f"partition {partition} holds no task at offset {offset}")
        return item

    def read(self, partition: int, offset: int, tasks_max: int, bytes_max: int) -> list[Item]:
        rows = self._rows[partition]
        found: list[Item] = []
        tasks = size = 0
        for base, count, _, message in rows[max(0, bisect_right(rows, offset, key=lambda row: row[0]) - 1) :]:
            if base + count <= offset:
                continue
            start = max(base, offset)
            tasks += base + count - start
            size += len(message)
            if found and (tasks > tasks_max or size > bytes_max or len(found) == READ_ITEMS_MAX):
                break
            try:
                batch = decode_batch(message).part(start - base, base + count - start)
            except InvalidTask as error:
                found.append(Undecodable(partition, start, base + count - start, message, str(error)))
                continue
            found.append(Fetched(partition, start, batch))
        return found

    def ends(self) -> dict[int, int]:
        return dict(self._ends)

    def committed(self) -> dict[int, int]:
        return dict(self._committed)

    def commit(self, positions: Mapping[int, int]) -> None:
        for partition, position in positions.items():
            if partition not in self._ends:
                raise ValueError(f"partition={partition} must be below {self._partitions}")
            if position > self._ends[partition]:
                raise ValueError(
                    f"partition {partition}: position={position} is above its end={self._ends[partition]}"
                )
        for partition, position in positions.items():
            self._committed[partition] = max(position, self._committed[partition])

    def find(self, task_id: TaskId) -> list[Located]:
        located = []
        for partition, rows in enumerate(self._rows):
            for base, _, _, message in rows:
                batch = decode_batch(message)
                located += [
                    Located(partition, base + at, batch.part(at, 1))
                    for at, found in enumerate(batch.ids)
                    if found == task_id
                ]
        return located

    def put_aside(self, tasks: Sequence[Aside]) -> None:
        for task in tasks:
            standing = self._aside.get((task.id, task.kind))
            self._places += standing is None
            self._aside[task.id, task.kind] = (standing[0] if standing else self._places, task)

    def aside(self, kind: str, after: int, limit: int) -> list[tuple[int, Aside]]:
        pages = sorted(
            (place, task) for place, task in self._aside.values() if task.kind == kind and place > after
        )
        return pages[:limit]

    def find_aside(self, ids: Ids) -> list[Aside]:
        wanted = [(task_id, kind) for task_id in ids for kind in ("dead", "suspect")]
        return [self._aside[key][1] for key in wanted if key in self._aside]

    def drop_aside(self, tasks: Sequence[Aside]) -> None:
        for task in tasks:
            standing = self._aside.get((task.id, task.kind))
            if standing is not None and standing[1] == task:
                del self._aside[task.id, task.kind]

    def retain(self, keep_ms: int, now_ms: int) -> int:
        deleted = 0
        for partition, rows in enumerate(self._rows):
            kept = []
            for at, (base, count, stored_ms, message) in enumerate(rows):
                if base + count > self._committed[partition] or stored_ms > now_ms - keep_ms:
                    kept += rows[at:]
                    break
                if self.delays.holds(partition, base, base + count):
                    kept.append((base, count, stored_ms, message))
                else:
                    deleted += count
            self._rows[partition] = kept
        return deleted
