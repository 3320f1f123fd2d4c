"""The running node: the one loop where all parts meet.

    replica --applied--> records, ownership, coordinator        pools --reports--> coordinator
    coordinator --effects--> replica, pools, log, records        wake, ticks ----> coordinator

The coordinator decides and this module performs, on one event loop; what would block it runs in the log's
thread, the records' thread, or the workers. It starts in the order in which it may be trusted: first the replica
catches up, then the journals of former lives are read, and only with a session of its own does it take work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any

from node import messages as m
from node.assigning import Assigning
from node.committing import Committing
from node.coordinator import Coordinator
from node.crashpoint import CrashPoint
from node.delaykeeping import DelayKeeping
from node.facade import OutcomeUnknown, Unavailable
from node.leftovers import Leftovers
from node.parts import Parts
from node.patience import PatientLog
from node.performing import Performing
from node.proposer import Proposer
from node.reading import Reading
from node.records import recorded
from node.running import RunningNode
from node.schedules import ScheduleDriver
from node.session import SessionKeeper
from node.settled import SettledWaiters
from node.sweeping import Sweeping
from node.testifying import Testifying
from node.views import CoordinatorSettings
from node.witness import witness
from node.workers import news
from node.workers.events import PoolEvent
from node.workers.port import Report
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.delayed import delays_of
from raft.commands import (
    Advance,
    Answer,
    Command,
    Effects,
    Freed,
    QueueChanged,
    Resolved,
    ScheduleChanged,
    SessionClosed,
    SessionOpened,
    Suspected,
)
from raft.ledger import Ledger
from raft.replica import ReplicaStatus

_log = logging.getLogger("oncekeeper.node")

ADVANCE_MS = 500
LOOK_MS = 1_000  # how often to look at the log unasked, should a wake have been lost
BARRIER_MS = 2_000
RETAIN_MS = 30_000
SETTLE_S_MAX = 5.0
FAILED_STOP_S = 1.0
STOP_LOOK_S = 0.1


class Service:
    def __init__(self, parts: Parts) -> None:
        config = parts.config
        self.config = config
        self.parts = parts
        self.clock = parts.clock
        self.log = parts.log
        self.records = parts.records
        self.started_ms = self.clock.wall_ms()
        self.ledger = Ledger(config.bloom_seed)
        self.replica = parts.make_replica(
            self.ledger, self._applied, self._replica_status, self._fatal, self._restored
        )
        self.proposer = Proposer(self.replica, parts.proposer_name)
        self.coordinator = Coordinator(
            self.ledger,
            CoordinatorSettings(
                node=config.node_id,
                testimony_wait_ms=config.testimony_wait_ms,
                delays=delays_of(self.log.reader) is not None,
            ),
        )
        self.incarnation = parts.next_incarnation(0)
        self.pools = parts.make_pools(self.incarnation, self._reports, self._pool_event)
        self.session = SessionKeeper(
            config,
            self.proposer,
            self.clock,
            parts.next_incarnation,
            on_joined=self._joined,
            on_lease=self._leased,
            on_fenced=self._fenced,
        )
        self.notes: dict[str, str] = {}
        self.crash = CrashPoint(config.crash_at)
        self.witness = witness(config.record_history, config.node_id)
        self.settled = SettledWaiters(self.ledger)
        self._disk = PatientLog(self.log, self.notes)
        self.delays = DelayKeeping(
            self.log, self._disk, self.coordinator, self.clock, self.crash, self.notes, self._feed
        )
        self._performing = Performing(
            self.coordinator,
            self.clock,
            proposer=self.proposer,
            pools=self.pools,
            records=self.records,
            log=self._disk,
            reading=Reading(
                self.log.reader, self.records, self.notes, wants=self.coordinator.wants, feed=self._feed
            ),
            delays=self.delays,
            crash=self.crash,
            witness=self.witness,
            barrier=self._barrier,
            spawn=self._spawn,
            on_failed=self._fatal,
        )
        self._assigning = Assigning(config, self.log, self.ledger, self.session, self.notes, self._feed)
        self._committing = Committing(self.coordinator, self._disk, self.crash, self.witness)
        self._testifying = Testifying(
            config.node_id, self.incarnation, parts.evidence, self.ledger, self.proposer
        )
        self._sweeping = Sweeping(
            self.ledger,
            self._disk,
            is_leader=lambda: self.replica.is_leader,
            barrier=self._barrier,
            wake=parts.wake.wake,
        )
        self._leftovers = Leftovers(self.ledger, self._disk, is_leader=lambda: self.replica.is_leader)
        self.schedules = self._schedule_driver()
        self.face = RunningNode(self)
        self.http = parts.make_http(self.face)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stop = asyncio.Event()
        self._exit_code = 0

    # --- starting and stopping ------------------------------------------------------------------------------

    def stop(self) -> None:
        """Finish what runs, settle, and end ``run``."""
        self._stop.set()

    def callback_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The loop's exception handler. A callback of ours that failed leaves a node that looks alive and is not;
        what fails about one connection, or one request, is that one's end."""
        error = context.get("exception")
        if isinstance(error, Exception) and "handle" in context and "transport" not in context:
            self._fatal(error)
        else:
            loop.default_exception_handler(context)

    async def run(self) -> int:
        """Until ``stop``, or until a part can no longer be trusted; the process's exit code."""
        if self.log.group is not None:
            self.log.group.listen(self._assigning.assign, self._woken)
        self.delays.watch()
        await self.parts.wake.listen(self._woken)
        await self.http.start()
        await self.replica.start()
        self._spawn(self._take_part())
        await self._stop.wait()
        _log.info("stopping")
        await self._wind_down()
        return self._exit_code

    async def _take_part(self) -> None:
        """From a fresh process to one that takes work."""
        await asyncio.gather(self._caught_up(), self._start_pools())
        if self.config.app:
            self.schedules.declare(self.pools.handlers)
        self._spawn(self._keep_time())
        self._spawn(self._committing.run())
        self._spawn(self._look_around())
        self._spawn(self._sweeping.run())
        self._spawn(self._leftovers.run())
        self._spawn(self.session.run(self.incarnation))

    async def _caught_up(self) -> None:
        # An observer until then: it may learn, and asks for nothing.
        while not self.replica.status().ready:
            await asyncio.sleep(0.02)

    async def _start_pools(self) -> None:
        if not self.config.app:
            return
        await self.pools.start()
        self._feed(m.HandlersKnown(dict(self.pools.handlers), self.parts.slots))

    async def _wind_down(self) -> None:
        self._feed(m.Drain())
        if self.config.app:
            await self._stop_pools()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S_MAX):
                # After a failure the coordinator hears nothing any more: what is open stays open.
                while not self.coordinator.idle and self._exit_code == 0:
                    await asyncio.sleep(0.01)
                if self._exit_code == 0:
                    await self._committing.commit()
        if not self.coordinator.idle:
            _log.warning("the ledger could not be told of all that ran: the rest is left to its evidence")
        with contextlib.suppress(TimeoutError):
            # A node that failed may have nobody left to tell: its session lapses, or its next life closes it.
            async with asyncio.timeout(FAILED_STOP_S if self._exit_code else None):
                await self.session.leave()
        if self.log.group is not None:
            self.log.group.want(False)  # now, so that others take over while we close
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.http.stop()
        await self.parts.close_peers()
        await self.replica.stop()
        self.records.close()
        self.log.close()
        self.parts.wake.close()

    async def _stop_pools(self) -> None:
        """Everything is reported before this returns: what ran, what was cut short, what never started.

        But a node that failed does not wait for workers that cannot die (one that hangs in the kernel): they hold
        the locks of their journals, and the next life asks for those.
        """
        stopping = asyncio.ensure_future(self.pools.stop(self.config.drain_ms_max / 1000))
        failed_s = 0.0
        while not stopping.done() and failed_s < FAILED_STOP_S:
            await asyncio.wait((stopping,), timeout=STOP_LOOK_S)
            failed_s += STOP_LOOK_S if self._exit_code else 0.0
        if not stopping.done():
            stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=self._exit_code != 0)

    def _fatal(self, error: BaseException) -> None:
        """A part can no longer be trusted. Work stops at once; the supervisor starts the node anew."""
        _log.critical("the node stops: %s", error, exc_info=error)
        self._exit_code = 1
        self._performing.end()
        self.pools.kill_all()
        self._stop.set()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if self._stop.is_set():
            _log.info("given up while stopping: %s", error)
        else:
            # A part that died silently would leave a node that looks alive and does nothing.
            self._fatal(error)

    # --- the session ----------------------------------------------------------------------------------------

    def _joined(self, session: int, incarnation: int) -> None:
        _log.info("session %d opened, incarnation %d", session, incarnation)
        self.delays.joined()
        self.incarnation = incarnation
        self._feed(m.SessionOpened(session))
        self._assigning.assign()
        self._spawn(self._testifying.speak(incarnation))

    def _leased(self, deadline_ms: int) -> None:
        self.pools.set_lease(deadline_ms * 1_000_000)
        # For checkers: not when work must stop, but when the session can lapse.
        self.witness.lease(self.session.session, deadline_ms + self.config.fence_margin_ms)

    def _fenced(self) -> None:
        # Kill first: everything after may take time that the lease no longer has.
        self.pools.kill_all()
        self._feed(m.SessionLost())
        self._assigning.assign()

    async def _keep_time(self) -> None:
        """The leader's clock is the ledger's. Time that no leader measured did not pass: leases only get longer."""
        last: float | None = None
        while True:
            await asyncio.sleep(ADVANCE_MS / 1000)
            if not self.replica.is_leader:
                last = None
                continue
            now = self.clock.monotonic_ms()
            if last is not None:
                advance = Advance(self.config.node_id, int(now - last))
                with contextlib.suppress(Unavailable, OutcomeUnknown):
                    await self.proposer.propose((advance,), timeout_ms=ADVANCE_MS)
            last = now

    # --- the coordinator ------------------------------------------------------------------------------------

    def _feed(self, event: m.Event) -> None:
        self._performing.feed(event)

    def _reports(self, reports: list[Report]) -> None:
        self._feed(m.Reported(tuple(reports)))

    def _pool_event(self, event: PoolEvent) -> None:
        news.tell(event, stopping=self._stop.is_set())

    # --- what the ledger applied ----------------------------------------------------------------------------

    def _applied(self, index: int, payload: bytes, result: object) -> None:
        assert isinstance(result, Effects)
        self.witness.applied(index, payload)
        if result.repeated:
            return
        if result.events:
            events = recorded(result, self.clock.wall_ms())
            if events:
                self.records.add_events(events)
            for event in result.events:
                self._noticed(event)
        self.settled.applied()

    def _restored(self, index: int) -> None:
        """A leader's snapshot replaced the ledger's state: what it skipped over came without events."""
        _log.info("caught up by a snapshot of entry %d", index)
        asyncio.get_running_loop().call_soon(self._assigning.assign)
        self._performing.soon()

    def _noticed(self, event: object) -> None:
        match event:
            case SessionOpened() | SessionClosed():
                asyncio.get_running_loop().call_soon(self._assigning.assign)
            case Suspected() | QueueChanged():
                self._performing.soon()
            case Freed(ids) | Resolved(ids):
                self._performing.soon()
                if self.replica.is_leader:
                    self._spawn(self._sweeping.those(ids))
            case ScheduleChanged():
                self.schedules.wake()
            case _:
                pass

    def _replica_status(self, status: ReplicaStatus) -> None:
        if status.role == "leader":
            self._spawn(self._sweeping.all())
            self.schedules.wake()

    def _schedule_driver(self) -> ScheduleDriver:
        async def propose(commands: tuple[Command, ...]) -> tuple[Answer, ...]:
            return (await self.proposer.propose(commands)).answers

        async def append(batches: Sequence[TaskBatch]) -> None:
            appended = await self._disk.run(lambda log: log.append(batches))
            self.parts.wake.wake({place.partition for place in appended})

        return ScheduleDriver(
            self.ledger,
            node=self.config.node_id,
            late_ms=self.config.schedule_late_ms,
            wall_ms=self.clock.wall_ms,
            is_leader=lambda: self.replica.is_leader,
            barrier=self._barrier,
            propose=propose,
            append=append,
            spawn=self._spawn,
            notes=self.notes,
            reached=self.crash.reached,
        )

    # --- the log --------------------------------------------------------------------------------------------

    def _woken(self, partitions: frozenset[int] | None) -> None:
        self._feed(m.MoreToRead(partitions))

    async def _look_around(self) -> None:
        retained_ms = self.clock.wall_ms()
        while True:
            await asyncio.sleep(LOOK_MS / 1000)
            self._woken(None)
            if self.replica.is_leader and self.clock.wall_ms() - retained_ms > RETAIN_MS:
                retained_ms = self.clock.wall_ms()
                keep_ms = self.config.log_keep_ms
                await self._disk.run(lambda log: log.retain(keep_ms, retained_ms))  # noqa: B023

    # --- what people see ------------------------------------------------------------------------------------

    @property
    def takes_work(self) -> bool:
        joined = self.session.session != 0 and not self.session.fenced
        return joined and bool(self.pools.handlers) and not self._stop.is_set()

    def worker_counts(self) -> dict[str, int]:
        stats = self.pools.stats()
        counts = {"restarts": stats.restarts, "busy": sum(worker.tasks > 0 for worker in stats.workers)}
        for worker in stats.workers:
            counts[worker.kind] = counts.get(worker.kind, 0) + 1
        return counts

    def all_notes(self) -> tuple[str, ...]:
        trouble = [self.records.trouble] if self.records.trouble else []
        if self.log.group is not None and self.log.group.trouble:
            trouble.append(self.log.group.trouble)
        return (*self.notes.values(), *trouble)

    def _barrier(self) -> Awaitable[bool]:
        return self.replica.barrier(BARRIER_MS)

    async def barrier(self, timeout_ms: int) -> None:
        if not await self.replica.barrier(timeout_ms):
            raise Unavailable(f"no leader confirmed within {timeout_ms} ms that this node is up to date")
