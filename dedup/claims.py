"""What the ledger keeps of a task that is neither new nor executed, and where each holder's claims are.

One map from ids to these values (dedup/runmap.py) is the whole truth, so an id is in at most one state by
construction. Values are frozen and compare by content: ids that one command moved together share one value and
rest as one entry. The fence of a value is that of the last claim (0: never claimed). It stays when the
claim is closed, so that a repeated settle is told from a late one, and no entry of the journal grants twice.

``Held`` answers "which ids are under this fence" without a walk over that map: a lapse costs what the session
holds, not what the cluster holds. It is an index and lists a superset; the map has the last word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from dedup.ids import Ids

V = TypeVar("V")


class OpenClaim(msgspec.Struct, frozen=True, array_like=True, tag="o", gc=False):
    """A live session may run the task, or does."""

    fence: int
    session: int
    attempt: int


class Waiting(msgspec.Struct, frozen=True, array_like=True, tag="w", gc=False):
    """May be claimed for this attempt from ``due_ms`` (ledger time) on."""

    fence: int
    attempt: int
    due_ms: int
    how: str  # "retry", "released", "testimony", "ruled", "revived": what closed the last claim; or "held"
    at_ms: int  # since when


class Dead(msgspec.Struct, frozen=True, array_like=True, tag="d", gc=False):
    """Given up after this attempt: a dead letter."""

    fence: int
    attempt: int
    at_ms: int


class Cancelled(msgspec.Struct, frozen=True, array_like=True, tag="x", gc=False):
    """Deleted before it started."""

    fence: int
    by: str
    at_ms: int


class _Listed:
    """Ids that came under one number: how many still are, and a superset of which."""

    __slots__ = ("count", "listed", "parts")

    def __init__(self) -> None:
        self.count = 0
        self.listed = 0
        self.parts: list[Ids] = []


class Held:
    """Ids by number: what a session claims or a node left, by fence; what is closed, by its time to retire."""

    __slots__ = ("_numbers", "count")

    def __init__(self) -> None:
        self.count = 0
        self._numbers: dict[int, _Listed] = {}

    def add(self, number: int, ids: Ids, count: int) -> None:
        """``ids`` (``count`` of them, none of them there) came under ``number``."""
        listed = self._numbers.get(number)
        if listed is None:
            listed = self._numbers[number] = _Listed()
        listed.count += count
        listed.listed += count
        listed.parts.append(ids)
        self.count += count

    def drop(self, number: int, count: int) -> int:
        """``count`` ids left ``number``; returns how many remain there, negative if fewer were there."""
        self.count -= count
        listed = self._numbers.get(number)
        if listed is None:
            return -count
        listed.count -= count
        if listed.count == 0:
            del self._numbers[number]
        return listed.count

    def wasteful(self, number: int) -> bool:
        """Whether most of what is listed under ``number`` has left: time to ``relist``."""
        listed = self._numbers.get(number)
        return listed is not None and listed.listed > 1024 and listed.listed > 4 * listed.count

    def relist(self, number: int, parts: list[Ids]) -> None:
        """Replace what is listed under ``number`` by exactly what is there."""
        listed = self._numbers[number]
        listed.parts = parts
        listed.listed = listed.count

    def numbers(self) -> list[int]:
        return sorted(self._numbers)

    def parts(self, number: int) -> tuple[Ids, ...]:
        """All ids under ``number``, maybe some that have left it, and maybe some twice that came back."""
        listed = self._numbers.get(number)
        return tuple(listed.parts) if listed is not None else ()

    def count_under(self, number: int) -> int:
        listed = self._numbers.get(number)
        return listed.count if listed is not None else 0


def merged(parts: Sequence[Ids]) -> Ids:
    """Every id of the parts once, in canonical order: runs joined and ascending, then keys ascending."""
    runs: list[tuple[int, int]] = []
    end = 0  # exclusive, of the last run
    for start, count in sorted([run for part in parts for run in part.runs]):
        if runs and start <= end:
            end = max(end, start + count)
            runs[-1] = (runs[-1][0], end - runs[-1][0])
        else:
            end = start + count
            runs.append((start, count))
    keys = [key for part in parts for key in part.keys]
    return Ids(tuple(runs), tuple(sorted(set(keys))) if len(keys) > 1 else tuple(keys))


def repeats(ids: Ids) -> bool:
    """Whether an id is in this batch more than once."""
    end = 0
    for start, count in ids.runs:
        if start < end:
            return _runs_overlap(ids) or len(set(ids.keys)) < len(ids.keys)
        end = start + count
    return len(ids.keys) > 1 and len(set(ids.keys)) < len(ids.keys)


def _runs_overlap(ids: Ids) -> bool:
    end = 0
    for start, count in sorted(ids.runs):
        if start < end:
            return True
        end = start + count
    return False


def cut(ids: Ids, spans: Sequence[tuple[int, V]]) -> Iterator[tuple[Ids, int, V]]:
    """``ids`` cut into the parts that ``spans`` counts off, each with its count and value; linear in both."""
    if len(spans) == 1:
        yield ids, spans[0][0], spans[0][1]
        return
    runs, keys = ids.runs, ids.keys
    at_run = used = at_key = 0  # the next run, how much of it is given out, the next key
    for count, value in spans:
        part: list[tuple[int, int]] = []
        want = count
        while want and at_run < len(runs):
            start, length = runs[at_run]
            take = min(want, length - used)
            part.append((start + used, take))
            want -= take
            used += take
            if used == length:
                at_run, used = at_run + 1, 0
        yield Ids(tuple(part), keys[at_key : at_key + want]), count, value
        at_key += want


def single_parts(ids: Ids) -> Iterator[Ids]:
    """The batch in pieces of one run or one key, in its order: none of them repeats an id."""
    for run in ids.runs:
        yield Ids((run,))
    for key in ids.keys:
        yield Ids((), (key,))
