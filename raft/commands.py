"""The words of the ledger: commands in, answers and events out.

Everything here is frozen data. Commands travel in batches inside a ``Proposal``; the codec (raft/codec.py) turns
a proposal into versioned bytes. Answers run parallel to commands; what concerns many ids is run-length encoded
as ``Span``s over the order of ``Ids`` (dedup/ids.py), so that a batch of neighbours costs a few operations.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from dedup.ids import Ids


class Outcome(IntEnum):
    """What the ledger says of one id. Values are part of the format: never renumber."""

    GRANTED = 1  # fence = the claim's fence; detail = the attempt to run, from 1
    EXECUTED = 2  # closed for good
    HELD = 3  # a live session has it; detail = that session
    SUSPECT = 4  # fence = the lost claim's fence
    CANCELLED = 5
    DEAD = 6
    STALE = 7  # the claim names an attempt other than the next; detail = the next attempt
    EARLY = 8  # a retry that is not due, or an id that this entry freed; detail = ms of ledger time to wait
    UNALLOCATED = 9  # a range id outside every allocated range
    LAPSED = 10  # the session is not live (a settle: what it said became testimony)
    FENCED = 11  # a settle, testimony or ruling names another fence than the ledger holds
    SETTLED = 12  # the settle, testimony or ruling was taken
    NEW = 13  # never claimed (answers of reads only), or: nothing there to act on
    BUSY = 14  # a cancel or revive came while a claim is open or a suspect is unresolved


class Result(IntEnum):
    """How a claim is closed by its holder."""

    DONE = 1
    RETRY = 2  # another attempt is allowed after delay_ms of ledger time
    DEAD = 3  # given up: dead letter
    DOUBT = 4  # the holder lives but cannot tell (its worker process died in the effect): a suspect
    RELEASED = 5  # never started: given back, the attempt does not count


class Fact(IntEnum):
    """What a holder's work journal says of a claim."""

    NEVER_STARTED = 1
    STARTED = 2
    FINISHED = 3
    FAILED = 4  # the handler raised: it ended, and did not take effect by its own account


class Verdict(IntEnum):
    """What closes a suspect."""

    EXECUTED = 1
    NOT_EXECUTED = 2
    HELD = 3  # stays a suspect, for a human


class Span(msgspec.Struct, frozen=True, array_like=True):
    """The same answer for ``count`` ids in a row."""

    count: int
    outcome: Outcome
    fence: int = 0
    detail: int = 0


# --- commands -------------------------------------------------------------------------------------------------


class Join(msgspec.Struct, frozen=True, array_like=True, tag="J"):
    """Open a session for this incarnation of a node; an older incarnation's session is closed."""

    node: str
    incarnation: int  # grows with every start of the node
    timeout_ms: int  # ledger time without a heartbeat after which the session lapses
    consumes: bool = True  # whether the node takes part in the ownership of partitions
    http: str = ""  # where peers reach its HTTP API


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag="H"):
    session: int


class Leave(msgspec.Struct, frozen=True, array_like=True, tag="L"):
    session: int


class Advance(msgspec.Struct, frozen=True, array_like=True, tag="A"):
    """The only clock. The leader adds its own monotonic elapsed time; the ledger caps a step.

    The first one of another timekeeper than the last takes over and adds nothing: no time may count twice.
    """

    timekeeper: str
    elapsed_ms: int


class AllocateIds(msgspec.Struct, frozen=True, array_like=True, tag="I"):
    count: int


class Claim(msgspec.Struct, frozen=True, array_like=True, tag="C"):
    session: int
    ids: Ids
    attempt: int = 0  # 0: whichever is next


class Settlement(msgspec.Struct, frozen=True, array_like=True):
    fence: int
    ids: Ids
    result: Result
    delay_ms: int = 0  # RETRY only


class Settle(msgspec.Struct, frozen=True, array_like=True, tag="S"):
    """Answered by one Span list over all settlements' ids, in order."""

    session: int
    settlements: tuple[Settlement, ...]


