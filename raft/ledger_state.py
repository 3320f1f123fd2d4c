"""What the ledger holds, and the few moves by which it changes.

Every id that is neither new nor executed has one value in ``states``; executed ids are in ``executed``; every
other id is new. All changes of an id go through ``move`` and ``execute``, which keep the indexes and counters
beside that map in step and raise ``LedgerCorrupt`` when they are not: a ledger that contradicts itself must stop
its node before it grants a second start.

Nothing here reads a clock or draws a number, and whatever is iterated is iterated in an order that every replica
shares. The rules that decide which move to make are in the other ``ledger_*`` modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import msgspec

from dedup.claims import Cancelled, Dead, Held, OpenClaim, Waiting, cut, merged
from dedup.executed import ExecutedSet
from dedup.ids import KEY_BYTES, RANGE_ID_MAX, Ids
from dedup.runmap import RunMap
from dedup.suspects import Suspect
from raft.commands import Event, Outcome, Span, Timetable
from raft.ledger_tokens import Tokens

TaskValue = OpenClaim | Suspect | Waiting | Dead | Cancelled

NAME_CHARS_MAX = 256
TEXT_BYTES_MAX = 4096


class LedgerCorrupt(Exception):
    """An invariant is broken: this replica can no longer be trusted, and its node must stop."""


class BadInput(Exception):
    """A command breaks a rule; becomes a ``Rejected`` answer. Raised before anything was changed."""


class LedgerSettings(msgspec.Struct, frozen=True, array_like=True):
    """Bounds and spans of time. Part of the state: every replica of a cluster must have the same ones.

    Full rooms refuse what would enter them with a ``Rejected`` that names the setting; what leaves a room, or
    closes a claim, is always taken.
    """

    command_ids_max: int = 1_048_576
    commands_max: int = 4096  # in one proposal
    session_claims_max: int = 4_194_304  # open claims of one session, in ids
    entries_max: int = 8_388_608  # runs and keys that are neither new nor executed
    sessions_max: int = 1024
    nodes_max: int = 4096  # of which the incarnation is remembered; the longest gone is forgotten first
    range_ids_max: int = 1_048_576  # in one AllocateIds
    queues_max: int = 4096
    classes_max: int = 65_536
    schedules_max: int = 10_000
    schedule_bytes_max: int = 65_536
    session_timeout_ms_min: int = 50
    session_timeout_ms_max: int = 600_000
    advance_ms_max: int = 1000  # one Advance counts for no more
    retry_delay_ms_max: int = 400 * 86_400_000
    keyed_retention_ms: int = 35 * 86_400_000  # executed keyed ids
    closed_retention_ms: int = 35 * 86_400_000  # dead and cancelled ids, and retries that nobody claims
    tokens_per_proposer: int = 256
    token_spans_max: int = 1_048_576  # remembered answers of all proposers together, in spans
    proposers_max: int = 4096
    proposer_idle_ms: int = 3_600_000
    firings_max: int = 4096  # of all schedules together, decided and not yet in the task log


class Session(msgspec.Struct, frozen=True, array_like=True):
    """A live session. It lapses when ledger time reaches ``expires_ms``."""

    session: int
    node: str
    incarnation: int
    timeout_ms: int
    expires_ms: int
    consumes: bool
    http: str


class NodeSeen(msgspec.Struct, frozen=True, array_like=True):
    """The highest incarnation of a node, and when it joined last (ledger time)."""

    incarnation: int
    joined_ms: int


class QueueSetting(msgspec.Struct, frozen=True, array_like=True):
    paused: bool
    by: str
    since_ms: int


class HandlerClass(msgspec.Struct, frozen=True, array_like=True):
    kind: str
    length: str


class Schedule(msgspec.Struct, frozen=True, array_like=True):
    """Times are of the epoch, by the clocks of those who asked; ledger time knows no calendar."""

    timetable: Timetable
    owner: str
    by: str  # who changed it last
    paused: bool
    revision: int  # grows with every change of the timetable
    since_ms: int  # what was due up to this time never fires
    fired_ms: int = 0  # the latest time it fired or passed for; only grows
    fired: int = 0  # how often it fired
    missed: int = 0  # how many firings catch_up left out


class Firing(msgspec.Struct, frozen=True, array_like=True):
    """Decided, and perhaps not yet in the task log: the task as it was when the schedule fired."""

    name: str
    at_ms: int
    revision: int
    timetable: Timetable


class Counts(msgspec.Struct, frozen=True):
    """Numbers of ids. ``held`` suspects are among ``suspect``; ``retrying`` may be claimed again, now or later."""

    executed: int
    claimed: int
    suspect: int
    held: int
    dead: int
    cancelled: int
    retrying: int
    allocated: int


class LedgerState:
    """The mutable whole, owned by one ``Ledger``."""

    def __init__(self, bloom_seed: int, settings: LedgerSettings) -> None:
        self.bloom_seed = bloom_seed
        self.settings = settings
        self.index = 0
        self.now_ms = 0
        self.timekeeper = ""
        self.next_id = 1
        self.last_session = 0
        self.sessions: dict[int, Session] = {}
        self.session_of: dict[str, int] = {}
        self.nodes: dict[str, NodeSeen] = {}
        self.states: RunMap[TaskValue] = RunMap()
        self.executed = ExecutedSet(bloom_seed, settings.keyed_retention_ms)
        self.open: dict[int, Held] = {}
        self.suspects: dict[str, Held] = {}  # by the node that left them
        self.suspects_version = 0  # grows with every change of a suspect, for a listing that is cached
        self.queues: dict[str, QueueSetting] = {}
        self.classes: dict[str, HandlerClass] = {}
        self.schedules: dict[str, Schedule] = {}
        self.firings: dict[tuple[str, int], Firing] = {}
        self.tokens = Tokens(
            settings.tokens_per_proposer,
            settings.token_spans_max,
            settings.proposers_max,
            settings.proposer_idle_ms,
        )
        self.events: list[Event] = []  # of the proposal being applied
        self.retiring = Held()  # what is closed or waits, by the minute in which its retention ends
        self.numbers: dict[type[TaskValue], int] = {
            OpenClaim: 0,
            Suspect: 0,
            Waiting: 0,
            Dead: 0,
            Cancelled: 0,
        }
        self.held = 0

    # --- moves ------------------------------------------------------------------------------------------------

    def move(self, ids: Ids, count: int, old: TaskValue | None, new: TaskValue) -> None:
        """``ids`` (``count`` of them, each once) had the value ``old``, or were new; they get ``new``."""
        if old is not None:
            self._leave(count, old)
        self.states.set(ids, new)
        self.enter(ids, count, new)
        if old is not None:
            self._tidy(old)

    def amend(self, ids: Ids, count: int, old: Suspect, new: Suspect) -> None:
        """The suspects under ``ids`` stay, under the same fence, with more evidence or another holder."""
        self.states.set(ids, new)
        self.suspects_version += 1
        self.held += count * (bool(new.held_by) - bool(old.held_by))

    def execute(self, ids: Ids, count: int, old: TaskValue) -> None:
        """``ids`` (``count`` of them, each once) had the value ``old``; they are executed now."""
        self._leave(count, old)
        removed = self.states.remove(ids)
        self._tidy(old)
        added = self.executed.add(ids, self.now_ms)
        if removed != count or added != count:
            raise LedgerCorrupt(
                f"of {count} ids to execute, {removed} had a state and {added} were not executed"
            )

    def forget(self, ids: Ids, count: int, old: TaskValue) -> None:
        """``ids`` had the value ``old``; they are new again, because their retention is over."""
        self._leave(count, old)
        self.states.remove(ids)

    def enter(self, ids: Ids, count: int, new: TaskValue) -> None:
        """Count and index ``ids``, which ``states`` maps to ``new`` already."""
        self.numbers[type(new)] += count
        if isinstance(new, Suspect):
            self.suspects_version += 1
            if new.held_by:
                self.held += count
            if new.node not in self.suspects:
                self.suspects[new.node] = Held()
        held, key = self.home(new)
        held.add(key, ids, count)

    def _leave(self, count: int, old: TaskValue) -> None:
        kind = type(old)
        self.numbers[kind] -= count
        held, key = self.home(old)
        remain = held.drop(key, count)
        if isinstance(old, Suspect):
            self.suspects_version += 1
            if old.held_by:
                self.held -= count
            if held.count == 0:
                del self.suspects[old.node]
        if remain < 0 or self.numbers[kind] < 0:
            raise LedgerCorrupt(f"{count} ids leave {old}, which holds fewer")

    def home(self, value: TaskValue) -> tuple[Held, int]:
        """The index that lists the ids of this value, and under which number."""
        kind = type(value)
        if kind is OpenClaim:
            return self.open[value.session], value.fence  # type: ignore[union-attr]
        if kind is Suspect:
            return self.suspects[value.node], value.fence  # type: ignore[union-attr]
        return self.retiring, self.expiry_minute(value)  # type: ignore[arg-type]

    def _tidy(self, old: TaskValue) -> None:
        """Let go of what the index still lists although most of it has left."""
        if isinstance(old, Suspect) and old.node not in self.suspects:
            return
        held, key = self.home(old)
        if held.wasteful(key):
            held.relist(key, [part for part, _, _ in self.under(held, key)])

    def under(self, held: Held, key: int) -> Iterator[tuple[Ids, int, TaskValue]]:
        """The ids that are under ``key`` by the map, of those that the index ``held`` lists there; each once."""
        listed = merged(held.parts(key))
        for part, count, value in cut(listed, self.states.spans(listed)):
            if value is not None:
                at, number = self.home(value)
                if at is held and number == key:
                    yield part, count, value

    def expiry_minute(self, value: Waiting | Dead | Cancelled) -> int:
        since = value.due_ms if isinstance(value, Waiting) else value.at_ms
        return (since + self.settings.closed_retention_ms) // 60_000

    # --- questions --------------------------------------------------------------------------------------------

    def unknown(self, ids: Ids) -> Iterator[tuple[Ids, int, Outcome]]:
        """Of ids that have no value: EXECUTED, UNALLOCATED or NEW, in their order."""
        for part, count, executed in cut(ids, self.executed.spans(ids)):
            if executed:
                yield part, count, Outcome.EXECUTED
                continue
            if all(start + length <= self.next_id for start, length in part.runs):
                yield part, count, Outcome.NEW
                continue
            yield from self._allocation(part)

    def _allocation(self, ids: Ids) -> Iterator[tuple[Ids, int, Outcome]]:
        for start, length in ids.runs:
            known = min(length, max(0, self.next_id - start))
            if known:
                yield Ids(((start, known),)), known, Outcome.NEW
            if known < length:
                yield Ids(((start + known, length - known),)), length - known, Outcome.UNALLOCATED
        if ids.keys:
            yield Ids((), ids.keys), len(ids.keys), Outcome.NEW

    def counts(self) -> Counts:
        return Counts(
            executed=self.executed.count,
            claimed=self.numbers[OpenClaim],
            suspect=self.numbers[Suspect],
            held=self.held,
            dead=self.numbers[Dead],
            cancelled=self.numbers[Cancelled],
            retrying=self.numbers[Waiting],
            allocated=self.next_id - 1,
        )

    # --- rules of input ---------------------------------------------------------------------------------------

    def check_ids(self, field: str, ids: Ids) -> int:
        """The number of ids; BadInput when one is malformed or they are too many."""
        total = len(ids.keys)
        for start, count in ids.runs:
            if start < 1 or count < 1 or start + count - 1 > RANGE_ID_MAX:
                reject(f"{field}.runs: ({start}, {count}) must lie within 1 .. {RANGE_ID_MAX}, count >= 1")
            total += count
        if ids.keys:
            sizes = set(map(len, ids.keys))
            if sizes != {KEY_BYTES}:
                reject(f"{field}.keys: a key must have {KEY_BYTES} bytes, not {max(sizes - {KEY_BYTES})}")
        if total > self.settings.command_ids_max:
            reject(
                f"{field}: {total} ids are too many: at most command_ids_max={self.settings.command_ids_max}"
            )
        return total

    def check_room(self, field: str, ids: Ids) -> None:
        """BadInput when ``ids`` might not fit among the entries."""
        entries = self.states.runs + len(ids.runs) + len(ids.keys)
        if entries > self.settings.entries_max:
            reject(f"{field}: the ledger would hold {entries} entries, more than entries_max="
                   f"{self.settings.entries_max}: settle, rule or wait first")  # fmt: skip


def put(spans: list[Span], count: int, outcome: Outcome, fence: int = 0, detail: int = 0) -> None:
    """Append an answer for ``count`` ids, to the last span if it says the same."""
    if spans:
        last = spans[-1]
        if last.outcome is outcome and last.fence == fence and last.detail == detail:
            spans[-1] = Span(last.count + count, outcome, fence, detail)
            return
    spans.append(Span(count, outcome, fence, detail))


def reject(reason: str) -> NoReturn:
    raise BadInput(reason)


def check_number(field: str, number: int, low: int, high: int) -> None:
    if not low <= number <= high:
        reject(f"{field}={number} must be from {low} to {high}")


def check_name(field: str, name: str) -> None:
    if not 1 <= len(name) <= NAME_CHARS_MAX or not name.isprintable():
        reject(f"{field} must be 1 to {NAME_CHARS_MAX} printable characters")


def check_text(field: str, text: str, bytes_max: int = TEXT_BYTES_MAX) -> None:
    """Free text, maybe empty; it must be encodable, for the snapshot's sake."""
    if len(text) > bytes_max or len(text.encode(errors="replace")) > bytes_max:
        reject(f"{field} has {len(text)} characters: at most {bytes_max} bytes are allowed")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        reject(f"{field} holds a surrogate, which is no character")
