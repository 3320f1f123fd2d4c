"""Suspects: tasks whose claim was lost with its holder, and the evidence so far.

A suspect stays until evidence closes it: testimony of the holder's node, the handler's check or policy, or a
human. Of testimony only "started" leaves it open, and is written down here; whatever says more resolves it.
Testimony is immutable: the first one of a node's incarnation about an id and fence stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import msgspec

from dedup.claims import merged
from dedup.ids import Ids, TaskId

# A node that restarts again and again testifies "started" each time. The first few are kept: they say it all.
TESTIMONIES_MAX = 8


class Suspect(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """A lost claim. Times are ledger time."""

    fence: int
    session: int
    node: str
    incarnation: int
    attempt: int
    why: str  # "lapsed", "replaced", "left", "doubt"
    since_ms: int
    testified: tuple[int, ...] = ()
    """The incarnations of ``node`` that testified "started", in the order in which they did."""
    held_by: str = ""
    """Who holds it for a human to decide; empty while it is not held."""
    held_reason: str = ""

    def started_by(self, incarnation: int) -> Suspect:
        """With this incarnation's testimony that the task was started (unchanged, if there is no room)."""
        if len(self.testified) >= TESTIMONIES_MAX:
            return self
        return msgspec.structs.replace(self, testified=(*self.testified, incarnation))

    def held_for(self, by: str, reason: str) -> Suspect:
        return msgspec.structs.replace(self, held_by=by, held_reason=reason)


class SuspectRun(msgspec.Struct, frozen=True):
    """Suspects that share everything. ``ids`` is one run of range ids, or one key."""

    ids: Ids
    suspect: Suspect


def place(task_id: TaskId) -> tuple[int, int, bytes]:
    """The canonical order of ids: range ids ascending, and then keys ascending."""
    return (0, task_id, b"") if isinstance(task_id, int) else (1, 0, task_id)


def ordered(found: Iterator[tuple[Ids, Suspect]]) -> list[SuspectRun]:
    """Single runs and single keys in canonical order; neighbours that share everything are joined."""
    entries = [(part, suspect) for ids, suspect in found for part in _pieces(ids)]
    entries.sort(key=lambda entry: place(next(iter(entry[0]))))
    listing: list[SuspectRun] = []
    for part, suspect in entries:
        if listing and part.runs and listing[-1].ids.runs and listing[-1].suspect == suspect:
            (start, count), (next_start, next_count) = listing[-1].ids.runs[0], part.runs[0]
            if start + count == next_start:
                listing[-1] = SuspectRun(Ids(((start, count + next_count),)), suspect)
                continue
        listing.append(SuspectRun(part, suspect))
    return listing


def page(listing: list[SuspectRun], after: TaskId | None, limit: int) -> tuple[SuspectRun, ...]:
    """Up to ``limit`` ids of a listing that come after ``after`` in canonical order."""
    taken: list[SuspectRun] = []
    room = limit
    for entry in islice(listing, _first_after(listing, after), None):
        if room <= 0:
            break
        ids = entry.ids
        if ids.runs:
            start, count = ids.runs[0]
            if isinstance(after, int) and start <= after:
                start, count = after + 1, start + count - after - 1
            ids = Ids(((start, min(count, room)),))
        taken.append(SuspectRun(ids, entry.suspect))
        room -= len(ids)
    return tuple(taken)


def _first_after(listing: list[SuspectRun], after: TaskId | None) -> int:
    """The first entry that holds an id after ``after`` (bisection)."""
    if after is None:
        return 0
    border = place(after)
    low, high = 0, len(listing)
    while low < high:
        middle = (low + high) // 2
        ids = listing[middle].ids
        last: TaskId = ids.runs[0][0] + ids.runs[0][1] - 1 if ids.runs else ids.keys[0]
        if place(last) <= border:
            low = middle + 1
        else:
            high = middle
    return low


def _pieces(ids: Ids) -> Iterator[Ids]:
    whole = merged([ids])
    for run in whole.runs:
        yield Ids((run,))
    for key in whole.keys:
        yield Ids((), (key,))