class Testimony(msgspec.Struct, frozen=True, array_like=True):
    fence: int
    ids: Ids
    fact: Fact


class Testify(msgspec.Struct, frozen=True, array_like=True, tag="T"):
    """Accepted from the claim's own node only, about suspects that this or an earlier incarnation of it left.

    One word an incarnation, id and fence: another one than the first is FENCED.
    """

    node: str
    incarnation: int
    testimonies: tuple[Testimony, ...]


class Rule(msgspec.Struct, frozen=True, array_like=True, tag="R"):
    """Close suspects (or hold them for a human). ``fence`` 0 rules whatever suspect stands under the id.

    NOT_EXECUTED allows the next attempt at once.
    """

    ids: Ids
    verdict: Verdict
    by: str  # "check", "policy:rerun", "human:NAME", ...
    reason: str = ""
    fence: int = 0


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="X"):
    """Delete before start. SETTLED: it will never start."""

    ids: Ids
    by: str = ""


class Revive(msgspec.Struct, frozen=True, array_like=True, tag="V"):
    """Allow a dead or cancelled id to run again, from attempt 1 (a manual retry)."""

    ids: Ids
    by: str = ""


class Hold(msgspec.Struct, frozen=True, array_like=True, tag="O"):
    """Grant nobody what has not started for ``hold_ms`` of ledger time; 0 takes that back, and a retry's delay.

    SETTLED: so it is, and it had not started. A reschedule lasts that long: what was fetched by its old due time
    cannot be claimed meanwhile.
    """

    ids: Ids
    hold_ms: int


class PutQueue(msgspec.Struct, frozen=True, array_like=True, tag="Q"):
    queue: str
    paused: bool
    by: str = ""


class PutClass(msgspec.Struct, frozen=True, array_like=True, tag="K"):
    """A learned class of a handler."""

    handler: str
    kind: str  # "cpu" or "io"
    length: str  # "short" or "long"


class Timetable(msgspec.Struct, frozen=True, array_like=True):
    """When a schedule fires, and the task that each firing is. The ledger bounds it, and reads nothing in it."""

    when: str  # a cron line, or "every 10s" (oncekeeper/schedules.py)
    zone: str  # an IANA name; "" for an interval, which needs none
    handler: str
    queue: str
    body: bytes  # a JSON text
    ttr_ms: int = 0  # 0: the handler's own
    catch_up: str = "latest"  # what becomes of missed firings: "none", "latest", "all"


class PutSchedule(msgspec.Struct, frozen=True, array_like=True, tag="P"):
    """Make a schedule, or change it. Who owns it alone may: the application's code, or people by hand.

    Nothing that was due up to ``now_ms`` fires by a new ``when`` or ``zone``.
    """

    name: str
    timetable: Timetable
    owner: str  # "code" or "hand"
    by: str
    now_ms: int  # epoch, by the clock of whoever asks


class DeleteSchedule(msgspec.Struct, frozen=True, array_like=True, tag="D"):
    """Done too where there is none; Rejected where another owns it. What has fired still runs."""

    name: str
    owner: str
    by: str = ""


class PauseSchedule(msgspec.Struct, frozen=True, array_like=True, tag="U"):
    """Fire no more, or again from ``now_ms`` on: what was due during a pause is not missed, it is not wanted."""

    name: str
    paused: bool
    by: str
    now_ms: int


class Fire(msgspec.Struct, frozen=True, array_like=True, tag="F"):
    """A schedule fires for the time ``at_ms`` (epoch): Done once for a time, and Stale ever after.

    The ledger keeps the firing, with the task that it is, until ``Launched`` says that this task is in the log: so
    whoever leads next can finish what one that died has begun, and what the schedule says by then is no matter.
    """

    name: str
    revision: int  # of the schedule as it was read
    at_ms: int
    runs: bool = True  # False: the time only passes, by catch_up
    missed: int = 0  # firings that catch_up leaves out along with this one


class Launched(msgspec.Struct, frozen=True, array_like=True, tag="N"):
    """The firing's task is durably in the task log."""

    name: str
    at_ms: int


