"""Virtual time, and an event loop for each simulated process.

One ``Scheduler`` holds all that will happen, ordered by virtual time and, where times are equal, by when it was
asked for. Nothing else decides what is next, so a seed replays bit for bit. Time jumps to the next event.

A ``ProcessLoop`` is the asyncio loop of one life of one process, on the clock of its machine, which may drift:

- its own callbacks run in the order that asyncio promises; how long a turn of the loop takes to come, and so how
  processes interleave, is drawn from the seed;
- a *dead* loop runs nothing ever again: whatever its tasks were awaiting, they end there, and no ``finally`` of
  theirs has an effect. Its tasks are kept until the simulation is closed, so that nothing is collected early;
- a *held* loop (SIGSTOP, a stalled disk) runs nothing until it is let go; what happened meanwhile waits, in order.

Tasks and futures hash by their number, not their address: a set of them is then walked in the same order in every
process.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

TURN_S_MIN, TURN_S_SPAN = 10e-6, 60e-6
"""How long after it has something to do a loop comes to do it."""
TIMER_LATE_S = 400e-6
MASK = (1 << 61) - 1


class Killed(BaseException):
    """The process that runs is dead. No Exception: the code under test must not mistake it for an error."""


class Actor:
    """Whatever can die or be held: a process."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.dead = False
        self.held_since = self.held_until = 0.0

    def hold(self, now: float, until: float) -> None:
        if self.held_until <= now:
            self.held_since = now
        self.held_until = max(self.held_until, until)


