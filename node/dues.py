"""What a node has in hand of its partitions' delayed tasks, and when it acts on them (pure).

    store --LoadDue--> wheel --due--> FetchDue --> the coordinator runs them ----settled----> drops
                            `--due--> EnqueueDue (appended anew, and no longer here)

The wheel holds rows, not messages: what falls due within the horizon, and of each partition no more than
``rows_max``. Up to its *frontier* a partition is known; what is handed on later and falls due before it goes into
the wheel without being loaded. A message is fetched when its row is due, and only what still waits for that
time is given: so nobody has to tell when something of it was dropped or moved away.

A row is in one place: the wheel, ``_due`` (waits to be fetched), or ``_busy`` (fetched, until all of it has been
settled, moved or enqueued). Whoever loads it again meanwhile gets nothing of it, so that it is not fired twice;
after a crash, or on another node, it is, and the ledger knows that it ran.

All times are the wall clock's: tasks are due by it. It may jump; see wheel.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from node.wheel import Wheel
from oncekeeper.log.delayed import ENQUEUE, Delayed, Place, gathered

T = TypeVar("T")

OFFSET_MAX = 1 << 62

LOOK_MS_MAX = 1_000
"""The longest sleep while something waits: the wall clock may be set forward meanwhile."""


@dataclass(frozen=True, slots=True)
class DueSettings:
    horizon_ms: int = 60_000
    rows_max: int = 5_000  # of a partition in the wheel; more are loaded when half of them are gone
    fetch_max: int = 4_096  # tasks of one FetchDue or EnqueueDue
    fetch_rows_max: int = 256  # of one FetchDue: read on the loop, which has heartbeats and claims to serve


# --- what it asks for -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadDue:
    """``store.due((partition,), until_ms, after, limit)``; the answer goes to ``loaded``."""

    partition: int
    epoch: int
    until_ms: int
    after: Delayed | None
    limit: int


@dataclass(frozen=True, slots=True)
class FetchDue:
    """``store.fetch(rows)``; the answer goes to ``fetched``."""

    rows: tuple[Delayed, ...]


@dataclass(frozen=True, slots=True)
class EnqueueDue:
    """``store.enqueue(rows)``; when it is done, ``fetched`` with what could not be."""

    rows: tuple[Delayed, ...]


Effect = LoadDue | FetchDue | EnqueueDue


@dataclass(slots=True)
class _Known:
    """How far a partition was loaded: up to the row ``after``, its frontier."""

    epoch: int
    after: Delayed | None = None
    cut: bool = True  # more may stand soon behind the frontier: the last page was full, or is still to come
    loading: bool = False
    stale: bool = False  # somebody moved rows while a page was being loaded
    rows: int = 0  # in the wheel
    late: list[Delayed] = field(default_factory=list)
    """Stored while a page was being loaded: it may have been read before, and yet move the frontier over them."""

    def holds(self, row: Delayed) -> bool:
        """Whether a row that is stored now lies before the frontier, so that no page will bring it."""
        return self.after is not None and row <= self.after


class Dues:
    def __init__(self, settings: DueSettings, wall_ms: int) -> None:
        self._settings = settings
        self._wheel: Wheel[Delayed] = Wheel(wall_ms)
        self._known: dict[int, _Known] = {}
        self._due: dict[bool, deque[Delayed]] = {False: deque(), True: deque()}  # by whether it is enqueued
        self._busy: dict[Delayed, int] = {}  # tasks of it that are not settled
        self._drops: list[Place] = []

    # --- partitions -----------------------------------------------------------------------------------------

    def assign(self, epochs: Mapping[int, int]) -> None:
        """Hold exactly these partitions, each by its epoch; what belongs to another epoch is forgotten."""
        gone = {number for number, known in self._known.items() if epochs.get(number) != known.epoch}
        if gone:
            for number in gone:
                del self._known[number]
            for row in self._wheel.items():
                if row.partition in gone:
                    self._wheel.cancel(row)
            self._due = {
                way: deque(row for row in due if row.partition not in gone) for way, due in self._due.items()
            }
            self._busy = {row: left for row, left in self._busy.items() if row.partition not in gone}
        for number in epochs.keys() - self._known.keys():
            self._known[number] = _Known(epochs[number])

    def reload(self, partition: int) -> None:
        """Rows of a partition were moved by somebody else: load it anew from its beginning."""
        known = self._known.get(partition)
        if known is None:
            return
        for row in self._wheel.items():
            if row.partition == partition:
                self._wheel.cancel(row)
        # What is on its way was read before, and is not taken.
        self._known[partition] = _Known(known.epoch, loading=known.loading, stale=known.loading)

    # --- loading --------------------------------------------------------------------------------------------

    def _loads(self, wall_ms: int) -> Iterator[LoadDue]:
        s = self._settings
        for number, known in self._known.items():
            if known.loading or known.rows > s.rows_max // 2:
                continue
            frontier_ms = known.after.due_ms if known.after is not None else 0
            if not known.cut and frontier_ms >= wall_ms + s.horizon_ms // 2:
                continue
            known.loading = True
            until_ms = max(frontier_ms, wall_ms + s.horizon_ms)
            yield LoadDue(number, known.epoch, until_ms, known.after, s.rows_max - known.rows)

    def loaded(self, load: LoadDue, rows: Sequence[Delayed]) -> None:
        known = self._known.get(load.partition)
        if known is None or known.epoch != load.epoch:
            return
        known.loading = False
        late, known.late = known.late, []
        if known.stale:
            known.stale = False
            return
        known.cut = len(rows) >= load.limit
        # Behind the last row that there can be up to then, if the page was not full.
        known.after = rows[-1] if known.cut else Delayed(load.until_ms, load.partition, OFFSET_MAX)
        for row in rows:
            self._insert(known, row)
        self.stored(late)

    def stored(self, rows: Iterable[Delayed]) -> None:
        """These were handed to the store, or moved within it, by this node: those before the frontier are known."""
        for row in rows:
            known = self._known.get(row.partition)
            if known is None:
                continue
            if known.holds(row):
                self._insert(known, row)
                if known.rows > 2 * self._settings.rows_max:
                    self.reload(row.partition)  # too many: the soonest of them, in due order, are enough
            elif known.loading:
                known.late.append(row)

    def _insert(self, known: _Known, row: Delayed) -> None:
        if row not in self._busy and row not in self._wheel:
            self._wheel.insert(row.due_ms, row)
            known.rows += 1

    # --- time -----------------------------------------------------------------------------------------------

    def look(self, wall_ms: int, room: int) -> list[Effect]:
        """What is to be done now, for at most about ``room`` tasks that run."""
        for row in self._wheel.advance(wall_ms):
            self._known[row.partition].rows -= 1
            self._busy[row] = row.count
            self._due[row.then == ENQUEUE].append(row)
        effects: list[Effect] = []
        s = self._settings
        if run := self._take(False, wall_ms, min(room, s.fetch_max), s.fetch_rows_max):
            effects.append(FetchDue(run))
        if enqueue := self._take(True, wall_ms, s.fetch_max, s.fetch_max):
            effects.append(EnqueueDue(enqueue))
        effects.extend(self._loads(wall_ms))
        return effects

    def _take(self, way: bool, wall_ms: int, room: int, rows_max: int) -> tuple[Delayed, ...]:
        taken: list[Delayed] = []
        due = self._due[way]
        while due and room > 0 and len(taken) < rows_max:
            row = due.popleft()
            if row.due_ms > wall_ms:  # the clock was set back meanwhile
                self._busy.pop(row, None)
                self._insert(self._known[row.partition], row)
            else:
                room -= row.count
                taken.append(row)
        return tuple(taken)

    def next_look_ms(self, wall_ms: int) -> int | None:
        """When to look again (wall clock); None: nothing is in hand. Pages are loaded by any look, and whoever
        owns partitions looks at them every second or so anyway."""
        due_ms = self._wheel.next_due_ms()
        if due_ms is None and not any(self._due.values()):
            return None
        latest = wall_ms + LOOK_MS_MAX
        return latest if due_ms is None else min(due_ms, latest)

    # --- what became of them --------------------------------------------------------------------------------

    def fetched(self, fetch: FetchDue, found: Sequence[tuple[Delayed, T]]) -> list[tuple[Delayed, int, T]]:
        """What to run, each with the epoch of its partition; what was moved or dropped meanwhile is forgotten.

        A row comes back in parts when some of it was: each part is then a row of its own.
        """
        taken = {row for row in fetch.rows if self._busy.pop(row, 0)}
        there = {row.partition for row in taken}
        ours = [
            (row, self._known[row.partition].epoch, item) for row, item in found if row.partition in there
        ]
        for row, _, _ in ours:
            self._busy[row] = row.count
        return ours

    def settled(self, row: Delayed, offset: int, count: int) -> None:
        """The ledger has these tasks of a fired row executed, dead or cancelled, or they were put aside."""
        self._drops.append(Place(row.partition, offset, count))
        self._left(row, count)

    def forget(self, place: Place) -> None:
        """These tasks were cancelled."""
        self._drops.append(place)

    def moved(self, row: Delayed, offset: int, count: int, due_ms: int) -> None:
        """These tasks of a fired row wait for another time now: the store was told, durably."""
        self._left(row, count)
        self.stored((msgspec.structs.replace(row, offset=offset, count=count, due_ms=due_ms),))

    def again(self, row: Delayed, offset: int, count: int) -> None:
        """These tasks of a fired row could not run yet, and may now: fetch them again, because somebody may have
        dropped or moved them while they waited in memory."""
        if row.partition in self._known:
            self._left(row, count)
            part = msgspec.structs.replace(row, offset=offset, count=count)
            self._busy[part] = count
            self._due[part.then == ENQUEUE].append(part)

    def _left(self, row: Delayed, count: int) -> None:
        left = self._busy.get(row, 0) - count
        if left > 0:
            self._busy[row] = left
        else:
            self._busy.pop(row, None)

    def drops(self) -> list[Place]:
        """What the store may forget, since the last call; asked for by time, as positions are."""
        drops, self._drops = gathered(self._drops), []
        return drops

    # --- what people see ------------------------------------------------------------------------------------

    @property
    def in_hand(self) -> int:
        """Rows in the wheel, and those that are due and not settled."""
        return len(self._wheel) + len(self._busy)

    def in_hand_by_partition(self) -> dict[int, int]:
        """Tasks that are due and not settled, or settled and not dropped: the store counts them still."""
        tasks: dict[int, int] = {}
        for row, left in self._busy.items():
            tasks[row.partition] = tasks.get(row.partition, 0) + left
        for place in gathered(self._drops):
            tasks[place.partition] = tasks.get(place.partition, 0) + place.count
        return tasks