Command = (
    Join | Heartbeat | Leave | Advance | AllocateIds | Claim | Settle | Testify | Rule | Cancel | Revive
    | Hold | PutQueue | PutClass | PutSchedule | DeleteSchedule | PauseSchedule | Fire | Launched
)  # fmt: skip


class Proposal(msgspec.Struct, frozen=True, array_like=True):
    """What one log entry holds. (proposer, sequence) is the token: proposed again, it gets its first answers."""

    proposer: int  # unsigned 64 bits, drawn at random at each start of a proposer
    sequence: int  # from 1, without gaps
    commands: tuple[Command, ...]


# --- answers --------------------------------------------------------------------------------------------------


class Joined(msgspec.Struct, frozen=True, array_like=True, tag="j"):
    session: int
    now_ms: int


class Renewed(msgspec.Struct, frozen=True, array_like=True, tag="h"):
    now_ms: int


class Gone(msgspec.Struct, frozen=True, array_like=True, tag="g"):
    """The session is not live (any more)."""

    session: int


class Advanced(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    now_ms: int


class Allocated(msgspec.Struct, frozen=True, array_like=True, tag="i"):
    start: int
    count: int


class Answered(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """The answer to everything that concerns ids; the counts sum to the command's number of ids."""

    spans: tuple[Span, ...]


class Done(msgspec.Struct, frozen=True, array_like=True, tag="d"):
    """Taken (Leave, Put..., Fire the first time)."""


class Stale(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    """Nothing fired: it has for this time or a later one, or the schedule is gone, paused, or another by now."""


class Rejected(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """Bad input: nothing was changed. ``reason`` names the field and the rule."""

    reason: str


Answer = Joined | Renewed | Gone | Advanced | Allocated | Answered | Done | Stale | Rejected


# --- events: what applying a proposal changed, beyond its answers -----------------------------------------------


class SessionOpened(msgspec.Struct, frozen=True, array_like=True, tag="so"):
    session: int
    node: str
    incarnation: int


class SessionClosed(msgspec.Struct, frozen=True, array_like=True, tag="sc"):
    session: int
    node: str
    incarnation: int
    why: str  # "left", "lapsed", "replaced"


class Suspected(msgspec.Struct, frozen=True, array_like=True, tag="su"):
    ids: Ids
    fence: int
    node: str  # the claim's holder
    incarnation: int
    why: str  # "lapsed", "replaced", "left", "doubt"


class Testified(msgspec.Struct, frozen=True, array_like=True, tag="te"):
    ids: Ids
    fence: int
    node: str
    fact: Fact


class Resolved(msgspec.Struct, frozen=True, array_like=True, tag="re"):
    """A suspect was closed, or held for a human."""

    ids: Ids
    fence: int
    verdict: Verdict
    by: str  # "testimony", or Rule.by
    reason: str


class Freed(msgspec.Struct, frozen=True, array_like=True, tag="fr"):
    """Ids that may be claimed (again): revived, released, or set to retry."""

    ids: Ids


class Deleted(msgspec.Struct, frozen=True, array_like=True, tag="de"):
    """Cancelled before they started."""

    ids: Ids
    by: str


class QueueChanged(msgspec.Struct, frozen=True, array_like=True, tag="qc"):
    queue: str
    paused: bool


class ScheduleChanged(msgspec.Struct, frozen=True, array_like=True, tag="sh"):
    """It was put, changed, deleted, paused or resumed, or a firing of it was decided."""

    name: str


Event = (
    SessionOpened | SessionClosed | Suspected | Testified | Resolved | Freed | Deleted | QueueChanged
    | ScheduleChanged
)  # fmt: skip


class Effects(msgspec.Struct, frozen=True):
    """What ``Ledger.apply`` returns."""

    index: int
    proposal: Proposal
    answers: tuple[Answer, ...]
    events: tuple[Event, ...]
    repeated: bool = False  # the token was known: these are its first answers, and nothing changed