class Scheduler:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.trace = seed & MASK
        """A digest of what happened when, and to whom."""
        self._heap: list[tuple[float, float, int, Actor, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0

    def at(self, when: float, actor: Actor, act: Callable[..., None], *args: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when, when, self._sequence, actor, act, args))

    def after(self, delay_s: float, actor: Actor, act: Callable[..., None], *args: Any) -> None:
        self._sequence += 1
        when = self.now + delay_s
        heapq.heappush(self._heap, (when, when, self._sequence, actor, act, args))

    def run(self, until: float) -> None:
        """Everything that happens before ``until``; or until an act clears the heap."""
        heap, pop, push = self._heap, heapq.heappop, heapq.heappush
        while heap and heap[0][0] < until:
            when, asked, sequence, actor, act, args = pop(heap)
            if actor.dead:
                continue
            if actor.held_until > when:
                push(heap, (actor.held_until, asked, sequence, actor, act, args))
                continue
            self.now = when
            self.steps += 1
            self.trace = (self.trace * 1000003 ^ hash((when, actor.number))) & MASK
            act(*args)

    def clear(self) -> None:
        self._heap.clear()


class Handle:
    """As asyncio.TimerHandle, with what is used of it."""

    __slots__ = ("_args", "_callback", "_context", "_when")

    def __init__(
        self,
        when: float,
        callback: Callable[..., Any] | None,
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> None:
        self._when = when
        self._callback = callback
        self._args = args
        self._context = context

    def when(self) -> float:
        return self._when

    def cancel(self) -> None:
        self._callback = None
        self._args = ()

    def cancelled(self) -> bool:
        return self._callback is None


class NumberedFuture(asyncio.Future):  # type: ignore[type-arg]
    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.number = number

    def __hash__(self) -> int:
        return self.number


class NumberedTask(asyncio.Task):  # type: ignore[type-arg]
    def __init__(self, number: int, coroutine: Coroutine[Any, Any, Any], loop: Any, **options: Any) -> None:
        self.number = number
        super().__init__(coroutine, loop=loop, **options)
        self._log_destroy_pending = False

    def __hash__(self) -> int:
        return self.number


class Clock:
    """A machine's clocks: a monotonic one that drifts, and a wall clock that may jump besides."""

    def __init__(self, scheduler: Scheduler, rate: float, epoch_ms: int) -> None:
        self._scheduler = scheduler
        self.rate = rate
        self._base = 1000.0
        self._epoch_ms = epoch_ms
        self._jump_ms = 0
        self._peak_ms = 0

    def time(self) -> float:
        return self._base + self._scheduler.now * self.rate

    def true_time(self, local: float) -> float:
        return (local - self._base) / self.rate

    # node.parts.Clock

    def lease_ms(self) -> int:
        return int(self.time() * 1000)

    def monotonic_ms(self) -> float:
        return self.time() * 1000

    def wall_ms(self) -> int:
        return self._epoch_ms + int(self.time() * 1000) + self._jump_ms

    @property
    def wall_jump_ms(self) -> int:
        return self._jump_ms

    @wall_jump_ms.setter
    def wall_jump_ms(self, jump_ms: int) -> None:
        self._peak_ms = max(self._peak_ms, self.wall_ms())
        self._jump_ms = jump_ms

    def wall_peak_ms(self) -> int:
        """The latest that the wall clock ever showed."""
        return max(self._peak_ms, self.wall_ms())


class Current:
    """Which process is running: for the clocks, which threads read too."""

    loop: Any = None
    running: Any = None
    """The same as asyncio has it: not set again for each turn, as turns are many."""

    def end(self) -> None:
        events._set_running_loop(None)
        self.loop = self.running = None


current = Current()


_Loop: Any = asyncio.AbstractEventLoop  # of its forty methods, those that the product uses


class ProcessLoop(_Loop, Actor):  # type: ignore[misc]
    """See the module. ``on_error`` gets what a callback raised: asyncio would log it and go on."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Clock,
        number: int,
        name: str,
        on_error: Callable[[ProcessLoop, BaseException], None],
    ) -> None:
        Actor.__init__(self, number)
        self.scheduler = scheduler
        self.clock = clock
        self.name = name
        self.kill_after = 0
        """When above 0: how many more callbacks it lives."""
        self.on_killed: Callable[[], None] = lambda: None
        self.machine: Any = None
        self.process: Any = None
        self._on_error = on_error
        self._ready: deque[Handle] = deque()
        self._turning = False
        self._numbers = 0
        self._tasks: list[NumberedTask] = []
        self._context = contextvars.Context()

    # --- what asyncio and the product call ----------------------------------------------------------------------

    def time(self) -> float:
        return self.clock.time()

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        handle = Handle(0.0, callback, args, context)
        self._ready.append(handle)
        if not self._turning:
            self._turning = True
            scheduler = self.scheduler
            scheduler.after(TURN_S_MIN + TURN_S_SPAN * scheduler.random.random(), self, self._turn)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        return self.call_at(self.clock.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        handle = Handle(when, callback, args, context)
        scheduler = self.scheduler
        true = max(scheduler.now, self.clock.true_time(when)) + TIMER_LATE_S * scheduler.random.random()
        scheduler.at(true, self, self._due, handle)
        return handle

    def create_future(self) -> Any:
        self._numbers += 1
        return NumberedFuture(self._numbers, self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> Any:
        self._numbers += 1
        task = NumberedTask(self._numbers, coro, self, name=name, context=context)
        self._tasks.append(task)
        if len(self._tasks) > 256:
            self._tasks = [each for each in self._tasks if not each.done()]
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """A thread's work happens at one moment, some time later, and is heard of later still."""
        future = self.create_future()
        draw = self.scheduler.random
        self.scheduler.after(0.0005 + 0.004 * draw.random() ** 4, self, self._work, future, func, args)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and not self.dead:
            self._on_error(self, error)

    # --- running ------------------------------------------------------------------------------------------------

    def enter(self, callback: Callable[..., Any], *args: Any) -> None:
        """Something came from outside (a message): run it, and what else is ready, now."""
        self._ready.append(Handle(0.0, callback, args, None))
        self._run_ready()

    def _turn(self) -> None:
        self._turning = False
        self._run_ready()

    def _due(self, handle: Handle) -> None:
        if handle._callback is not None:
            self._ready.append(handle)
            self._run_ready()

    def _run_ready(self) -> None:
        ready = self._ready
        if current.running is not self:
            events._set_running_loop(self)
            current.running = self
        current.loop = self
        try:
            for _ in range(len(ready)):
                handle = ready.popleft()
                callback = handle._callback
                if callback is None:
                    continue
                if self.kill_after:
                    self.kill_after -= 1
                    if not self.kill_after:
                        raise Killed
                context = handle._context
                try:
                    if context is None:
                        self._context.run(callback, *handle._args)
                    else:
                        context.run(callback, *handle._args)
                except Exception as error:  # noqa: BLE001  # asyncio logs it; here it is a finding
                    self._on_error(self, error)
                if self.dead:
                    raise Killed
        except Killed:
            if not self.dead:
                self.on_killed()
            self.dead = True
            ready.clear()
        if ready and not self._turning:
            self._turning = True
            scheduler = self.scheduler
            scheduler.after(TURN_S_MIN + TURN_S_SPAN * scheduler.random.random(), self, self._turn)

    def _work(self, future: Any, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        current.loop = self
        try:
            result, error = func(*args), None
        except Exception as raised:  # noqa: BLE001  # it belongs to whoever awaits it
            result, error = None, raised
        except Killed:
            if not self.dead:
                self.on_killed()
            self.dead = True
            return
        self.scheduler.after(
            0.0001 + 0.001 * self.scheduler.random.random(), self, self._told, future, result, error
        )

    def _told(self, future: Any, result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def close_all(self) -> None:
        """The simulation is over: let go of what never ended, without a word."""
        self.dead = True
        self._ready.clear()
        for task in self._tasks:
            if not task.done():
                coroutine = task.get_coro()
                try:
                    coroutine.close()
                except (Exception, Killed, RuntimeError):  # noqa: BLE001  # nobody is left to hear it
                    continue
        self._tasks.clear()
