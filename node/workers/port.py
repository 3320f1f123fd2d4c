"""What passes between the node's loop and its worker pools.

Work is handed over in batches and reported back in batches. A ``Work`` is some neighbours of one claim: one
handler, one fence, one attempt. Positions inside a Work are 0 .. len(bodies) - 1, in the order of its ids.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from dedup.ids import Ids


class Mode(IntEnum):
    RUN = 1
    CHECK = 2  # run the handler's check strategy: did it already happen?
    VALIDATE = 3  # only decode the body to the handler's types


class HandlerInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a node must know of a handler; it comes from a worker, which alone imports the application."""

    name: str
    kind: str  # "cpu" or "io"
    length: str  # "short" or "long"
    is_async: bool
    ttr_ms: int
    retries: int
    retry_delay_ms: int
    retry_delay_ms_max: int
    on_doubt: str  # "rerun", "check", "skip", "hold"
    queue: str
    schedule: str = ""  # a cron line, or "every 10s", if the code declares one
    tz: str = ""
    catch_up: str = "latest"


class Work(msgspec.Struct, frozen=True):
    number: int  # unique within the life of a node process
    mode: Mode
    handler: str
    ids: Ids
    fence: int
    attempt: int
    ttr_ms: int
    bodies: tuple[bytes, ...]  # each one a JSON text, never decoded by the node
    traceparent: str = ""
    due_ms: int = 0  # epoch; 0: it was not delayed


class Ended(IntEnum):
    """How a task (or a check) ended in its worker."""

    DONE = 1
    RAISED = 2  # the handler raised: it may be tried again
    # The body does not fit the handler's types, the handler is unknown, or breaks a rule: no use trying again.
    INVALID = 3
    CRASHED = 4  # the process died, or was killed, after this task had started: in doubt
    TIMED_OUT = 5  # killed at its time-to-run: in doubt
    NOT_STARTED = 6  # the process died, or was killed, before this task had started
    TRUE = 7  # CHECK: it happened
    FALSE = 8  # CHECK: it did not
    UNSURE = 9  # CHECK: cannot tell (also: the check raised)


class Part(msgspec.Struct, frozen=True, array_like=True):
    """``count`` tasks of a Work, from position ``at``, that ended alike."""

    at: int
    count: int
    ended: Ended
    results: tuple[bytes, ...] | None = None  # JSON texts; None where every result was null
    error: str = ""  # RAISED, INVALID, CRASHED, TIMED_OUT, UNSURE, NOT_STARTED: a line for people;
    # with DONE: why there is no result (too large, no JSON, lost with its worker): the task is done all the same
    trace: str = ""  # the traceback, shortened, where the handler raised


class Report(msgspec.Struct, frozen=True):
    """Some or all tasks of a Work ended. A Work may be reported in several parts; each position exactly once."""

    number: int
    parts: tuple[Part, ...]
    started_ms: int  # epoch, of the first task in it; 0: unknown (the worker died)
    ended_ms: int  # epoch, of the last
    busy_us: int  # time spent in the handler, summed; 0: unknown (the worker died)
    pid: int
