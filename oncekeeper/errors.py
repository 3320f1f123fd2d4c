"""Everything that Oncekeeper raises at its users, in one small hierarchy.

``except OncekeeperError`` catches all of it. Messages name the field and the rule, or the file and what to
do about it.
"""

from __future__ import annotations


class OncekeeperError(Exception):
    """The root of all errors of this package."""


class InvalidTask(OncekeeperError, ValueError):
    """A task that cannot be taken: ``field`` is what is wrong, ``rule`` is what it must obey."""

    def __init__(self, field: str, rule: str, where: str = "") -> None:
        self.field = field
        self.rule = rule
        self.where = where
        super().__init__(f"{where}: {field}: {rule}" if where else f"{field}: {rule}")


class InvalidSchedule(OncekeeperError, ValueError):
    """A schedule that cannot work: ``field`` is what is wrong, ``rule`` is what it must obey."""

    def __init__(self, field: str, rule: str) -> None:
        self.field = field
        self.rule = rule
        super().__init__(f"{field}: {rule}")


class InvalidHandler(OncekeeperError, TypeError):
    """A function that cannot be a handler as it was declared."""


class ApplicationError(OncekeeperError):
    """An application that cannot be loaded, or that is not complete."""


class UnencodableResult(OncekeeperError, TypeError):
    """A handler returned what has no JSON form. Its effect may well have happened."""


class LogUnusable(OncekeeperError):
    """A task log that cannot be opened: missing, of another cluster, of a newer format, or damaged."""


class NoCluster(OncekeeperError):
    """No cluster was named, or what was named is no cluster."""


class ClusterUnreachable(OncekeeperError):
    """No node of the cluster answers. ``maybe``: one of them may have done what was asked all the same."""

    maybe = False


class SubmitFailed(OncekeeperError):
    """Surely nothing of this call was stored, but for the tasks in ``submitted`` (``submit_many`` only)."""

    submitted: object = None


class UnknownSubmit(OncekeeperError):
    """The tasks may or may not have been stored. Submitting ``ids`` again is safe: they run once."""

    def __init__(self, text: str, ids: object = None) -> None:
        super().__init__(text)
        self.ids = ids
        self.submitted: object = None


class Refused(OncekeeperError):
    """A node answered that it will not do this: ``status`` is the HTTP status, ``field`` what is wrong."""

    def __init__(self, text: str, status: int = 0, field: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.field = field


class UnknownTask(Refused):
    """The cluster knows no task of this id."""


class ResultTimeout(OncekeeperError, TimeoutError):
    """The task had not ended within the given time. It goes on."""


class TaskFailed(OncekeeperError):
    """The task ended without a result: ``state`` is "dead" or "cancelled"."""

    def __init__(self, text: str, state: str = "dead") -> None:
        super().__init__(text)
        self.state = state


class TaskCancelled(TaskFailed):
    """The task was cancelled before it started."""

    def __init__(self, text: str) -> None:
        super().__init__(text, "cancelled")


class ResultLost(OncekeeperError):
    """The task took effect, once; what it returned is not known any more.

    Its worker or node died before it could tell, and evidence settled the task; or its history is gone; or what
    it returned could not be kept (no JSON form, too large).
    """


class AlreadyExecuted(OncekeeperError):
    """The task's mark stands already: the transaction was rolled back; the task is done, by evidence."""


class SecondTransaction(OncekeeperError):
    """A handler with ``checks.sql`` tried to commit twice; one mark cannot tell of two transactions."""
