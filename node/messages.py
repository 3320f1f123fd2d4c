"""What the coordinator is told (events) and what it asks for (effects). Frozen data; see coordinator.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from node.dues import EnqueueDue as EnqueueDue
from node.dues import FetchDue as FetchDue
from node.dues import LoadDue as LoadDue
from node.records_model import Attempt
from node.workers.port import HandlerInfo, Report, Work
from oncekeeper.log.delayed import Deferral, Delayed, Place
from oncekeeper.log.port import Aside, Fetched, Item, Undecodable
from raft.commands import Answer, Command

# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The ledger opened a session for this node; claims may be made in its name."""

    session: int


@dataclass(frozen=True, slots=True)
class SessionLost:
    """The node fenced itself, or the ledger says that the session is gone. Nothing is claimed until the next."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """The partitions that this node owns now, each with its committed position."""

    positions: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class HandlersKnown:
    """What the application registers, and how many tasks each kind of pool runs at once."""

    handlers: Mapping[str, HandlerInfo]
    slots: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class WasRead:
    """The answer to Read. ``next_offset`` is where the next read starts; ``exhausted``: no more is there."""

    partition: int
    epoch: int
    items: tuple[Item, ...]
    next_offset: int
    exhausted: bool


@dataclass(frozen=True, slots=True)
class MoreToRead:
    """Something was appended to these partitions; None: perhaps, to any."""

    partitions: frozenset[int] | None


@dataclass(frozen=True, slots=True)
class Answers:
    """The answer to Propose."""

    ticket: int
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Reported:
    reports: tuple[Report, ...]


@dataclass(frozen=True, slots=True)
class AsideStored:
    """The answer to StoreAside."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The answer to Confirm: the ledger here knows all that was acknowledged anywhere before the question."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Deferred:
    """The answer to Defer."""

    ticket: int


@dataclass(frozen=True, slots=True)
class DelayedMoved:
    """The answer to MoveDelayed."""

    ticket: int


@dataclass(frozen=True, slots=True)
class DueLoaded:
    load: LoadDue
    rows: tuple[Delayed, ...]


@dataclass(frozen=True, slots=True)
class DueFetched:
    fetch: FetchDue
    found: tuple[tuple[Delayed, Fetched | Undecodable], ...]


@dataclass(frozen=True, slots=True)
class DueEnqueued:
    """The answer to EnqueueDue; the partitions grew. ``left``: what cannot be decoded, and so not be appended."""

    enqueue: EnqueueDue
    partitions: frozenset[int]
    left: tuple[tuple[Delayed, Fetched | Undecodable], ...] = ()


@dataclass(frozen=True, slots=True)
class LookedUp:
    """The answer to LookUp: what stands at these places, whatever time it waits for."""

    ticket: int
    rows: tuple[Delayed, ...]


@dataclass(frozen=True, slots=True)
class DelaysChanged:
    """Somebody moved delayed tasks of these partitions: what is known of them may be wrong."""

    partitions: frozenset[int]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed, or the ledger changed in a way that may free what waits."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Claim nothing more; what runs may finish."""


Event = (
    SessionOpened | SessionLost | Assigned | HandlersKnown | WasRead | MoreToRead | Answers | Reported
    | AsideStored | Confirmed | Deferred | DelayedMoved | DueLoaded | DueFetched | DueEnqueued | LookedUp
    | DelaysChanged | Tick | Drain
)  # fmt: skip


# --- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    partition: int
    epoch: int
    offset: int
    tasks_max: int


@dataclass(frozen=True, slots=True)
class Propose:
    """Ask the ledger; where the outcome is unknown, ask again with the same token until it is known."""

    ticket: int
    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Dispatch:
    work: Work


@dataclass(frozen=True, slots=True)
class StoreAside:
    ticket: int
    tasks: tuple[Aside, ...]


@dataclass(frozen=True, slots=True)
class Confirm:
    """Make sure that the ledger here is not behind."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Defer:
    """Keep these until they are due, durably (``log.delays.defer``): then their position may pass them."""

    ticket: int
    tasks: tuple[Deferral, ...]


@dataclass(frozen=True, slots=True)
class MoveDelayed:
    """``log.delays.move`` of each: (places, the new due time, the one that they waited for)."""

    ticket: int
    moves: tuple[tuple[tuple[Place, ...], int, int], ...]


@dataclass(frozen=True, slots=True)
class LookUp:
    """Ask the store (``log.delays.standing``) for what is due by its message: it may have been rescheduled."""

    ticket: int
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Remember:
    """For the work history."""

    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """The ledger knows how these tasks of a Work ended: the work journal may forget them."""

    number: int
    at: int
    count: int


Effect = (
    Read | Propose | Dispatch | StoreAside | Confirm | Remember | Release
    | Defer | MoveDelayed | LoadDue | FetchDue | EnqueueDue | LookUp
)  # fmt: skip
