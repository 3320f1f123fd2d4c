"""A map from task ids to values, in which neighbours with one value are one entry.

The ledger keeps its open claims, suspects and verdicts in such maps. A batch of 1,000 neighbouring range ids
is a run: it is set, read and removed with a bisection and one splice, not with 1,000 steps. Keyed ids have
no neighbours and stay single.

Range ids rest in three parallel lists, ascending: where a run starts, where it ends (exclusive), its value.
What always holds: runs do not overlap, none is empty, and two that touch have unequal values. So equal
content has exactly one representation, whatever the order of operations, and ``items`` may feed a digest
that replicas compare.

A splice moves the tails of three lists. That is a memmove: about 14 us at 100,000 runs, which only ids
scattered one by one produce; so the lists are not chunked.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Generic, TypeVar

from dedup.ids import Ids, TaskId

V = TypeVar("V")


class RunMap(Generic[V]):
    """Maps task ids to values, which compare by ``==`` and are never None."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._values: list[V] = []
        self._keyed: dict[bytes, V] = {}
        self._range_ids = 0

    def __len__(self) -> int:
        """How many ids have a value."""
        return self._range_ids + len(self._keyed)

    @property
    def runs(self) -> int:
        """How many entries are stored: runs of range ids, and keyed ids one by one."""
        return len(self._starts) + len(self._keyed)

    def get(self, task_id: TaskId) -> V | None:
        if isinstance(task_id, bytes):
            return self._keyed.get(task_id)
        at = bisect_right(self._starts, task_id) - 1
        if at >= 0 and task_id < self._ends[at]:
            return self._values[at]
        return None

    def spans(self, ids: Ids) -> list[tuple[int, V | None]]:
        """The values of ``ids`` in their order, as (count, value); neighbouring spans differ in value."""
        spans: list[tuple[int, V | None]] = []
        for start, count in ids.runs:
            self._read_run(start, start + count, spans)
        if not ids.keys:
            return spans
        if not self._keyed:
            _extend(spans, len(ids.keys), None)
            return spans
        for value in map(self._keyed.get, ids.keys):
            _extend(spans, 1, value)
        return spans

    def set(self, ids: Ids, value: V) -> None:
        """Give every id of ``ids`` this value, whatever it had before."""
        for start, count in ids.runs:
            if count > 0:
                self._write_run(start, start + count, value)
        for key in ids.keys:
            self._keyed[key] = value

    def remove(self, ids: Ids) -> int:
        """Forget ``ids``; returns how many of them had a value."""
        before = len(self)
        for start, count in ids.runs:
            if count > 0:
                self._cut_run(start, start + count)
        if self._keyed:
            for key in ids.keys:
                self._keyed.pop(key, None)
        return before - len(self)

    def items(self) -> Iterator[tuple[Ids, V]]:
        """Everything, in the canonical order: runs ascending, then keys ascending, of one value together."""
        for start, end, value in zip(self._starts, self._ends, self._values, strict=True):
            yield Ids(((start, end - start),)), value
        group: list[bytes] = []
        group_value: V | None = None
        for key in sorted(self._keyed):
            value = self._keyed[key]
            if group and group_value is not None and group_value != value:
                yield Ids((), tuple(group)), group_value
                group = []
            group.append(key)
            group_value = value
        if group and group_value is not None:
            yield Ids((), tuple(group)), group_value

    def _read_run(self, start: int, end: int, spans: list[tuple[int, V | None]]) -> None:
        at = bisect_right(self._ends, start)
        while start < end:
            if at == len(self._starts) or self._starts[at] >= end:
                _extend(spans, end - start, None)
                return
            if self._starts[at] > start:
                _extend(spans, self._starts[at] - start, None)
                start = self._starts[at]
            stop = min(end, self._ends[at])
            _extend(spans, stop - start, self._values[at])
            start = stop
            at += 1

    def _write_run(self, start: int, end: int, value: V) -> None:
        self._range_ids += end - start
        # Runs low .. high - 1 overlap or touch [start, end): they are replaced by what remains of them.
        low = bisect_left(self._ends, start)
        high = bisect_right(self._starts, end)
        starts, ends, values = [start], [end], [value]
        if low < high:
            for at in range(low, high):
                self._range_ids -= max(0, min(end, self._ends[at]) - max(start, self._starts[at]))
            first_start, first_value = self._starts[low], self._values[low]
            last_end, last_value = self._ends[high - 1], self._values[high - 1]
            if first_start < start:
                if first_value == value:
                    starts[0] = first_start
                else:
                    starts.insert(0, first_start)
                    ends.insert(0, start)
                    values.insert(0, first_value)
            if last_end > end:
                if last_value == value:
                    ends[-1] = last_end
                else:
                    starts.append(end)
                    ends.append(last_end)
                    values.append(last_value)
        self._splice(low, high, starts, ends, values)

    def _cut_run(self, start: int, end: int) -> None:
        low = bisect_right(self._ends, start)
        high = bisect_left(self._starts, end)
        if low >= high:
            return
        for at in range(low, high):
            self._range_ids -= min(end, self._ends[at]) - max(start, self._starts[at])
        starts: list[int] = []
        ends: list[int] = []
        values: list[V] = []
        if self._starts[low] < start:
            starts.append(self._starts[low])
            ends.append(start)
            values.append(self._values[low])
        if self._ends[high - 1] > end:
            starts.append(end)
            ends.append(self._ends[high - 1])
            values.append(self._values[high - 1])
        self._splice(low, high, starts, ends, values)

    def _splice(self, low: int, high: int, starts: list[int], ends: list[int], values: list[V]) -> None:
        self._starts[low:high] = starts
        self._ends[low:high] = ends
        self._values[low:high] = values


def _extend(spans: list[tuple[int, V | None]], count: int, value: V | None) -> None:
    """Append ``count`` ids of ``value``, to the last span if it has the same value."""
    if spans:
        last_count, last = spans[-1]
        if last is value or last == value:
            spans[-1] = (last_count + count, last)
            return
    spans.append((count, value))
