"""What a submitter holds of its tasks."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from dedup.ids import Ids, TaskId, id_text
from oncekeeper.errors import ResultLost

if TYPE_CHECKING:
    from oncekeeper.arguments import Signature
    from oncekeeper.client import Client
    from oncekeeper.dues import Delay

D = TypeVar("D")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
_RAISE: Any = object()


class Handle(Generic[R_co]):
    """One submitted task. ``id`` is the text form that the command line takes."""

    __slots__ = ("_client", "_signature", "task_id")

    def __init__(self, client: Client, task_id: TaskId, signature: Signature | None = None) -> None:
        self._client = client
        self._signature = signature
        self.task_id = task_id

    @property
    def id(self) -> str:
        return id_text(self.task_id)

    def status(self) -> str:
        """waiting, delayed, running, suspect, executed, dead or cancelled."""
        return str(self._client.task(self.task_id)["state"])

    @overload
    def result(self, timeout: float | None = None) -> R_co: ...
    @overload
    def result(self, timeout: float | None = None, *, default: D) -> R_co | D: ...
    def result(self, timeout: float | None = None, *, default: Any = _RAISE) -> Any:
        """What the handler returned. Waits up to ``timeout`` seconds (None: as long as it takes).

        Raises TaskFailed (dead letter), TaskCancelled or ResultTimeout; and ResultLost if the task took effect but
        what it returned is not known any more, unless there is a ``default`` for that, or the handler's
        annotation says that it returns None.
        """
        try:
            result = self._client.result(self.task_id, timeout)
        except ResultLost:
            if default is not _RAISE:
                return default
            if self._signature is not None and self._signature.returns_nothing:
                return None
            raise
        return self._signature.decode_result(result) if self._signature is not None else result

    def cancel(self) -> str:
        """Delete the task before it starts; its state afterwards. Refused if it runs or is in doubt."""
        return self._client.cancel(self.task_id)

    def reschedule(self, *, delay: Delay | None = None, due: datetime | None = None) -> datetime:
        """Let the task run ``delay`` from now, or at ``due``, and not at its time; that time.

        Refused if it runs, is about to, has ended, or was not delayed.
        """
        return self._client.reschedule(self.task_id, delay=delay, due=due)

    def retry(self) -> str:
        """Run a dead or cancelled task again; its state afterwards."""
        return self._client.retry(self.task_id)

    def why(self) -> dict[str, Any]:
        """The whole story of the task."""
        return self._client.why(self.task_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and other.task_id == self.task_id

    def __hash__(self) -> int:
        return hash(self.task_id)

    def __repr__(self) -> str:
        return f"<Handle {self.id}>"


class Handles(Sequence[Handle[R]]):
    """The handles of many tasks, in the order in which they were submitted; each is made when it is asked for."""

    def __init__(self, client: Client, parts: Sequence[Ids], signature: Signature | None = None) -> None:
        self._client = client
        self._signature = signature
        self.parts = tuple(part for part in parts if len(part))
        self._ends: list[int] = []
        for part in self.parts:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(part))

    def ids(self) -> Iterator[TaskId]:
        for part in self.parts:
            yield from part

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Handle[R]]:
        return (Handle(self._client, task_id, self._signature) for task_id in self.ids())

    @overload
    def __getitem__(self, at: int) -> Handle[R]: ...
    @overload
    def __getitem__(self, at: slice) -> Handles[R]: ...
    def __getitem__(self, at: int | slice) -> Handle[R] | Handles[R]:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step != 1:
                raise ValueError(f"step={step} must be 1: runs of ids stay runs")
            return Handles(self._client, self._between(start, stop), self._signature)
        place = at + len(self) if at < 0 else at
        if not 0 <= place < len(self):
            raise IndexError(f"{at} is not among {len(self)} handles")
        (part,) = self._between(place, place + 1)
        return Handle(self._client, next(iter(part)), self._signature)

    def _between(self, start: int, stop: int) -> list[Ids]:
        found: list[Ids] = []
        for number in range(bisect_right(self._ends, start), len(self.parts)):
            base = self._ends[number] - len(self.parts[number])
            if base >= stop:
                break
            low = max(start, base) - base
            found.append(self.parts[number].part(low, min(stop, self._ends[number]) - base - low))
        return found

    def __repr__(self) -> str:
        return f"<Handles of {len(self)} tasks>"


def program() -> str:
    """The name of this program, for people who ask who submitted a task."""
    return (sys.argv[0].rsplit("/", 1)[-1] if sys.argv else "") or "python"
