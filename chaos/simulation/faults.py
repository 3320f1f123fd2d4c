"""What goes wrong, and that it is mended.

Faults are drawn from the seed: each strikes at its time, and has a healer that runs later, at the latest when the
run's time of faults is over. One kind may come several times, and kinds overlap. What must not be lost is at most
a minority's: a disk that is replaced or rots is one node's, once a run.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

import node.deferring
from chaos import history as h
from chaos.simulation.aimed import Healer
from chaos.simulation.aimed_times import AimedAtTimes
from chaos.simulation.files import any_bit

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster

RETRY_HAND_ON_MS = node.deferring.RETRY_HAND_ON_MS  # as users have it
BEGIN_S = 0.6
CRASH_STEPS = (
    "before_claim",
    "after_claim",
    "before_settle",
    "after_settle",
    "before_commit",
    "after_commit",
    "before_fire",
    "after_fire",
    "after_fire_append",
    "after_launch",
)


class Faults(AimedAtTimes):
    def __init__(self, world: Cluster) -> None:
        super().__init__(world, 3.5 + 3.0 * world.random.random())
        self.names: list[str] = []
        self._kinds: dict[str, tuple[int, Callable[[float], Healer | None]]] = {
            "kill": (5, self._kill),
            "kill at a file operation": (4, self._kill_at_file),
            "kill between log writes": (3, self._kill_between_writes),
            "crash point": (4, self._crash_point),
            "kill the leader": (3, self._kill_leader),
            "kill a worker": (2, self._kill_worker),
            "stay down": (2, self._stay_down),
            "pause": (4, self._pause),
            "pause the leader": (2, self._pause_leader),
            "isolate": (4, self._isolate),
            "isolate the leader": (3, self._isolate_leader),
            "cut a pair": (2, self._cut_pair),
            "all apart": (1, self._all_apart),
            "one way": (3, self._one_way),
            "flapping": (2, self._flapping),
            "slow links": (2, self._slow_links),
            "power loss of one": (3, self._power_one),
            "power loss of all": (3, self._power_all),
            "disk error": (3, self._disk_error),
            "disk full": (2, self._disk_full),
            "slow disk": (1, self._slow_disk),
            "rotten disk": (2, self._rot),
            "new disk": (1, self._new_disk),
            "wall clock": (3, self._wall_clock),
            "log fails": (2, self._log_fails),
            "history is full": (1, self._history_full),
            "stop and start": (2, self._stop),
            **self.aimed(),
            **self.aimed_at_times(),
        }

    @property
    def kinds(self) -> list[str]:
        return list(self._kinds)

    def start(self) -> None:
        world, draw = self.world, self.random
        if not world.options.faults:
            self.healed_s = 2.5
            return
        names = self.kinds
        weights = [weight for weight, _ in self._kinds.values()]
        drawn = [draw.choices(names, weights)[0] for _ in range(draw.choice((1, 2, 3, 4, 6, 8)))]
        if world.options.fault:
            drawn = [world.options.fault]
        needed_s = max(self.needs_s(name) for name in drawn)
        self.healed_s = max(self.healed_s, BEGIN_S + needed_s + 0.5)
        span = self.healed_s - BEGIN_S
        for name in drawn:
            need = self.needs_s(name)
            at = BEGIN_S + min(span * 0.9, span - need) * draw.random()
            until = min(self.healed_s, at + max(need, span * draw.random() ** 1.5 + 0.1))
            only = world.options.only_faults
            if only is None or len(self.names) in only:
                world.scheduler.at(at, world.driver, self._strike, name, until)
            self.names.append(name)
        world.scheduler.at(self.healed_s, world.driver, self._heal_all)

    def _strike(self, name: str, until: float) -> None:
        world = self.world
        world.witness.reached.add(f"fault: {name}")
        world.witness.note("driver", "FAULT", None, f"{name} until {until:.3f}")
        world.witness.history.faults.append(h.Fault(world.witness.t_ns, "FAULT", name))
        healer = self._kinds[name][1](until)
        world.scheduler.at(until, world.driver, self._heal, name, healer)

    def _heal(self, name: str, healer: Healer | None) -> None:
        if healer is not None:
            healer()
        self.world.witness.note("driver", "HEAL", None, name)
        self.world.witness.history.faults.append(h.Fault(self.world.witness.t_ns, "HEAL", name))

    def _heal_all(self) -> None:
        world = self.world
        world.network.heal_all()
        world.log_fails, world.history_full, world.kill_after_write = 0.0, False, ""
        world.stalls.clear()
        world.stay_down.clear()
        for machine in world.machines.values():
            machine.files.mend()
            machine.workers_hang_until = 0.0
        for name in world.names:
            world.start(name)
        world.witness.note("driver", "HEALED")

    # --- processes --------------------------------------------------------------------------------------------

    def _kill(self, until: float) -> None:
        self._kill_soon(self._name())

    def _kill_leader(self, until: float) -> None:
        self._kill_soon(self._leader())

    def _kill_at_file(self, until: float) -> None:
        process = self._process(self._name())
        if process is not None:
            process.files_left = self.random.randrange(1, 60)

    def _kill_between_writes(self, until: float) -> Healer:
        world = self.world
        world.kill_after_write = self.random.choice(
            ("append", "drop_aside", "drop_aside", "put_aside", "commit")
        )
        world.reviving += 1
        world.favoured.append("bad")

        def heal() -> None:
            world.kill_after_write = ""
            world.reviving -= 1
            world.favoured.remove("bad")

        return heal

    def _crash_point(self, until: float) -> None:
        """Armed for the life that begins now."""
        name = self._name()
        self.world.crash_at[name] = f"{self.random.choice(CRASH_STEPS)}:{self.random.randrange(1, 12)}"
        process = self._process(name)
        if process is not None:
            process.die()

    def _kill_worker(self, until: float) -> None:
        machine = self.world.machines[self._name()]
        if machine.workers:
            machine.workers[self.random.choice(sorted(machine.workers))].die(-9)

    def _stay_down(self, until: float) -> Healer:
        world, name = self.world, self._name()
        world.stay_down.add(name)
        process = self._process(name)
        if process is not None:
            process.die()

        def heal() -> None:
            world.stay_down.discard(name)
            world.start(name)

        return heal

    def _stop(self, until: float) -> None:
        process = self._process(self._name())
        if process is not None and process.service is not None:
            process.loop.enter(process.service.stop)

    def _pause(self, until: float) -> None:
        self._hold(self._name(), until)

    def _pause_leader(self, until: float) -> None:
        self._hold(self._leader(), until)

    # --- links ------------------------------------------------------------------------------------------------

    def _isolate(self, until: float) -> Healer:
        return self._cut(self._around(self._name()))

    def _isolate_leader(self, until: float) -> Healer:
        return self._cut(self._around(self._leader()))

    def _cut_pair(self, until: float) -> Healer:
        a, b = self.random.sample(self.world.names, 2)
        return self._cut([(a, b), (b, a)])

    def _all_apart(self, until: float) -> Healer:
        names = self.world.names
        return self._cut([(a, b) for a in names for b in names if a != b])

    def _one_way(self, until: float) -> Healer:
        """One node deaf, or one mute, or one direction of one pair."""
        name, style = self.random.choice((self._name(), self._leader())), self.random.randrange(3)
        others = [other for other in self.world.names if other != name]
        if style == 0:
            return self._cut([(other, name) for other in others])
        if style == 1:
            return self._cut([(name, other) for other in others])
        return self._cut([(name, self.random.choice(others))])

    def _flapping(self, until: float) -> Healer:
        world = self.world
        pairs = self._around(self._name())
        period = 0.1 + 0.5 * self.random.random()
        heal = self._cut(pairs)

        def flap(cut: bool) -> None:
            if world.scheduler.now >= until:
                return
            for source, target in pairs:
                (world.network.cut if cut else world.network.heal)(source, target)
            world.scheduler.after(period, world.driver, flap, not cut)

        world.scheduler.after(period, world.driver, flap, False)
        return heal

    def _slow_links(self, until: float) -> Healer:
        paths = [self.world.network.path(*pair) for pair in self._around(self._name())]
        for path in paths:
            path.latency_s, path.jitter_s = 0.05, 0.2

        def heal() -> None:
            for path in paths:
                path.latency_s, path.jitter_s = 0.0002, 0.0006

        return heal

    # --- disks ------------------------------------------------------------------------------------------------

    def _power_one(self, until: float) -> None:
        self.world.power_off(self._name(), self._loss())

    def _disk_error(self, until: float) -> None:
        files = self.world.machines[self._name()].files
        operation = self.random.choice(("fdatasync", "pwrite", "fsync", "sync_directory", "rename"))
        files.fail_next(operation, errno.EIO, self.random.randrange(0, 10))

    def _disk_full(self, until: float) -> Healer:
        machine = self.world.machines[self._name()]
        files = machine.files
        files.bytes_max = sum(files.size(path) for path in files.disk.names) + self.random.randrange(0, 4000)

        def heal() -> None:
            machine.files.bytes_max = None

        return heal

    def _slow_disk(self, until: float) -> Healer:
        name = self._name()
        self.world.stalls[name] = 0.01 + 0.2 * self.random.random()

        def heal() -> None:
            self.world.stalls.pop(name, None)

        return heal

    def _rot(self, until: float) -> None:
        name = self._ruin()
        if name is None:
            return
        process = self._process(name)
        if process is not None:
            process.die()
        files = self.world.machines[name].files
        paths = [path for path in sorted(files.disk.names) if files.size(path)]
        if paths:
            whole = [path for path in paths if path.endswith("/snapshot")]
            path = self.random.choice(whole if whole and self.random.random() < 0.4 else paths)
            if self.random.random() < 0.3:
                files.lose(path)
            else:
                files.flip_bit(path, any_bit(files, path, self.random))

    def _new_disk(self, until: float) -> None:
        """All that this node's disk held is gone; the operator says so, as the handbook wants it."""
        name = self._ruin()
        if name is None:
            return
        process = self._process(name)
        if process is not None:
            process.die()
        self.world.machines[name].raft_store_deleted()

    # --- clocks and neighbours --------------------------------------------------------------------------------

    def _wall_clock(self, until: float) -> Healer:
        """Of one node, of the leader, or of all."""
        world = self.world
        names = self.random.choice(([self._name()], [self._leader()], list(world.names)))
        clocks = [world.machines[name].clock for name in names]
        world.walls_jumped = True
        world.walls_wrong += 1
        jump = self.random.choice((3_600_000, -3_600_000, -3_600_000, 50_000))
        if node.deferring.RETRY_HAND_ON_MS < RETRY_HAND_ON_MS:
            jump = -abs(
                jump
            )  # retries of this run wait by the wall clock, and a fast one makes them late by its error
        for clock in clocks:
            clock.wall_jump_ms += jump
        if self.random.random() < 0.5:

            def strobe() -> None:
                if world.scheduler.now < until:
                    for clock in clocks:
                        clock.wall_jump_ms = 0 if clock.wall_jump_ms else jump
                    world.scheduler.after(0.05 + 0.2 * self.random.random(), world.driver, strobe)

            strobe()

        def heal() -> None:
            world.walls_wrong -= 1
            for clock in clocks:
                clock.wall_jump_ms = 0

        return heal

    def _log_fails(self, until: float) -> Healer:
        self.world.log_fails = 0.05 + 0.5 * self.random.random()

        def heal() -> None:
            self.world.log_fails = 0.0

        return heal

    def _history_full(self, until: float) -> Healer:
        self.world.history_full = True

        def heal() -> None:
            self.world.history_full = False

        return heal
