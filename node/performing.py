"""The coordinator's loop: events in, effects performed, and ticks when something waits by time.

    event -> coordinator.on -> effects -> ledger, workers, log, records -> event ...

All on the node's event loop. What an effect asks for and cannot be had at once runs as a task of the node; its
answer comes back as an event.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, assert_never

from node import messages as m
from node.coordinator import Coordinator
from node.crashpoint import CrashPoint
from node.delaykeeping import DelayKeeping
from node.parts import Clock, PoolsPart, RecordsPart
from node.patience import PatientLog
from node.proposer import Proposer
from node.reading import Reading
from node.witness import Witness
from oncekeeper.log.port import Aside
from raft.commands import Claim, Command, Settle

CONFIRM_AGAIN_MS = 50


class Performing:
    def __init__(
        self,
        coordinator: Coordinator,
        clock: Clock,
        *,
        proposer: Proposer,
        pools: PoolsPart,
        records: RecordsPart,
        log: PatientLog,
        reading: Reading,
        delays: DelayKeeping,
        crash: CrashPoint,
        witness: Witness,
        barrier: Callable[[], Awaitable[bool]],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        on_failed: Callable[[BaseException], None],
    ) -> None:
        """``barrier``: whether the ledger here is surely not behind. ``spawn``: as a task of the node, which stops
        it. ``on_failed``: what the coordinator or a performer raised; nothing is fed any more."""
        self._coordinator = coordinator
        self._clock = clock
        self._proposer = proposer
        self._pools = pools
        self._records = records
        self._log = log
        self._reading = reading
        self._delays = delays
        self._crash = crash
        self._witness = witness
        self._barrier = barrier
        self._spawn = spawn
        self._on_failed = on_failed
        self._events: deque[m.Event] = deque()
        self._feeding = False
        self._deaf = False
        self._tick_timer: asyncio.TimerHandle | None = None
        self._tick_at_ms = 0
        self._tick_soon = False

    def feed(self, event: m.Event) -> None:
        """Tell the coordinator, and perform what it asks for; events that this causes are fed in turn."""
        self._events.append(event)
        if self._feeding:
            return
        self._feeding = True
        try:
            # Whoever called, a callback of the loop included: a node that went on deaf would look alive.
            while self._events and not self._deaf:
                effects = self._coordinator.on(
                    self._events.popleft(), self._clock.lease_ms(), self._clock.wall_ms()
                )
                for effect in effects:
                    self._perform(effect)
        except Exception as error:  # noqa: BLE001 - whatever it is, the node stops, and is started anew
            self._on_failed(error)
        finally:
            self._feeding = False
        self._arm_tick()

    def end(self) -> None:
        """A part of the node failed: what is open stays open, and is left to its evidence."""
        self._deaf = True

    # --- effects --------------------------------------------------------------------------------------------

    def _perform(self, effect: m.Effect) -> None:
        match effect:
            case m.Propose(ticket, commands):
                self._spawn(self._ask(ticket, commands))
            case m.Dispatch(work):
                self._pools.submit(work)
            case m.Release(number, at, count):
                self._pools.release(number, at, count)
            case m.Remember(attempts):
                self._records.add_attempts(attempts)
            case m.Read():
                # Not at once: between two reads, the loop serves Raft.
                asyncio.get_running_loop().call_soon(self._reading.perform, effect)
            case m.StoreAside(ticket, tasks):
                self._spawn(self._store_aside(ticket, tasks))
            case m.Confirm(ticket):
                self._spawn(self._confirm(ticket))
            case m.Defer() | m.MoveDelayed() | m.EnqueueDue():
                self._spawn(self._delays.write(effect))
            case m.LoadDue() | m.FetchDue() | m.LookUp():
                asyncio.get_running_loop().call_soon(self._delays.look, effect)
            case _:
                assert_never(effect)

    async def _ask(self, ticket: int, commands: tuple[Command, ...]) -> None:
        claims = any(isinstance(command, Claim) for command in commands)
        settles = any(isinstance(command, Settle) for command in commands)
        self._crash.reached("before_claim", claims)
        self._crash.reached("before_settle", settles)
        op = self._witness.called(commands)
        effects = await self._proposer.propose(commands)
        self._witness.answered(op, effects)
        self._crash.reached("after_claim", claims)
        self._crash.reached("after_settle", settles)
        self.feed(m.Answers(ticket, effects.answers))

    async def _store_aside(self, ticket: int, tasks: tuple[Aside, ...]) -> None:
        await self._log.run(lambda log: log.put_aside(tasks))
        self.feed(m.AsideStored(ticket))

    async def _confirm(self, ticket: int) -> None:
        while not await self._barrier():
            await asyncio.sleep(CONFIRM_AGAIN_MS / 1000)
        self.feed(m.Confirmed(ticket))

    # --- ticks ----------------------------------------------------------------------------------------------

    def soon(self) -> None:
        """A tick at the end of this round of the loop, however many reasons there were for it."""
        if not self._tick_soon:
            self._tick_soon = True
            asyncio.get_running_loop().call_soon(self._tick)

    def _tick(self) -> None:
        self._tick_soon = False
        self.feed(m.Tick())

    def _arm_tick(self) -> None:
        at_ms = self._coordinator.next_look_ms()
        if at_ms is None or (self._tick_timer is not None and self._tick_at_ms <= at_ms):
            return
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self._tick_at_ms = at_ms
        delay_s = max(0, at_ms - self._clock.lease_ms()) / 1000
        self._tick_timer = asyncio.get_running_loop().call_later(delay_s, self._timer_fired)

    def _timer_fired(self) -> None:
        self._tick_timer = None
        self.feed(m.Tick())
