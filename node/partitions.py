"""The partitions that a node owns: what was read of each, what waits, what is settled, what may be passed.

A position moves over a task only when ``settled`` was told of it. Each ownership of a partition is an *epoch*:
what was read under an earlier one may still be settled in the ledger, but neither waits here nor moves anything,
because the partition's next owner reads it again.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from node import messages as m
from node.offsets import Offsets
from node.pieces import Piece
from node.views import CoordinatorSettings, PartitionView
from oncekeeper.log.port import Gap
from raft.commands import Outcome


@dataclass(slots=True)
class _Partition:
    epoch: int
    offsets: Offsets
    next_offset: int
    committed: int
    reading: bool = False
    exhausted: bool = False


class Partitions:
    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings
        self._epochs = itertools.count(1)
        self._turns = itertools.count(1)
        self._owned: dict[int, _Partition] = {}
        self._waiting: list[tuple[int, int, Piece, Outcome]] = []  # a heap by the time to look again

    def assign(self, positions: Mapping[int, int]) -> frozenset[int]:
        """Own exactly these, the new ones from the given positions; returns those that were given up."""
        gone = frozenset(self._owned.keys() - positions.keys())
        for number in gone:
            del self._owned[number]
        for number in sorted(positions.keys() - self._owned.keys()):
            at = positions[number]
            self._owned[number] = _Partition(next(self._epochs), Offsets(at), at, at)
        if gone:
            self._waiting = [entry for entry in self._waiting if entry[2].partition not in gone]
            heapq.heapify(self._waiting)
        return gone

    def epochs(self) -> dict[int, int]:
        return {number: partition.epoch for number, partition in self._owned.items()}

    def is_ours(self, piece: Piece) -> bool:
        return self.is_current(piece.partition, piece.epoch)

    def is_current(self, number: int, epoch: int) -> bool:
        partition = self._owned.get(number)
        return partition is not None and partition.epoch == epoch

    def settled(self, piece: Piece) -> None:
        """The ledger has it executed, dead or cancelled, or it was put aside: it may be passed."""
        if self.is_ours(piece):
            self._owned[piece.partition].offsets.settle(piece.offset, piece.count)

    def passed(self, number: int, gap: Gap) -> None:
        """Nothing stands there."""
        self._owned[number].offsets.settle(gap.base, gap.count)

    def moved(self) -> dict[int, int]:
        """The positions that moved since the last call."""
        moved = {}
        for number, partition in self._owned.items():
            if partition.offsets.position > partition.committed:
                moved[number] = partition.committed = partition.offsets.position
        return moved

    # --- waiting by time --------------------------------------------------------------------------------------

    def wait(self, piece: Piece, until_ms: int, why: Outcome) -> None:
        """``why``: NEW if only the time of its message has not come; else what the ledger said."""
        if self.is_ours(piece):
            heapq.heappush(self._waiting, (until_ms, next(self._turns), piece, why))

    def take_early(self, numbers: frozenset[int]) -> list[Piece]:
        """The delayed tasks of these that the ledger does not grant yet; they wait no longer."""

        def is_meant(piece: Piece, why: Outcome) -> bool:
            return why is Outcome.EARLY and piece.partition in numbers and piece.is_delayed

        taken = [piece for _, _, piece, why in self._waiting if is_meant(piece, why)]
        if taken:
            self._waiting = [entry for entry in self._waiting if not is_meant(entry[2], entry[3])]
            heapq.heapify(self._waiting)
        return taken

    def due(self, now_ms: int) -> Iterable[Piece]:
        while self._waiting and self._waiting[0][0] <= now_ms:
            yield heapq.heappop(self._waiting)[2]

    def next_due_ms(self) -> int | None:
        return self._waiting[0][0] if self._waiting else None

    # --- reading ----------------------------------------------------------------------------------------------

    def more(self, numbers: frozenset[int] | None) -> None:
        """Something may have been appended to these; None: to any."""
        for number in self._owned.keys() if numbers is None else numbers & self._owned.keys():
            self._owned[number].exhausted = False

    def reads(self, room: int) -> list[m.Read]:
        """What to read next, for at most about ``room`` tasks."""
        wanted = []
        for number, partition in self._owned.items():
            if room <= 0:
                break
            unsettled = partition.next_offset - partition.offsets.position
            if partition.reading or partition.exhausted or unsettled >= self._settings.window_max:
                continue
            partition.reading = True
            tasks_max = min(room, self._settings.read_max)
            room -= tasks_max
            wanted.append(m.Read(number, partition.epoch, partition.next_offset, tasks_max))
        return wanted

    def was_read(self, event: m.WasRead) -> bool:
        """Take note; False: the partition was given up meanwhile, and its next owner reads this."""
        partition = self._owned.get(event.partition)
        if partition is None or partition.epoch != event.epoch:
            return False
        partition.reading = False
        partition.exhausted = event.exhausted
        partition.next_offset = event.next_offset
        return True

    # --- what people see --------------------------------------------------------------------------------------

    def views(
        self,
        ready: Iterable[Piece],
        kept: Iterable[Piece],
        doubted: Iterable[Piece],
        in_hand: Mapping[int, int],
    ) -> list[PartitionView]:
        """Every unsettled task of a partition is ready, delayed, a suspect, or else with somebody who runs it.

        ``kept``: on their way to the store of delayed tasks. ``in_hand``: tasks that came from there; they are
        counted as ready, delayed and so on like all others, but stand below the position.
        """
        early = [piece for _, _, piece, why in self._waiting if why in (Outcome.EARLY, Outcome.NEW)]
        waiting, delayed, suspects = _counts(ready), _counts((*early, *kept)), _counts(doubted)
        views = []
        for number, partition in sorted(self._owned.items()):
            offsets = partition.offsets
            unsettled = partition.next_offset - offsets.position - offsets.settled_above
            unsettled += in_hand.get(number, 0)
            counted = waiting.get(number, 0) + delayed.get(number, 0) + suspects.get(number, 0)
            views.append(
                PartitionView(
                    partition=number,
                    position=offsets.position,
                    frontier=partition.next_offset,
                    waiting=waiting.get(number, 0),
                    delayed=delayed.get(number, 0),
                    running=max(0, unsettled - counted),
                    suspect=suspects.get(number, 0),
                    in_hand=in_hand.get(number, 0),
                )
            )
        return views


def _counts(pieces: Iterable[Piece]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for piece in pieces:
        counts[piece.partition] = counts.get(piece.partition, 0) + piece.count
    return counts
