"""The client of an in-memory cluster: applications submit through it as through the real one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from dedup.ids import Ids, TaskId, id_text
from node.why import story
from oncekeeper.client import Client
from oncekeeper.cluster import Cluster
from oncekeeper.envelope import TaskBatch
from oncekeeper.errors import InvalidTask, ResultLost, ResultTimeout, TaskCancelled, TaskFailed
from oncekeeper.idsource import IdSource
from raft.commands import Allocated, AllocateIds

if TYPE_CHECKING:
    from chaos.testing.cluster import InMemoryCluster


class _Ids(IdSource):
    """Just as many as are wanted, so that ids are 1, 2, 3, ..."""

    def take(self, count: int) -> Ids:
        return Ids((self._fetch(count),))


class InMemoryClient(Client):
    def __init__(self, memory: InMemoryCluster) -> None:
        self._memory = memory
        super().__init__(Cluster(directory=None, urls=("memory",), token=""))

    def _start(self) -> None:
        super()._start()
        self._ids = _Ids(self._allocate)
        self._by = "a test"

    def _allocate(self, count: int) -> tuple[int, int]:
        (answer,) = self._memory.propose((AllocateIds(count),))
        assert isinstance(answer, Allocated)
        return answer.start, answer.count

    def _post(self, batches: Sequence[TaskBatch], ids: Ids) -> None:
        at_ms = self._memory.wall_ms
        self._memory.append(msgspec.structs.replace(batch, submitted_ms=at_ms) for batch in batches)

    def queue_of(self, handler: str) -> str:
        info = self._memory.infos.get(handler)
        if info is None:
            names = ", ".join(sorted(self._memory.infos)) or "none"
            raise InvalidTask("handler", f"{handler!r} is not registered; this cluster has: {names}")
        return info.queue

    def task(self, task_id: TaskId) -> dict[str, Any]:
        facts = self._memory.describe(task_id)
        return {"id": id_text(task_id), "state": facts.state, "handler": facts.handler, "queue": facts.queue}

    def why(self, task_id: TaskId) -> dict[str, Any]:
        return self.task(task_id) | {"story": story(self._memory.describe(task_id))}

    def cancel(self, task_id: TaskId) -> str:
        self._memory.cancel(task_id)
        return self._memory.status(task_id)

    def wall_ms(self) -> int:
        return self._memory.wall_ms

    def _reschedule(self, task_id: TaskId, due_ms: int) -> None:
        self._memory.reschedule(task_id, due_ms)

    def retry(self, task_id: TaskId) -> str:
        self._memory.retry(task_id)
        return self._memory.status(task_id)

    def result(self, task_id: TaskId, timeout_s: float | None = None) -> Any:
        """Runs the cluster until the task has ended; ``timeout_s`` is virtual."""
        memory, text = self._memory, id_text(task_id)
        memory.describe(task_id)  # UnknownTask
        memory.run_until_settled(task_id, timeout_s)
        match memory.status(task_id):
            case "executed":
                attempt = memory.finished(task_id)
                if attempt is None or (attempt.error and not attempt.results):
                    note = (
                        attempt.error if attempt is not None else "evidence settled it, and nobody reported"
                    )
                    raise ResultLost(f"task {text} took effect; its result is lost: {note}")
                return msgspec.json.decode(attempt.results[0]) if attempt.results else None
            case "dead":
                errors = [each.error for each in memory.describe(task_id).attempts if each.error]
                reason = errors[-1] if errors else memory.describe(task_id).aside_reason
                raise TaskFailed(f"task {text} is dead: {reason}")
            case "cancelled":
                raise TaskCancelled(f"task {text} was cancelled before it started")
            case state:
                told = " ".join(story(memory.describe(task_id))[-1:])
                raise ResultTimeout(f"task {text} is {state}: {told}")
