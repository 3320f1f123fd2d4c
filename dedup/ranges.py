"""The executed range ids: an exact set, kept as *Roaring bitmaps* keep one (Lemire et al. 2016), for runs.

Ids are cut into containers of 65,536. A container is one of three, by what it holds:

- nothing, or everything: no memory of its own; neighbours that are full are one run in a ``RunMap``;
- few runs: their bounds, ascending, in an array: start, end, start, end, …; 8 bytes a run. A client that
  took a range of ids and executed one costs some hundred bytes, not 8 KB;
- many runs: a bitmap of 8 KB.

Work on a run (start, count) is a bisection and a splice, or a fill of a stretch of bits in C: it does not
depend on count, but for the C part. Between run list and bitmap there is a margin, so that no sequence of adds
makes a container go back and forth. Snapshots write each container by its content alone, so equal content is
equal bytes.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise

from bitarray import bitarray
from bitarray.util import zeros

from dedup.ids import RANGE_ID_MAX, Ids
from dedup.runmap import RunMap

CONTAINER_IDS = 1 << 16
RUNS_MAX = 512
"""A container with more runs than this becomes a bitmap, and a run list again below half of it."""

Spans = list[tuple[int, bool]]

_SHIFT = 16
_LOW = CONTAINER_IDS - 1
_ENTRY = struct.Struct("<BQQ")  # kind, index of the first container, then how many containers, or runs
_FULL, _RUNS, _BITMAP = 0, 1, 2


class Container:
    """65,536 ids, of which at least one is in and one is out (``FULL`` stands for all the full ones)."""

    __slots__ = ("bits", "bounds", "count", "run_count")

    def __init__(self) -> None:
        self.bounds = array("I")
        self.bits: bitarray | None = None  # holds the ids when set; bounds is empty then
        self.count = 0
        self.run_count = 0

    def add(self, low: int, high: int) -> int:
        """Add ``low .. high - 1``; how many were new."""
        new = self._add_to_bounds(low, high) if self.bits is None else self._add_to_bits(self.bits, low, high)
        self.count += new
        return new

    def read(self, low: int, high: int, spans: Spans) -> None:
        """Extend ``spans`` by ``low .. high - 1``."""
        if self.bits is None:
            bounds = self.bounds
            at = bisect_right(bounds, low)
            while low < high:
                stop = min(high, bounds[at]) if at < len(bounds) else high
                extend(spans, stop - low, at % 2 == 1)
                low = stop
                at += 1
            return
        inside = self.bits[low]
        while low < high:
            stop = self.bits.find(not inside, low, high)
            stop = high if stop < 0 else stop
            extend(spans, stop - low, bool(inside))
            low = stop
            inside = not inside

    def has(self, low: int) -> bool:
        return bisect_right(self.bounds, low) % 2 == 1 if self.bits is None else bool(self.bits[low])

    def as_bounds(self) -> array[int]:
        if self.bits is None:
            return self.bounds
        bounds = array("I")
        at = self.bits.find(1)
        while at >= 0:
            end = self.bits.find(0, at)
            end = CONTAINER_IDS if end < 0 else end
            bounds.append(at)
            bounds.append(end)
            at = self.bits.find(1, end)
        return bounds

    def as_bits(self) -> bitarray:
        if self.bits is not None:
            return self.bits
        bits = zeros(CONTAINER_IDS, endian="little")
        for start, end in zip(self.bounds[::2], self.bounds[1::2], strict=True):
            bits[start:end] = 1
        return bits

    def settle_form(self) -> None:
        """Take the smaller form, once it is smaller by a margin."""
        if self.bits is None and self.run_count > RUNS_MAX:
            self.bits = self.as_bits()
            self.bounds = array("I")
        elif self.bits is not None and self.run_count <= RUNS_MAX // 2:
            self.bounds = self.as_bounds()
            self.bits = None

    def _add_to_bounds(self, low: int, high: int) -> int:
        bounds = self.bounds
        # The bounds in [low, high] go. An even index is a start: before it we are outside, so low becomes a
        # start; an odd one is an end: the run that it ends holds or touches low. The same for high.
        first = bisect_left(bounds, low)
        last = bisect_right(bounds, high)
        gone = bounds[first:last]
        came = array("I")
        if first % 2 == 0:
            came.append(low)
        if last % 2 == 0:
            came.append(high)
        bounds[first:last] = came
        self.run_count = len(bounds) // 2
        # The size of a set is the sum of its ends less the sum of its starts.
        before = sum(gone[1::2]) - sum(gone[::2])
        after = (high if last % 2 == 0 else 0) - (low if first % 2 == 0 else 0)
        return after - (before if first % 2 == 0 else -before)

    def _add_to_bits(self, bits: bitarray, low: int, high: int) -> int:
        new = high - low - bits.count(1, low, high)
        if new:
            # Runs are counted by their starts: those in [low, high] merge into one, or into the one before low.
            self.run_count += (0 if low and bits[low - 1] else 1) - self._starts_in(bits, low, high)
            bits[low:high] = 1
        return new

    @staticmethod
    def _starts_in(bits: bitarray, low: int, high: int) -> int:
        """How many runs start in ``low .. high``, the end included: a run that starts there merges."""
        window = bits[low : high + 1]
        before = bits[low - 1 : high] if low else bitarray("0", endian="little") + bits[: min(high, _LOW)]
        return (window & ~before[: len(window)]).count()


FULL = Container()
"""Stands for every container that holds all its ids; never changed."""


class RangeSet:
    """A set of range ids to which runs are added."""

    def __init__(self) -> None:
        self._containers: RunMap[Container] = RunMap()  # by container index
        self.count = 0

    def __contains__(self, task_id: int) -> bool:
        container = self._containers.get(task_id >> _SHIFT)
        return container is not None and (container is FULL or container.has(task_id & _LOW))

    @property
    def containers(self) -> int:
        """How many entries are kept: partial containers, and runs of full ones."""
        return self._containers.runs

    @staticmethod
    def check(runs: Iterable[tuple[int, int]]) -> None:
        """ValueError if one of ``runs`` is empty or has ids outside 1 .. RANGE_ID_MAX."""
        for start, count in runs:
            if start < 1 or count < 1 or start + count - 1 > RANGE_ID_MAX:
                raise ValueError(f"start={start}, count={count}: a run holds ids from 1 to {RANGE_ID_MAX}")

    def add(self, start: int, count: int) -> int:
        """Add a run that passes ``check``; how many of its ids were new."""
        end = start + count
        index, low = start >> _SHIFT, start & _LOW
        if low + count <= CONTAINER_IDS:
            new = self._add_within(index, low, low + count)
        else:
            last, high = end >> _SHIFT, end & _LOW
            new = 0
            if low:
                new += self._add_within(index, low, CONTAINER_IDS)
                index += 1
            if index < last:
                new += self._fill(index, last - index)
            if high:
                new += self._add_within(last, 0, high)
        self.count += new
        return new

    def read(self, start: int, count: int, spans: Spans) -> None:
        """Extend ``spans`` by what is known of a run."""
        if count < 1:
            return
        end = start + count
        index = start >> _SHIFT
        if (end - 1) >> _SHIFT == index:
            self._read_within(self._containers.get(index), start & _LOW, count, spans)
            return
        containers = Ids(((index, ((end - 1) >> _SHIFT) - index + 1),))
        for number, container in self._containers.spans(containers):
            stop = min(end, (index + number) << _SHIFT)
            self._read_within(container, start & _LOW, stop - start, spans)
            start = stop
            index += number

    def snapshot(self) -> Iterator[bytes]:
        """The set's canonical bytes, in pieces: equal content is equal bytes."""
        yield struct.pack("<Q", self._containers.runs)
        for ids, container in self._containers.items():
            ((index, number),) = ids.runs
            if container is FULL:
                yield _ENTRY.pack(_FULL, index, number)
            elif container.run_count <= RUNS_MAX:
                yield _ENTRY.pack(_RUNS, index, container.run_count)
                yield struct.pack(f"<{2 * container.run_count}I", *container.as_bounds())
            else:
                yield _ENTRY.pack(_BITMAP, index, container.run_count)
                yield container.as_bits().tobytes()

    @classmethod
    def restore(cls, data: memoryview, at: int) -> tuple[RangeSet, int]:
        """The set at offset ``at``, and the offset behind it. ValueError or struct.error on bad bytes."""
        ranges = cls()
        (entries,) = struct.unpack_from("<Q", data, at)
        at += 8
        next_index = 0
        for _ in range(entries):
            kind, index, number = _ENTRY.unpack_from(data, at)
            at += _ENTRY.size
            if index < next_index or (index + 1) << _SHIFT > RANGE_ID_MAX + 1:
                raise ValueError(f"container {index} is out of order or beyond the last id")
            if kind == _FULL:
                if number < 1 or (index + number) << _SHIFT > RANGE_ID_MAX + 1:
                    raise ValueError(f"{number} full containers from {index} cannot be")
                ranges._containers.set(Ids(((index, number),)), FULL)
                ranges.count += number << _SHIFT
                next_index = index + number
                continue
            container, at = _read_container(kind, number, data, at)
            ranges._containers.set(Ids(((index, 1),)), container)
            ranges.count += container.count
            next_index = index + 1
        if 0 in ranges:
            raise ValueError("0 is not a range id")
        return ranges, at

    @staticmethod
    def _read_within(container: Container | None, low: int, count: int, spans: Spans) -> None:
        if container is None or container is FULL:
            extend(spans, count, container is FULL)
        elif count == 1:
            extend(spans, 1, container.has(low))
        else:
            container.read(low, low + count, spans)

    def _add_within(self, index: int, low: int, high: int) -> int:
        container = self._containers.get(index)
        if container is FULL:
            return 0
        if container is None:
            if high - low == CONTAINER_IDS:
                self._containers.set(Ids(((index, 1),)), FULL)
                return CONTAINER_IDS
            container = Container()
            self._containers.set(Ids(((index, 1),)), container)
        new = container.add(low, high)
        if container.count == CONTAINER_IDS:
            self._containers.set(Ids(((index, 1),)), FULL)
        elif new:
            container.settle_form()
        return new

    def _fill(self, index: int, number: int) -> int:
        """Make ``number`` containers full; how many ids were new."""
        known = 0
        containers = Ids(((index, number),))
        for count, container in self._containers.spans(containers):
            if container is FULL:
                known += count << _SHIFT
            elif container is not None:
                known += container.count
        self._containers.set(containers, FULL)
        return (number << _SHIFT) - known


