"""The schedules of the applications in an in-memory cluster, fired by the very driver of a node.

Nothing that the driver awaits takes time here, so its coroutines are run to their end where they are called: a test
may have an event loop of its own, and needs none.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from dedup.ids import TaskId
from node.schedules import ScheduleDriver
from oncekeeper.envelope import TaskBatch
from raft.commands import Answer, Command

if TYPE_CHECKING:
    from chaos.testing.cluster import InMemoryCluster


LATE_MS = 30_000  # as a node has it, unless it is configured otherwise


def at_once(work: Coroutine[Any, Any, None]) -> None:
    """Run what never waits, but to give others their turn."""
    try:
        while True:
            work.send(None)
    except StopIteration:
        pass


class Scheduling:
    """Whichever node is alive leads; with none alive, what falls due is missed."""

    def __init__(self, cluster: InMemoryCluster) -> None:
        self._cluster = cluster
        self.fired: dict[str, list[TaskId]] = {}
        """By handler: the tasks that its schedule has submitted, in their order."""
        self.trouble: dict[str, str] = {}
        self._driver = ScheduleDriver(
            cluster.ledger,
            node="test",
            late_ms=LATE_MS,
            wall_ms=lambda: cluster.wall_ms,
            is_leader=self._is_led,
            barrier=self._barrier,
            propose=self._propose,
            append=self._append,
            spawn=at_once,
            notes=self.trouble,
        )

    def declare(self) -> None:
        """An application came, with schedules perhaps."""
        self._driver.declare(self._cluster.infos)

    def turn(self) -> None:
        """Fire all that is due."""
        if self._is_led() and self._cluster.ledger.schedules:
            at_once(self._turn())

    @property
    def next_ms(self) -> int | None:
        """When something fires next, by the cluster's clock."""
        at_ms = self._driver.next_ms if self._is_led() else None
        return None if at_ms is None else self._cluster.now_ms + at_ms - self._cluster.wall_ms

    async def _turn(self) -> None:
        await self._driver.turn()

    def _is_led(self) -> bool:
        return any(self._cluster.nodes.values())

    async def _barrier(self) -> bool:
        return True

    async def _propose(self, commands: tuple[Command, ...]) -> tuple[Answer, ...]:
        return self._cluster.propose(commands)

    async def _append(self, batches: Sequence[TaskBatch]) -> None:
        self._cluster.append(batches)
        for batch in batches:
            self.fired.setdefault(batch.handler, []).extend(batch.ids)
