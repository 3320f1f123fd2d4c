"""Rescheduling in an in-memory cluster, by the very steps of a node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from chaos.testing.loops import beside_the_loop
from dedup.ids import TaskId
from node.rescheduling import Rescheduled, Rescheduling
from oncekeeper.log.port import TaskLog
from raft.commands import Answer, Command

if TYPE_CHECKING:
    from chaos.testing.cluster import InMemoryCluster

T = TypeVar("T")


def rescheduled(cluster: InMemoryCluster, task_id: TaskId, due_ms: int) -> bool:
    """Whether it runs by its new time now. Nodes that are dead need not be told."""

    async def propose(commands: tuple[Command, ...], timeout_ms: int) -> tuple[Answer, ...]:
        return cluster.propose(commands)

    async def barrier(timeout_ms: int) -> None:
        pass

    async def with_log(work: Callable[[TaskLog], T]) -> T:
        return work(cluster.log)

    async def tell(node: str, partitions: frozenset[int]) -> bool:
        if cluster.nodes[node]:
            cluster.tell(node, partitions)
        return True

    steps = Rescheduling(
        cluster.ledger,
        propose=propose,
        barrier=barrier,
        with_log=with_log,
        tell=tell,
        wall_ms=lambda: cluster.wall_ms,
    )
    return beside_the_loop(lambda: asyncio.run(steps.reschedule(task_id, due_ms))) == Rescheduled()
