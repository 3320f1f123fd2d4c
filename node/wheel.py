"""A hierarchical timing wheel (pure): what falls due next, to the millisecond, at a constant cost a timer.

Source: Varghese and Lauck, "Hashed and Hierarchical Timing Wheels", SOSP 1987, scheme 7. Level ``n`` has 64 slots
of ``64**n`` milliseconds. A timer rests in the level of the highest six bits in which its due time differs from
the wheel's time, so that

- all timers of a level lie ahead of the wheel's own slot there, and before everything in higher levels: the next
  timer is in the lowest occupied slot of the lowest occupied level, and a jump over empty time costs nothing;
- its slot follows from the wheel's time and its due time alone, so that cancelling needs no search;
- a timer moves down a level at most eight times, whatever its delay: the eight levels span all times that a
  task may have (48 bits of milliseconds since the epoch, beyond the year 10000).

The wheel's time never goes back. When the clock does, what is then due before the wheel's time waits in a heap
beside it, and fires when the *clock* gets there: late by the jump if it was computed by the wrong clock, and
never early by the clock that is shown.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_BITS = 6
_SLOTS = 1 << _BITS
_LEVELS = 8
DUE_MS_MAX = (1 << _BITS * _LEVELS) - 1


class Wheel(Generic[T]):
    """Items by due time. An item is in the wheel once: inserting it again moves it."""

    __slots__ = ("_at", "_behind", "_due", "_occupied", "_slots", "_turns")

    def __init__(self, now_ms: int) -> None:
        self._at = _checked(now_ms)
        self._due: dict[T, int] = {}
        # A slot is an ordered set. All that is in a slot is due after ``_at``.
        self._slots: list[dict[T, None] | None] = [None] * (_LEVELS * _SLOTS)
        self._occupied = [0] * _LEVELS  # a bit a slot
        self._behind: list[
            tuple[int, int, T]
        ] = []  # a heap of what is due at or before ``_at``, and of leavings
        self._turns = itertools.count()

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, item: T) -> bool:
        return item in self._due

    def due_ms(self, item: T) -> int | None:
        """When an item is due; None: it is not there."""
        return self._due.get(item)

    def items(self) -> list[T]:
        """All that is here, in no order."""
        return list(self._due)

    # --- in and out -------------------------------------------------------------------------------------------

    def insert(self, due_ms: int, item: T) -> None:
        self.insert_all(((due_ms, item),))

    def insert_all(self, timers: Iterable[tuple[int, T]]) -> None:
        due, place = self._due, self._place
        for due_ms, item in timers:
            _checked(due_ms)
            if item in due:
                self.cancel(item)
            due[item] = due_ms
            place(due_ms, item)

    def cancel(self, item: T) -> bool:
        """Take an item out; False: it was not there."""
        due_ms = self._due.pop(item, None)
        if due_ms is None:
            return False
        if due_ms > self._at:
            level, index = self._slot_of(due_ms)
            slot = self._slots[index]
            if slot is None or item not in slot:
                raise RuntimeError(f"wheel: an item due at {due_ms} is not in its slot at {self._at}")
            del slot[item]
            if not slot:
                self._vacate(level, index)
        elif len(self._behind) > 64 and len(self._behind) > 4 * len(self._due):
            # Its entry in the heap has no meaning now, and is passed over; but they must not pile up.
            self._behind = [entry for entry in self._behind if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._behind)
        return True

    def clear(self) -> None:
        self._due.clear()
        self._slots = [None] * (_LEVELS * _SLOTS)
        self._occupied = [0] * _LEVELS
        self._behind.clear()

    def _place(self, due_ms: int, item: T) -> None:
        if due_ms <= self._at:
            heapq.heappush(self._behind, (due_ms, next(self._turns), item))
            return
        level, index = self._slot_of(due_ms)
        slot = self._slots[index]
        if slot is None:
            self._slots[index] = {item: None}
            self._occupied[level] |= 1 << (index & (_SLOTS - 1))
        else:
            slot[item] = None

    def _slot_of(self, due_ms: int) -> tuple[int, int]:
        """Level, and number of the slot among all; for times after the wheel's."""
        level = ((due_ms ^ self._at).bit_length() - 1) // _BITS
        return level, level * _SLOTS + (due_ms >> level * _BITS & _SLOTS - 1)

    def _vacate(self, level: int, index: int) -> None:
        self._slots[index] = None
        self._occupied[level] &= ~(1 << (index & (_SLOTS - 1)))

    # --- time -------------------------------------------------------------------------------------------------

    def next_due_ms(self) -> int | None:
        """Nothing is due before this time. Exact when it is within 64 ms; before that it may be too soon by the
        width of a slot, and whoever looks then learns better. None: nothing is here."""
        while self._behind and self._due.get(self._behind[0][2]) != self._behind[0][0]:
            heapq.heappop(self._behind)
        if self._behind:
            return self._behind[0][0]
        found = self._first_slot()
        return found[2] if found is not None else None

    def advance(self, now_ms: int) -> list[T]:
        """Take out what is due, in due order; of one millisecond in the order of insertion."""
        fired: list[T] = []
        behind = self._behind
        while behind and behind[0][0] <= now_ms:
            due_ms, _, item = heapq.heappop(behind)
            if self._due.get(item) == due_ms:
                del self._due[item]
                fired.append(item)
        if now_ms <= self._at:
            return fired  # the clock stands, or was set back
        _checked(now_ms)
        while (found := self._first_slot()) is not None and found[2] <= now_ms:
            self._empty(*found, fired)
        self._at = now_ms
        return fired

    def _first_slot(self) -> tuple[int, int, int] | None:
        """The next occupied slot: its level, its number, and the time at which it begins."""
        for level, occupied in enumerate(self._occupied):
            if occupied:
                slot = (occupied & -occupied).bit_length() - 1
                shift = level * _BITS
                start_ms = self._at >> shift + _BITS << shift + _BITS | slot << shift
                return level, level * _SLOTS + slot, start_ms
        return None

    def _empty(self, level: int, index: int, start_ms: int, fired: list[T]) -> None:
        """Move the wheel's time to the beginning of a slot: what is in it is due now, or goes to lower levels."""
        slot = self._slots[index] or {}
        self._vacate(level, index)
        self._at = start_ms
        due = self._due
        if level == 0:
            for item in slot:
                del due[item]
            fired.extend(slot)
            return
        for item in slot:
            due_ms = due[item]
            if due_ms == start_ms:
                del due[item]
                fired.append(item)
            else:
                self._place(due_ms, item)


def _checked(time_ms: int) -> int:
    if not 0 <= time_ms <= DUE_MS_MAX:
        raise ValueError(f"time_ms={time_ms} must be from 0 to {DUE_MS_MAX}, milliseconds since the epoch")
    return time_ms
