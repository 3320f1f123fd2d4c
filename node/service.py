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
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, assert_never

from dedup.ids import TaskId, ids_of
from node import messages as m
from node import sweeper
from node.coordinator import Coordinator
from node.crashpoint import CrashPoint
from node.deferring import answer_of_store
from node.facade import OutcomeUnknown, Unavailable
from node.ownership import owned_by
from node.parts import Parts
from node.proposer import Proposer
from node.records import recorded
from node.running import RunningNode
from node.schedules import ScheduleDriver
from node.session import SessionKeeper
from node.testify import lives, testimonies
from node.views import CoordinatorSettings
from node.witness import witness
from node.workers.events import (
    GuardRestarted,
    PoolEvent,
    Printed,
    WorkerEnded,
    WorkerFailed,
    WorkerStarted,
)
from node.workers.port import Report
from oncekeeper.envelope import TaskBatch
from oncekeeper.errors import LogUnusable
from oncekeeper.log.cut import ROW_BYTES_MAX
from oncekeeper.log.delayed import delays_of
from oncekeeper.log.port import Aside, Fetched, Undecodable, UnknownAppend, Unsent
from raft.commands import (
    Advance,
    Answer,
    Claim,
    Command,
    Effects,
    Freed,
    Outcome,
    QueueChanged,
    Resolved,
    ScheduleChanged,
    SessionClosed,
    SessionOpened,
    Settle,
    Suspected,
    Testify,
)
from raft.ledger import Ledger
from raft.replica import ReplicaStatus

_log = logging.getLogger("oncekeeper.node")

