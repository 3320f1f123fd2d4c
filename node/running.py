"""The running node as the HTTP layer sees it: ``NodeFacade`` over the parts that ``Service`` holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dedup.ids import TaskId
from node.facade import LocalStatus, NodeIdentity, PartitionStatus, PeerAnswer, Unavailable
from node.records import Records
from node.workers.events import WorkerStartError
from node.workers.port import HandlerInfo
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.port import Appended, TaskLog
from raft.commands import Answer, Command
from raft.ledger import Ledger

if TYPE_CHECKING:
    from node.service import Service

T = TypeVar("T")


class RunningNode:
    def __init__(self, service: Service) -> None:
        self._service = service
        config = service.config
        self._peer_addresses = {
            name: str(peer.http) for name, peer in config.peers.items() if name != config.node_id
        }

    @property
    def identity(self) -> NodeIdentity:
        service, config = self._service, self._service.config
        return NodeIdentity(
            node=config.node_id,
            cluster_id=config.cluster_id,
            incarnation=service.incarnation,
            version=version("oncekeeper"),
            pid=os.getpid(),
            started_ms=service.started_ms,
            app=config.app,
            app_dir=str(config.app_dir),
            data_dir=str(config.data_dir),
            log=config.log,
            partitions=service.log.reader.partitions,
            raft=str(config.raft),
            http=str(config.http),
            session_timeout_ms=config.session_timeout_ms,
            fence_margin_ms=config.fence_margin_ms,
        )

    @property
    def ledger(self) -> Ledger:
        return self._service.ledger

    @property
    def records(self) -> Records:
        return cast(Records, self._service.records)  # HTTP is served on real parts only

    @property
    def handlers(self) -> Mapping[str, HandlerInfo]:
        return self._service.pools.handlers

    @property
    def peers(self) -> Mapping[str, str]:
        return self._peer_addresses

    def local_status(self) -> LocalStatus:
        service = self._service
        replica = service.replica.status()
        views = service.coordinator.partition_views()
        keeper = service.session
        return LocalStatus(
            node=service.config.node_id,
            incarnation=service.incarnation,
            session=keeper.session,
            role=replica.role,
            leader=replica.leader,
            term=replica.term,
            applied_index=replica.applied_index,
            lease_left_ms=keeper.lease.left_ms(self._service.clock.lease_ms()),
            takes_work=service.takes_work,
            pid=os.getpid(),
            partitions=tuple(
                PartitionStatus(
                    partition=view.partition,
                    position=view.position,
                    frontier=view.frontier,
                    waiting=view.waiting,
                    delayed=view.delayed,
                    running=view.running,
                    suspect=view.suspect,
                    in_hand=view.in_hand,
                )
                for view in views
            ),
            running=service.coordinator.running_tasks,
            tasks_settled=service.coordinator.settled_tasks,
            workers=service.worker_counts(),
            refused=dict(replica.refused),
            notes=service.all_notes(),
        )

    async def propose(self, commands: tuple[Command, ...], timeout_ms: int) -> tuple[Answer, ...]:
        return (await self._service.proposer.propose(commands, timeout_ms)).answers

    async def barrier(self, timeout_ms: int) -> None:
        await self._service.barrier(timeout_ms)

    async def validate(self, handler: str, bodies: Sequence[bytes]) -> tuple[int, str] | None:
        try:
            return await self._service.pools.validate(handler, bodies)
        except WorkerStartError as error:  # as when the lease runs out, and all workers are killed
            raise Unavailable(str(error)) from error

    async def append(self, batches: Sequence[TaskBatch]) -> list[Appended]:
        appended = await self._service.log.run(lambda log: log.append(batches))
        self._service.parts.wake.wake({place.partition for place in appended})
        return appended

    async def with_log(self, work: Callable[[TaskLog], T]) -> T:
        return await self._service.log.look(work)

    async def ask_peer(
        self, node: str, method: str, path: str, body: Any = None, *, timeout_ms: int = 1500
    ) -> PeerAnswer:
        answer: PeerAnswer = await self._service.parts.ask_peer(
            node, method, path, body, timeout_ms=timeout_ms
        )
        return answer

    def skip(self, partition: int) -> bool:
        group = self._service.log.group
        return group is not None and group.skip(partition)

    async def delays_changed(self, partitions: frozenset[int], timeout_ms: int) -> bool:
        return await self._service.delays.changed(partitions, timeout_ms)

    async def wait_settled(self, task_id: TaskId, timeout_ms: int) -> bool:
        return await self._service.settled.wait(task_id, timeout_ms)
