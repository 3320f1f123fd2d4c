"""The words of the work history: what ran here, and the rare things that the ledger decided.

History is for people and for results; it is never asked whether a task may run. That is the ledger's.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import msgspec

from dedup.ids import Ids, TaskId
from raft.commands import (
    Answered,
    Deleted,
    Effects,
    Fact,
    Outcome,
    Resolved,
    Revive,
    Suspected,
    Testified,
)


class Ending(IntEnum):
    """How an attempt ended, as this node reported it to the ledger. Values are part of the file format."""

    DONE = 1
    RETRY = 2  # it failed, and another attempt follows
    DEAD = 3  # it failed, and none follows
    DOUBT = 4  # its worker was lost in mid-flight: a suspect
    RELEASED = 5  # never started, given back
    LAPSED = 6  # it ended, but the node's session had lapsed: what it reported became testimony


class Attempt(msgspec.Struct, frozen=True):
    """Neighbours of one attempt that ended alike. Times are epoch milliseconds of this node; 0 is unknown."""

    ids: Ids
    queue: str
    handler: str
    node: str
    fence: int
    attempt: int
    claimed_ms: int
    started_ms: int
    ended_ms: int
    ending: Ending
    results: tuple[bytes, ...] | None = None  # JSON texts in the order of ids; None where all were null
    error: str = ""
    trace: str = ""
    traceparent: str = ""

    def of(self, task_id: TaskId) -> Attempt | None:
        """The same for one of its ids; None where it is not among them."""
        at = position(self.ids, task_id)
        if at is None:
            return None
        return self.at(at)

    def at(self, place: int) -> Attempt:
        results = None if self.results is None else (self.results[place],)
        return msgspec.structs.replace(self, ids=self.ids.part(place, 1), results=results)


class EventKind(IntEnum):
    """Values are part of the file format."""

    SUSPECTED = 1
    TESTIFIED = 2
    RESOLVED = 3
    CANCELLED = 4
    REVIVED = 5


class RecordedEvent(msgspec.Struct, frozen=True):
    """What the ledger decided at a Raft index. ``number`` tells the events of one index apart."""

    index: int
    number: int
    kind: EventKind
    ids: Ids
    at_ms: int  # epoch, of the node that recorded it
    fence: int = 0
    node: str = ""  # whose claim it is about
    incarnation: int = 0
    what: str = ""  # SUSPECTED: why; TESTIFIED: the fact; RESOLVED: the verdict
    by: str = ""
    reason: str = ""

    def of(self, task_id: TaskId) -> RecordedEvent | None:
        at = position(self.ids, task_id)
        return None if at is None else msgspec.structs.replace(self, ids=self.ids.part(at, 1))


class TaskFilter(msgspec.Struct, frozen=True):
    """What a search looks for; an empty field matches everything."""

    endings: tuple[Ending, ...] = ()
    queue: str = ""
    handler: str = ""
    since_ms: int = 0  # ended at or after
    until_ms: int = 0  # ended before
    error: str = ""  # a part of the error's text, letter case ignored

    def matches(self, attempt: Attempt) -> bool:
        return (
            (not self.endings or attempt.ending in self.endings)
            and (not self.queue or attempt.queue == self.queue)
            and (not self.handler or attempt.handler == self.handler)
            and attempt.ended_ms >= self.since_ms
            and (not self.until_ms or attempt.ended_ms < self.until_ms)
            and (not self.error or self.error.casefold() in attempt.error.casefold())
        )


class Cursor(msgspec.Struct, frozen=True, order=True):
    """A place in the history, newest row first and within a row by position."""

    row: int
    place: int

    def text(self) -> str:
        return f"{self.row}.{self.place}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        row, dot, place = text.partition(".")
        if not (dot and len(text) <= 40 and text.isascii() and row.isdigit() and place.isdigit()):
            raise ValueError(f"after={text[:40]!r} must be the 'next' of an earlier page")
        return cls(min(int(row), 2**63 - 1), min(int(place), 2**63 - 1))


class Page(msgspec.Struct, frozen=True):
    """Single tasks (each Attempt has one id), newest first. ``next`` is None on the last page."""

    attempts: tuple[Attempt, ...]
    places: tuple[str, ...]  # parallel: a later page may start after any of them
    next: str | None


def position(ids: Ids, task_id: TaskId) -> int | None:
    """Where ``task_id`` stands in the order of ``ids``."""
    before = 0
    if isinstance(task_id, int):
        for start, count in ids.runs:
            if start <= task_id < start + count:
                return before + task_id - start
            before += count
        return None
    try:
        return sum(count for _, count in ids.runs) + ids.keys.index(task_id)
    except ValueError:
        return None


_FACT = {
    Fact.NEVER_STARTED: "never started",
    Fact.STARTED: "started",
    Fact.FINISHED: "finished",
    Fact.FAILED: "failed",
}


def recorded(effects: Effects, at_ms: int) -> list[RecordedEvent]:
    """What of an applied entry belongs into the history. Costs next to nothing for an entry without any."""
    if effects.repeated:
        return []
    return [
        msgspec.structs.replace(event, number=number)
        for number, event in enumerate(_rare(effects, at_ms))
        if len(event.ids)
    ]


def _rare(effects: Effects, at_ms: int) -> Iterator[RecordedEvent]:
    index = effects.index
    for event in effects.events:
        match event:
            case Suspected(ids, fence, node, incarnation, why):
                yield RecordedEvent(
                    index, 0, EventKind.SUSPECTED, ids, at_ms, fence, node, incarnation, what=why
                )
            case Testified(ids, fence, node, fact):
                yield RecordedEvent(
                    index, 0, EventKind.TESTIFIED, ids, at_ms, fence, node, what=_FACT[fact], by=node
                )
            case Resolved(ids, fence, verdict, by, reason):
                what = verdict.name.lower().replace("_", " ")
                yield RecordedEvent(
                    index, 0, EventKind.RESOLVED, ids, at_ms, fence, what=what, by=by, reason=reason
                )
            case Deleted(ids, by):
                yield RecordedEvent(index, 0, EventKind.CANCELLED, ids, at_ms, by=by)
            case _:
                pass
    # A revival has no event of its own (Freed is of everything that may run again): its answer tells.
    for command, answer in zip(effects.proposal.commands, effects.answers, strict=True):
        if type(command) is Revive and isinstance(answer, Answered):
            place = 0
            for span in answer.spans:
                if span.outcome is Outcome.SETTLED:
                    ids = command.ids.part(place, span.count)
                    yield RecordedEvent(index, 0, EventKind.REVIVED, ids, at_ms, by=command.by)
                place += span.count