def _read_container(kind: int, run_count: int, data: memoryview, at: int) -> tuple[Container, int]:
    container = Container()
    container.run_count = run_count
    if kind == _RUNS and 1 <= run_count <= RUNS_MAX:
        bounds = struct.unpack_from(f"<{2 * run_count}I", data, at)
        if bounds[-1] > CONTAINER_IDS or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError("the runs of a container are not ascending")
        container.bounds = array("I", bounds)
        container.count = sum(bounds[1::2]) - sum(bounds[::2])
        at += 8 * run_count
    elif kind == _BITMAP and run_count > RUNS_MAX:
        body = data[at : at + CONTAINER_IDS // 8]
        if len(body) != CONTAINER_IDS // 8:
            raise ValueError("the bytes end within a bitmap")
        container.bits = bitarray(endian="little")
        container.bits.frombytes(bytes(body))
        container.count = container.bits.count()
        if Container._starts_in(container.bits, 0, CONTAINER_IDS) != run_count:
            raise ValueError(f"a bitmap does not have the {run_count} runs that it should")
        at += CONTAINER_IDS // 8
    else:
        raise ValueError(f"a container of kind {kind} with {run_count} runs cannot be")
    if container.count == CONTAINER_IDS:
        raise ValueError("a full container is not marked as full")
    return container, at


def extend(spans: Spans, count: int, executed: bool) -> None:
    """Append ``count`` ids, to the last span if it says the same."""
    if spans and spans[-1][1] == executed:
        spans[-1] = (spans[-1][0] + count, executed)
    else:
        spans.append((count, executed))
