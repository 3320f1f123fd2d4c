"""What goes wrong, and that it is mended.

Faults are drawn from the seed: each strikes at its time, and has a healer that runs later, at the latest when the
run's time of faults is over. One kind may come several times, and kinds overlap. What must not be lost is at most
a minority's: a disk that is replaced or rots is one node's, once a run.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from chaos import history as h
from chaos.simulation.disk import Loss
from chaos.simulation.files import any_bit

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster
    from chaos.simulation.process import Process

BEGIN_S = 0.6
CRASH_STEPS = (
    "before_claim",
    "after_claim",
    "before_settle",
    "after_settle",
    "before_commit",
    "after_commit",
)

Healer = Callable[[], None]


class Faults:
    def __init__(self, world: Cluster) -> None:
        self.world = world
        self.random = world.random
        self.names: list[str] = []
        self.healed_s = 3.5 + 3.0 * self.random.random()
        self._ruined: str | None = None
        """The one node whose disk may be lost in this run."""
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
            "forgetful voter": (2, self._forgetful_voter),
            "voter dies": (2, self._voter_dies),
            "all disks fail": (2, self._all_disks_fail),
            "wall clock": (2, self._wall_clock),
            "log fails": (2, self._log_fails),
            "history is full": (1, self._history_full),
            "stop and start": (2, self._stop),
        }

    def start(self) -> None:
        world, draw = self.world, self.random
        if not world.options.faults:
            self.healed_s = 2.5
            return
        names = list(self._kinds)
        weights = [weight for weight, _ in self._kinds.values()]
        span = self.healed_s - BEGIN_S
        for _ in range(draw.choice((1, 2, 3, 4, 6, 8))):
            name = draw.choices(names, weights)[0]
            at = BEGIN_S + span * 0.9 * draw.random()
            until = min(self.healed_s, at + span * draw.random() ** 1.5 + 0.1)
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
            machine.files.bytes_max = None
        for name in world.names:
            world.start(name)
        world.witness.note("driver", "HEALED")

    # --- whom -------------------------------------------------------------------------------------------------

    def _name(self) -> str:
        return self.random.choice(self.world.names)

    def _leader(self) -> str:
        for name, process in self.world.processes.items():
            if process.alive and process.service is not None and process.service.replica.is_leader:
                return name
        return self._name()

    def _process(self, name: str) -> Process | None:
        process = self.world.processes.get(name)
        return process if process is not None and process.alive else None

    # --- processes --------------------------------------------------------------------------------------------

    def _kill(self, until: float) -> None:
        self._kill_soon(self._name())

    def _kill_leader(self, until: float) -> None:
        self._kill_soon(self._leader())

    def _kill_soon(self, name: str) -> None:
        """After so many more callbacks: that is at any await."""
        process = self._process(name)
        if process is not None:
            process.loop.kill_after = self.random.randrange(1, 400)

    def _kill_at_file(self, until: float) -> None:
        process = self._process(self._name())
        if process is not None:
            process.files_left = self.random.randrange(1, 60)

    def _kill_between_writes(self, until: float) -> Healer:
        world = self.world
        world.kill_after_write = self.random.choice(
            ("append", "drop_aside", "drop_aside", "put_aside", "commit")
        )

        def heal() -> None:
            world.kill_after_write = ""

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

    def _hold(self, name: str, until: float) -> None:
        process = self._process(name)
        if process is not None:
            process.loop.hold(self.world.scheduler.now, until)

    # --- links ------------------------------------------------------------------------------------------------

    def _cut(self, pairs: list[tuple[str, str]]) -> Healer:
        network = self.world.network
        for source, target in pairs:
            network.cut(source, target)
        if self.random.random() < 0.3:
            for source, target in pairs:  # a broken connection, and not only silence
                network.reset(source, target)

        def heal() -> None:
            for source, target in pairs:
                network.heal(source, target)

        return heal

    def _around(self, name: str) -> list[tuple[str, str]]:
        others = [other for other in self.world.names if other != name]
        return [pair for other in others for pair in ((name, other), (other, name))]

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

    def _loss(self) -> Loss:
        return self.random.choice((Loss.RANDOM, Loss.RANDOM, Loss.ALL))

    def _power_one(self, until: float) -> None:
        self.world.power_off(self._name(), self._loss())

    def _power_all(self, until: float) -> None:
        loss = self._loss()
        for name in self.world.names:
            self.world.power_off(name, loss)

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

    def _ruin(self) -> str | None:
        """The node whose disk is ruined: one a run, so that the majority's stand."""
        if self._ruined is not None:
            return None
        self._ruined = self._name()
        return self._ruined

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
            path = self.random.choice(paths)
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

    def _all_disks_fail(self, until: float) -> None:
        """An error of each disk, and soon after the power."""
        world = self.world
        for name in world.names:
            world.machines[name].files.fail_next("fdatasync", errno.EIO, self.random.randrange(0, 6))
        after = 0.05 + (until - world.scheduler.now) * self.random.random()
        world.scheduler.after(after, world.driver, self._power_all, until)

    # --- what an election depends on ----------------------------------------------------------------------------

    def _forgetful_voter(self, until: float) -> Healer | None:
        """Who knew of the last entries is away, but for one, whose disk is new; who does not know them is back."""
        world, names = self.world, list(self.world.names)
        forgetful = self._ruin()
        if forgetful is None:
            return None
        names.remove(forgetful)
        leader = self._leader()
        names.sort(key=lambda name: (name != leader, name))
        keepers, laggards = names[: len(names) // 2], names[len(names) // 2 :]
        behind = self._cut(
            [(a, b) for a in laggards for b in [*names, forgetful] if a != b and b not in laggards]
        )
        back = self._cut(
            [(b, a) for a in laggards for b in [*names, forgetful] if a != b and b not in laggards]
        )
        away: list[Healer] = []

        def turn() -> None:
            if world.scheduler.now >= until:
                return  # healed already
            others = [forgetful, *laggards]
            away.append(self._cut([pair for a in keepers for b in others for pair in ((a, b), (b, a))]))
            process = self._process(forgetful)
            if process is not None:
                process.die()
            world.machines[forgetful].raft_store_deleted()
            behind()
            back()
            for a in keepers:  # those paths that were cut twice and have been healed once
                for b in others:
                    world.network.cut(a, b)
                    world.network.cut(b, a)

        left_s = until - world.scheduler.now
        world.scheduler.after(left_s * (0.2 + 0.4 * self.random.random()), world.driver, turn)

        def heal() -> None:
            behind()
            back()
            for each in away:
                each()

        return heal

    def _voter_dies(self, until: float) -> Healer:
        """Who gives a vote dies right after, and comes back at once, while the one it elected is cut off."""
        world = self.world
        cuts: list[Healer] = []

        def voted(voter: str, candidate: str) -> None:
            world.network.on_vote = None
            process = self._process(voter)
            if process is None:
                return
            others = [name for name in world.names if name not in (voter, candidate)]
            cuts.append(
                self._cut([pair for name in others for pair in ((candidate, name), (name, candidate))])
            )
            world.scheduler.after(0.0012, world.driver, end, process, candidate)

        def end(process: Process, candidate: str) -> None:
            if world.network.on_vote is None and world.scheduler.now >= until:
                return
            process.die()
            cuts.append(self._cut([(candidate, process.name), (process.name, candidate)]))
            world.scheduler.after(0.01, world.driver, world.start, process.name)

        world.network.on_vote = voted
        self._kill_soon(self._leader())

        def heal() -> None:
            world.network.on_vote = None
            for each in cuts:
                each()

        return heal

    # --- clocks and neighbours --------------------------------------------------------------------------------

    def _wall_clock(self, until: float) -> Healer:
        world = self.world
        clock = world.machines[self._name()].clock
        world.walls_jumped = True
        jump = self.random.choice((3_600_000, -3_600_000, 50_000))
        clock.wall_jump_ms += jump
        if self.random.random() < 0.5:

            def strobe() -> None:
                if world.scheduler.now < until:
                    clock.wall_jump_ms = 0 if clock.wall_jump_ms else jump
                    world.scheduler.after(0.05 + 0.2 * self.random.random(), world.driver, strobe)

            strobe()

        def heal() -> None:
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
