"""What a handler may know of the task it runs."""

from __future__ import annotations

from contextvars import ContextVar, Token

import msgspec

from dedup.ids import TaskId, id_text
from oncekeeper.errors import OncekeeperError


class CurrentTask(msgspec.Struct, frozen=True):
    """The task that runs. ``fence`` grows with every claim of it: a sink that remembers the highest fence it has
    seen, and refuses a lower one, is safe from a holder that lost its claim and does not know it yet."""

    id: TaskId
    handler: str
    fence: int
    attempt: int = 1
    queue: str = "default"
    due_ms: int = 0
    """When it was due by its message (epoch); 0: it was not delayed."""

    @property
    def id_text(self) -> str:
        """The id as the command line shows it."""
        return id_text(self.id)


_current: ContextVar[CurrentTask | None] = ContextVar("oncekeeper_current_task", default=None)


def current_task() -> CurrentTask:
    """The task that runs here; OncekeeperError outside of a handler."""
    task = _current.get()
    if task is None:
        raise OncekeeperError("current_task() has an answer only while a worker runs a handler")
    return task


def running_task() -> CurrentTask | None:
    """The task that runs here, or None."""
    return _current.get()


def enter(task: CurrentTask) -> Token[CurrentTask | None]:
    """For workers: ``task`` runs in this context until ``leave``."""
    return _current.set(task)


def leave(token: Token[CurrentTask | None]) -> None:
    _current.reset(token)