ADVANCE_MS = 500
COMMIT_MS = 200
LOOK_MS = 1_000  # how often to look at the log unasked, should a wake have been lost
SWEEP_MS = 60_000
BARRIER_MS = 2_000
CONFIRM_AGAIN_MS = 50
DISK_RETRY_MS = 500
HISTORY_WAIT_MS = 100
RETAIN_MS = 30_000
SETTLED_POLL_MS = 20
DELAYS_POLL_MS = 5
SETTLE_S_MAX = 5.0
FAILED_STOP_S = 1.0
STOP_LOOK_S = 0.1
READ_BYTES_MAX = 8 << 20
SMALL_READ_TASKS = 64


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
        self._process_life = self.incarnation
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
        self.schedules = self._schedule_driver()
        self.face = RunningNode(self)
        self.http = parts.make_http(self.face)
        self._events: deque[m.Event] = deque()
        self._feeding = False
        self._tick_timer: asyncio.TimerHandle | None = None
        self._tick_at_ms = 0
        self._tick_soon = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stop = asyncio.Event()
        self._exit_code = 0
        self._settle_waiters: dict[TaskId, list[asyncio.Future[bool]]] = {}
        self._waiters_timer: asyncio.TimerHandle | None = None

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
            self.log.group.listen(self._assign, self._woken)
        if (watch := getattr(self.log, "watch_delays", None)) is not None:
            # Only a log whose nodes see each other's delayed tasks a moment later has it.
            watch(lambda partitions: self._feed(m.DelaysChanged(partitions)))
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
        self._spawn(self._keep_positions())
        self._spawn(self._look_around())
        self._spawn(self._sweep_all())
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
                    await self._commit()
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
        if (expect := getattr(self.log, "expect_delays", None)) is not None:
            expect()  # who rescheduled while we had no session did not ask us
        self.incarnation = incarnation
        self._feed(m.SessionOpened(session))
        self._assign()
        self._spawn(self._testify(incarnation))

    def _leased(self, deadline_ms: int) -> None:
        self.pools.set_lease(deadline_ms * 1_000_000)
        # For checkers: not when work must stop, but when the session can lapse.
        self.witness.lease(self.session.session, deadline_ms + self.config.fence_margin_ms)

    def _fenced(self) -> None:
        # Kill first: everything after may take time that the lease no longer has.
        self.pools.kill_all()
        self._feed(m.SessionLost())
        self._assign()

    async def _testify(self, incarnation: int) -> None:
        """Say what the journals of former lives know, and forget journals that nothing asks for any more."""
        suspects = [
            run
            for run in self.ledger.suspects_of(self.config.node_id)
            if run.suspect.incarnation < incarnation
        ]
        evidence = self.parts.evidence
        kept = [life for life in evidence.lives() if life != self._process_life]
        read = {}
        for claimed, life in lives(suspects, evidence.lives()).items():
            if life == self._process_life:
                continue  # joined anew without a restart: our own pools report it, and no former life knows of it
            read[claimed] = await evidence.read(life)
            if read[claimed].why:
                _log.warning("the work journals of incarnation %d: %s", life, read[claimed].why)
        for batch in testimonies(suspects, read):
            await self.proposer.propose((Testify(self.config.node_id, incarnation, batch),))
        for life in kept:
            evidence.forget(life)

    def _assign(self) -> None:
        """Compute which partitions are ours, and take them over from their committed positions."""
        takes_part = bool(self.session.session) and not self.session.fenced
        takes_part = takes_part and self.config.consumes and bool(self.config.app)
        if self.log.group is not None:
            # The log assigns; without a session we are no member of its group either.
            self.log.group.want(takes_part)
            self._feed(m.Assigned(dict(self.log.group.positions)))
            return
        owned: frozenset[int] = frozenset()
        if takes_part:
            consuming = sorted({s.node for s in self.ledger.sessions.values() if s.consumes})
            owned = owned_by(self.config.node_id, self.log.reader.partitions, consuming)
        try:
            committed = self.log.reader.committed() if owned else {}
        except LogUnusable as error:
            self.notes["read"] = f"the task log cannot be read: {error}"
            _log.error("%s; trying again", self.notes["read"])
            asyncio.get_running_loop().call_later(DISK_RETRY_MS / 1000, self._assign)
            return
        self._feed(m.Assigned({number: committed.get(number, 0) for number in owned}))

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
        """Tell the coordinator, and perform what it asks for; events that this causes are fed in turn."""
        self._events.append(event)
        if self._feeding:
            return
        self._feeding = True
        try:
            # Whoever called, a callback of the loop included: a node that went on deaf would look alive.
            while self._events and self._exit_code == 0:
                effects = self.coordinator.on(
                    self._events.popleft(), self.clock.lease_ms(), self.clock.wall_ms()
                )
                for effect in effects:
                    self._perform(effect)
        except Exception as error:  # noqa: BLE001 - whatever it is, the node stops, and is started anew
            self._fatal(error)
        finally:
            self._feeding = False
        self._arm_tick()

    def _perform(self, effect: m.Effect) -> None:
        match effect:
            case m.Propose(ticket, commands):
                self._spawn(self._ask(ticket, commands))
            case m.Dispatch(work):
                self.pools.submit(work)
            case m.Release(number, at, count):
                self.pools.release(number, at, count)
            case m.Remember(attempts):
                self.records.add_attempts(attempts)
            case m.Read():
                # Not at once: between two reads, the loop serves Raft.
                asyncio.get_running_loop().call_soon(self._read, effect)
            case m.StoreAside(ticket, tasks):
                self._spawn(self._store_aside(ticket, tasks))
            case m.Confirm(ticket):
                self._spawn(self._confirm(ticket))
            case m.Defer() | m.MoveDelayed() | m.EnqueueDue():
                self._spawn(self._keep_delayed(effect))
            case m.LoadDue() | m.FetchDue():
                asyncio.get_running_loop().call_soon(self._look_at_delayed, effect)
            case _:
                assert_never(effect)

    async def _ask(self, ticket: int, commands: tuple[Command, ...]) -> None:
        claims = any(isinstance(command, Claim) for command in commands)
        settles = any(isinstance(command, Settle) for command in commands)
        self.crash.reached("before_claim", claims)
        self.crash.reached("before_settle", settles)
        op = self.witness.called(commands)
        effects = await self.proposer.propose(commands)
        self.witness.answered(op, effects)
        self.crash.reached("after_claim", claims)
        self.crash.reached("after_settle", settles)
        self._feed(m.Answers(ticket, effects.answers))

    def _read(self, effect: m.Read) -> None:
        if not self.coordinator.wants(effect):
            return  # the partition was given up meanwhile: a log forgets what lies below the last read
        if not self.records.room:
            # The history's disk is behind. What is in hand goes on; no more is taken until it has caught up.
            asyncio.get_running_loop().call_later(HISTORY_WAIT_MS / 1000, self._read, effect)
            return
        try:
            items = self.log.reader.read(effect.partition, effect.offset, effect.tasks_max, READ_BYTES_MAX)
        except LogUnusable as error:
            self.notes["read"] = f"the task log cannot be read: {error}"
            _log.error("%s; trying again", self.notes["read"])
            asyncio.get_running_loop().call_later(DISK_RETRY_MS / 1000, self._read, effect)
            return
        self.notes.pop("read", None)
        next_offset = items[-1].end if items else effect.offset
        count = size = 0
        for item in items:
            tasks = item.end - item.base
            if isinstance(item, Undecodable):
                size += len(item.raw)
            elif isinstance(item, Fetched) and tasks < SMALL_READ_TASKS:
                size += sum(map(len, item.batch.bodies))
            count += tasks
        # A read of a few small tasks was not cut short by its bounds: it saw the end, and need not be tried again
        # before somebody wakes us. (Should a row be so large that it was cut all the same: LOOK_MS.)
        exhausted = count < min(SMALL_READ_TASKS, effect.tasks_max) and size < ROW_BYTES_MAX
        self._feed(m.WasRead(effect.partition, effect.epoch, tuple(items), next_offset, exhausted))

    async def _store_aside(self, ticket: int, tasks: tuple[Aside, ...]) -> None:
        await self._with_disk(lambda log: log.put_aside(tasks))
        self._feed(m.AsideStored(ticket))

    # --- delayed tasks: a store of the log's (oncekeeper/log/delayed.py) --------------------------------------

    def _look_at_delayed(self, effect: m.LoadDue | m.FetchDue) -> None:
        delays = delays_of(self.log.reader)
        assert delays is not None
        try:
            event = answer_of_store(delays, effect)
        except LogUnusable as error:
            if "delays" not in self.notes:  # each partition asks
                _log.warning("delayed tasks cannot be read: %s; trying again", error)
            self.notes["delays"] = f"delayed tasks cannot be read: {error}"
            asyncio.get_running_loop().call_later(DISK_RETRY_MS / 1000, self._look_at_delayed, effect)
            return
        self.notes.pop("delays", None)
        self.crash.reached("after_fetch", isinstance(effect, m.FetchDue))
        self._feed(event)

    async def _keep_delayed(self, effect: m.Defer | m.MoveDelayed | m.EnqueueDue) -> None:
        """All of these may be repeated after a failure."""
        is_defer = isinstance(effect, m.Defer)
        self.crash.reached("before_defer", is_defer)
        event = await self._with_disk(lambda log: answer_of_store(log.delays, effect))
        self.crash.reached("after_defer", is_defer)
        self._feed(event)

    async def delays_changed(self, partitions: frozenset[int], timeout_ms: int) -> bool:
        """Forget what is known of these partitions' delayed tasks; whether nothing of it is being claimed still."""
        if (see := getattr(self.log, "see_delays", None)) is not None:
            await see(timeout_ms / 2000)
        self._feed(m.DelaysChanged(partitions))
        ticket = self.coordinator.newest_ticket
        until_ms = self.clock.monotonic_ms() + timeout_ms
        while not self.coordinator.answered_up_to(ticket):
            if self.clock.monotonic_ms() > until_ms:
                return False
            await asyncio.sleep(DELAYS_POLL_MS / 1000)
        return True

    async def _confirm(self, ticket: int) -> None:
        while not await self.replica.barrier(BARRIER_MS):
            await asyncio.sleep(CONFIRM_AGAIN_MS / 1000)
        self._feed(m.Confirmed(ticket))

    async def _with_disk(self, work: Any) -> Any:
        """Until it is done: a full disk delays what waits for it, and loses nothing."""
        while True:
            try:
                result = await self.log.run(work)
            except (Unsent, UnknownAppend, LogUnusable) as error:
                self.notes["log"] = f"the task log cannot be written: {error}"
                _log.error("%s; trying again", self.notes["log"])
                await asyncio.sleep(DISK_RETRY_MS / 1000)
            else:
                self.notes.pop("log", None)
                return result

    def _reports(self, reports: list[Report]) -> None:
        self._feed(m.Reported(tuple(reports)))

    def _pool_event(self, event: PoolEvent) -> None:
        match event:
            case Printed(pid, _, task, line):
                _log.info("worker %d, task %s: %s", pid, task or "none", line)
            case WorkerStarted(pid, kind):
                _log.info("worker %d started (%s)", pid, kind)
            case WorkerEnded(pid, kind, why, in_doubt):
                level = logging.INFO if self._stop.is_set() and not in_doubt else logging.WARNING
                _log.log(level, "worker %d ended (%s): %s; %d tasks in doubt", pid, kind, why, in_doubt)
            case WorkerFailed(kind, error, retry_s):
                _log.error("a worker could not start (%s), again in %.1f s: %s", kind, retry_s, error)
            case GuardRestarted(status):
                _log.warning("the guard ended with %d and was started again", status)
            case _:
                assert_never(event)

    def _tick(self) -> None:
        self._tick_soon = False
        self._feed(m.Tick())

    def _soon(self) -> None:
        """A tick at the end of this round of the loop, however many reasons there were for it."""
        if not self._tick_soon:
            self._tick_soon = True
            asyncio.get_running_loop().call_soon(self._tick)

    def _arm_tick(self) -> None:
        at_ms = self.coordinator.next_look_ms()
        if at_ms is None or (self._tick_timer is not None and self._tick_at_ms <= at_ms):
            return
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self._tick_at_ms = at_ms
        delay_s = max(0, at_ms - self.clock.lease_ms()) / 1000
        self._tick_timer = asyncio.get_running_loop().call_later(delay_s, self._timer_fired)

    def _timer_fired(self) -> None:
        self._tick_timer = None
        self._feed(m.Tick())

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
        if self._settle_waiters and self._waiters_timer is None:
            loop = asyncio.get_running_loop()
            self._waiters_timer = loop.call_later(SETTLED_POLL_MS / 1000, self._tell_waiters)

    def _restored(self, index: int) -> None:
        """A leader's snapshot replaced the ledger's state: what it skipped over came without events."""
        _log.info("caught up by a snapshot of entry %d", index)
        asyncio.get_running_loop().call_soon(self._assign)
        self._soon()

    def _noticed(self, event: object) -> None:
        match event:
            case SessionOpened() | SessionClosed():
                asyncio.get_running_loop().call_soon(self._assign)
            case Suspected() | QueueChanged():
                self._soon()
            case Freed(ids) | Resolved(ids):
                self._soon()
                if self.replica.is_leader:
                    self._spawn(self._sweep(lambda log: sweeper.aside_of(log, ids)))
            case ScheduleChanged():
                self.schedules.wake()
            case _:
                pass

    def _replica_status(self, status: ReplicaStatus) -> None:
        if status.role == "leader":
            self._spawn(self._sweep_kinds())
            self.schedules.wake()

    def _schedule_driver(self) -> ScheduleDriver:
        async def propose(commands: tuple[Command, ...]) -> tuple[Answer, ...]:
            return (await self.proposer.propose(commands)).answers

        async def append(batches: Sequence[TaskBatch]) -> None:
            appended = await self._with_disk(lambda log: log.append(batches))
            self.parts.wake.wake({place.partition for place in appended})

        return ScheduleDriver(
            self.ledger,
            node=self.config.node_id,
            late_ms=self.config.schedule_late_ms,
            wall_ms=self.clock.wall_ms,
            is_leader=lambda: self.replica.is_leader,
            barrier=lambda: self.replica.barrier(BARRIER_MS),
            propose=propose,
            append=append,
            spawn=self._spawn,
            notes=self.notes,
            reached=self.crash.reached,
        )

    def _tell_waiters(self) -> None:
        self._waiters_timer = None
        for task_id in list(self._settle_waiters):
            if self.is_settled(task_id):
                for waiter in self._settle_waiters.pop(task_id):
                    if not waiter.done():
                        waiter.set_result(True)

    def is_settled(self, task_id: TaskId) -> bool:
        outcome = self.ledger.classify(ids_of([task_id]))[0].outcome
        return outcome in (Outcome.EXECUTED, Outcome.DEAD, Outcome.CANCELLED)

    async def wait_settled(self, task_id: TaskId, timeout_ms: int) -> bool:
        if self.is_settled(task_id):
            return True
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiters = self._settle_waiters.setdefault(task_id, [])
        waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await waiter
        except TimeoutError:
            waiters.remove(waiter)
            if not waiters:
                self._settle_waiters.pop(task_id, None)
            return False

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
                await self._with_disk(lambda log: log.retain(keep_ms, retained_ms))  # noqa: B023

    async def _keep_positions(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_MS / 1000)
            await self._commit()

    async def _commit(self) -> None:
        positions = self.coordinator.commit_positions()
        if positions:
            self.crash.reached("before_commit")
            await self._with_disk(lambda log: log.commit(positions))
            self.witness.committed(positions)
            self.crash.reached("after_commit")
        if drops := self.coordinator.delayed_drops():
            self.crash.reached("before_drop")
            await self._with_disk(lambda log: log.delays.drop(drops))
            self.crash.reached("after_drop")

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

    async def barrier(self, timeout_ms: int) -> None:
        if not await self.replica.barrier(timeout_ms):
            raise Unavailable(f"no leader confirmed within {timeout_ms} ms that this node is up to date")

    # --- what lies aside ------------------------------------------------------------------------------------

    async def _sweep_all(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_MS / 1000)
            if self.replica.is_leader:
                await self._sweep_kinds()

    async def _sweep_kinds(self) -> None:
        for kind in ("dead", "suspect"):
            after = 0
            while page := await self._with_disk(lambda log: sweeper.all_aside(log, kind, after)):  # noqa: B023
                after = page[-1][0]
                await self._sweep_tasks([task for _, task in page])

    async def _sweep(self, find: Any) -> None:
        tasks = await self._with_disk(find)
        if tasks:
            await self._sweep_tasks(tasks)

    async def _sweep_tasks(self, tasks: list[Aside]) -> None:
        # What lies aside was claimed before it was put there. A ledger that is behind, as a new leader's or a
        # deposed one's may be, would take it for free, and bring back what its holder is just giving up.
        while not await self.replica.barrier(BARRIER_MS):
            if not self.replica.is_leader:
                return  # whoever leads next sweeps everything
        again, drop = sweeper.Verdicts(self.ledger).split(tasks)
        if again:
            await self._with_disk(lambda log: sweeper.append_again(log, again, self.parts.wake.wake))
        if drop:
            await self._with_disk(lambda log: log.drop_aside(drop))
