"""Faults that are aimed at what goes by the clock: a schedule that fires, and a delayed task that is moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from chaos.simulation.aimed import Aimed, Healer

if TYPE_CHECKING:
    from chaos.simulation.process import Process

FIRING, ALL_DOWN, MOVING = "firing is cut short", "all are down", "reschedule is cut short"


class AimedAtTimes(Aimed):
    def aimed_at_times(self) -> dict[str, tuple[int, Callable[[float], Healer | None]]]:
        return {
            FIRING: (2, self._firing_cut_short),
            ALL_DOWN: (1, self._all_down),
            MOVING: (2, self._moving_cut_short),
        }

    def _cut_short(self, process: Process, until: float) -> Healer:
        """It dies, or stands still for a while, or nobody hears it."""
        world, draw = self.world, self.random
        choice = draw.random()
        if choice < 0.5:
            process.die()
        elif choice < 0.75:
            process.loop.hold(world.scheduler.now, min(until, world.scheduler.now + 2.5 * draw.random()))
        else:
            return self._cut(self._around(process.name))
        return lambda: None

    def _firing_cut_short(self, until: float) -> Healer:
        """Who leads is struck within milliseconds of a step of a firing: again and again."""
        world, draw = self.world, self.random
        heals: list[Healer] = []
        left = draw.randrange(1, 4)

        def stepped(process: Process) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                left = draw.randrange(2, 8)
                late_s = 0.006 * draw.random() ** 2 if draw.random() < 0.5 else 0.0
                world.scheduler.after(late_s, world.driver, strike, process)

        def strike(process: Process) -> None:
            if world.scheduler.now < until:
                heals.append(self._cut_short(process, until))

        world.pausing += 1
        steps = ("schedule: Fire", "schedule: append", "schedule: Launched")
        heals.extend(world.watch(step, stepped) for step in draw.sample(steps, 2))

        def heal() -> None:
            world.pausing -= 1
            for each in heals:
                each()

        return heal

    def _all_down(self, until: float) -> Healer:
        """For longer than some firings may be late."""
        world = self.world
        names = list(world.names)
        world.stay_down.update(names)
        for name in names:
            process = self._process(name)
            if process is not None:
                process.die()

        def heal() -> None:
            world.stay_down.difference_update(names)
            for name in names:
                world.start(name)

        return heal

    def _moving_cut_short(self, until: float) -> Healer:
        """Right after a row was moved, its owner, whoever moved it or another one is struck."""
        world, draw = self.world, self.random
        heals: list[Healer] = []

        def moved(process: Process) -> None:
            if draw.random() < 0.5:
                world.scheduler.after(0.004 * draw.random() ** 2, world.driver, strike)

        def strike() -> None:
            process = self._process(self._name())
            if process is not None and world.scheduler.now < until:
                heals.append(self._cut_short(process, until))

        heals.append(world.watch("moved", moved))
        world.moving += 1

        def heal() -> None:
            world.moving -= 1
            for each in heals:
                each()

        return heal
