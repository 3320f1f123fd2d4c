"""Faults that are aimed: right after an event, in the order and for the time that a hurried change would not bear.

Blind dice seldom put two or three things one behind the other. Each of these does, around what a rule of the design
depends on: a vote that was given, a sync that failed, an effect, a testimony, a heartbeat that is being answered, a
task that outlives its lease. Everything in them may happen in any cluster.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from chaos.simulation.disk import Loss
from raft.commands import Fact

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster
    from chaos.simulation.machine import Machine
    from chaos.simulation.process import Process
    from chaos.simulation.workers import SimulatedWorker
    from node.workers.port import Work
    from raft.commands import Testified

Healer = Callable[[], None]


class Aimed:
    def __init__(self, world: Cluster, healed_s: float) -> None:
        self.world = world
        self.random = world.random
        self.healed_s = healed_s
        """When the last fault is mended, at the latest."""
        self._ruined: str | None = None
        """The one node whose disk may be lost in this run."""

    def aimed(self) -> dict[str, tuple[int, Callable[[float], Healer | None]]]:
        return {
            "forgetful voter": (2, self._forgetful_voter),
            "old leader is back": (3, self._old_leader_is_back),
            "voter dies": (4, self._voter_dies),
            "all disks fail": (3, self._all_disks_fail),
            "power loss at an effect": (4, self._power_at_effect),
            "outlive the lease": (4, self._outlive_the_lease),
            "late answer": (3, self._late_answer),
            "witness comes back": (3, self._witness_comes_back),
            "workers hang": (3, self._workers_hang),
        }

    def needs_s(self, name: str) -> float:
        """How long a kind must be let: until a session has lapsed, say."""
        lapse_s = (self.world.session_ms + 1500) / 1000
        return {
            "outlive the lease": lapse_s + 2.2,
            "late answer": lapse_s + 2.0,
            "witness comes back": lapse_s + 1.5,
            "workers hang": lapse_s + 3.0,
            "all disks fail": 2.5,
            "old leader is back": 2.5,
            "voter dies": 1.5,
            "forgetful voter": 1.2,
            "wall clock": 1.5,
            "kill between log writes": 1.5,
            "firing is cut short": 2.0,
            "all are down": 2.2,
            "reschedule is cut short": 2.0,
        }.get(name, 0.0)

    # --- whom -------------------------------------------------------------------------------------------------

    def _name(self) -> str:
        return self.random.choice(self.world.names)

    def _leader(self) -> str:
        """Who leads: of two that think so, who was elected later."""
        leaders = [
            (process.service.replica.status().term, name)
            for name, process in self.world.processes.items()
            if process.alive and process.service is not None and process.service.replica.is_leader
        ]
        return max(leaders)[1] if leaders else self._name()

    def _process(self, name: str) -> Process | None:
        process = self.world.processes.get(name)
        return process if process is not None and process.alive else None

    def _kill_soon(self, name: str) -> None:
        """After so many more callbacks: that is at any await."""
        process = self._process(name)
        if process is not None:
            process.loop.kill_after = self.random.randrange(1, 400)

    def _hold(self, name: str, until: float) -> None:
        process = self._process(name)
        if process is not None:
            process.loop.hold(self.world.scheduler.now, until)

    def _cut(self, pairs: list[tuple[str, str]], reset: bool = True) -> Healer:
        network = self.world.network
        if self.world.scheduler.now >= self.healed_s:
            return lambda: None
        for source, target in pairs:
            network.cut(source, target)
        if reset and self.random.random() < 0.3:
            for source, target in pairs:  # a broken connection, and not only silence
                network.reset(source, target)

        def heal() -> None:
            for source, target in pairs:
                network.heal(source, target)

        return heal

    def _around(self, name: str) -> list[tuple[str, str]]:
        others = [other for other in self.world.names if other != name]
        return [pair for other in others for pair in ((name, other), (other, name))]

    def _loss(self) -> Loss:
        return self.random.choice((Loss.RANDOM, Loss.RANDOM, Loss.ALL))

    def _power_all(self, until: float) -> None:
        loss = self._loss()
        for name in self.world.names:
            self.world.power_off(name, loss)

    def _ruin(self, name: str = "") -> str | None:
        """The node whose disk is ruined: one a run, so that the majority's stand."""
        if self._ruined is not None:
            return None
        self._ruined = name or self._name()
        return self._ruined

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

    def _old_leader_is_back(self, until: float) -> Healer | None:
        """A leader that does not know yet that it was deposed meets a voter that has just forgotten it, while those
        who could tell them are away. Or the voter is whole, and was the new leader, without its power."""
        world, draw, leader = self.world, self.random, self._leader()
        others = [name for name in world.names if name != leader]
        draw.shuffle(others)
        side = [leader, *others[: len(others) // 2 - 1]]
        rest = [name for name in world.names if name not in side]
        pairs = [pair for a in side for b in rest for pair in ((a, b), (b, a))]
        heals = [self._cut(pairs)]
        for a, b in pairs:
            world.network.reset(a, b)  # so that the others look for a leader at once
        end_s = min(until, world.scheduler.now + 0.9)

        def look() -> None:
            if world.scheduler.now >= end_s:
                return
            new = self._leader()
            if new in rest:
                world.scheduler.after(0.05 + 0.15 * draw.random(), world.driver, turn, new)
            else:
                world.scheduler.after(0.02, world.driver, look)

        def turn(new: str) -> None:
            if world.scheduler.now >= until:
                return
            ruined = self._ruin(draw.choice(rest)) if draw.random() < 0.6 else None
            back = ruined or new
            if ruined is None:
                world.power_off(back, Loss.ALL)
            for name in rest:
                process = self._process(name)
                world.stay_down.add(name)
                if process is not None:
                    process.die()
            heals.append(lambda: world.stay_down.difference_update(rest))
            heals.extend(lambda name=name: world.start(name) for name in rest)  # type: ignore[misc]
            if ruined is not None:
                world.machines[ruined].raft_store_deleted()
            world.stay_down.discard(back)
            for name in side:
                world.network.heal(name, back)
                world.network.heal(back, name)
            world.scheduler.after(0.005, world.driver, world.start, back)

        world.scheduler.after(0.02, world.driver, look)

        def heal() -> None:
            for each in heals:
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
            # While the one it elected still leads, and another one may by then.
            world.scheduler.after(0.3 + 0.6 * self.random.random(), world.driver, heal)

        def heal() -> None:
            world.network.on_vote = None
            while cuts:
                cuts.pop()()

        world.network.on_vote = voted
        self._kill_soon(self._leader())

        return heal

    # --- disks --------------------------------------------------------------------------------------------------

    def _all_disks_fail(self, until: float) -> Healer:
        """An error of each disk, of each follower's at the same entry perhaps; whoever stops for it is ended soon.
        And then the power goes: at once, or only when they have gone on with what they found on their disks."""
        world, draw, leader = self.world, self.random, self._leader()
        at_once = draw.random() < 0.5
        names = [name for name in world.names if not at_once or name != leader]
        failed: set[str] = set()
        heals: list[Healer] = []

        def stopped(process: Process) -> None:
            world.scheduler.after(0.05 * draw.random(), world.driver, process.die)

        def hit(name: str) -> None:
            if name in failed:
                return
            failed.add(name)
            if at_once and len(failed) == len(names):
                world.scheduler.after(0.0005 + 0.008 * draw.random(), world.driver, off)

        def off() -> None:
            if world.scheduler.now >= until:
                return  # healed already
            for name in names:
                world.power_off(name, Loss.ALL)
            heals.append(self._cut(self._around(leader)))  # who has it all cannot tell them

        for name in names:
            files = world.machines[name].files
            files.on_failure = lambda _, name=name: hit(name)
            for number in range(20 if at_once else 1):  # a disk that is broken goes on failing
                after = 0 if at_once or number else draw.randrange(0, 6)
                files.fail_next("fdatasync", errno.EIO, after)
        if not at_once:
            later = 0.6 + (until - world.scheduler.now - 0.6) * draw.random()
            world.scheduler.after(later, world.driver, self._power_all, until)
        heals.append(world.watch("replica failed", stopped))

        def heal() -> None:
            for each in heals:
                each()

        return heal

    def _power_at_effect(self, until: float) -> Healer:
        """A machine loses its power while its workers are in a task, or right after one took effect."""
        world, draw = self.world, self.random
        kind, left = draw.choice(("start", "effect")), draw.randrange(1, 12)
        everywhere = draw.random() < 0.3

        def off(name: str) -> None:
            for each in world.names if everywhere else [name]:
                world.power_off(each, self._loss())

        def happened(machine: Machine, work: Work) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                world.scheduler.after(0.003 * draw.random() ** 2, world.driver, off, machine.name)

        return world.watch(kind, happened)

    # --- what a lease is for ------------------------------------------------------------------------------------

    def _outlive_the_lease(self, until: float) -> Healer:
        """A node that has begun a long task is cut off, or held, until its session has lapsed and longer."""
        world, draw = self.world, self.random
        cuts: list[Healer] = []
        world.long_work += 1
        world.favoured.append("crunch")

        def begun(machine: Machine, work: Work) -> None:
            if work.handler == "crunch":
                end()
                world.scheduler.after(0.2 * draw.random(), world.driver, part, machine.name)

        def part(name: str) -> None:
            if draw.random() < 0.3:
                self._hold(name, until)
            else:
                cuts.append(self._cut(self._around(name)))

        end = world.watch("start", begun)

        def heal() -> None:
            end()
            world.long_work -= 1
            world.favoured.remove("crunch")
            for each in cuts:
                each()

        return heal

    def _late_answer(self, until: float) -> Healer:
        """A node is held while its heartbeat is being answered, and when it goes on, nobody hears it."""
        world, draw, leader = self.world, self.random, self._leader()
        name = draw.choice([each for each in world.names if each != leader])
        cuts: list[Healer] = []

        def beat(process: Process) -> None:
            if process.name == name:
                end()
                world.scheduler.after(0.0003 + 0.002 * draw.random(), world.driver, hold, process)

        def hold(process: Process) -> None:
            # Shorter than it waits for the answer, and so that the link is not given up.
            span = min(world.session_ms / 1000 * (0.6 + 0.35 * draw.random()), 1.5)
            process.loop.hold(world.scheduler.now, world.scheduler.now + span)
            cuts.append(self._cut([(name, other) for other in world.names if other != name], reset=False))

        end = world.watch("heartbeat", beat)

        def heal() -> None:
            end()
            for each in cuts:
                each()

        return heal

    # --- evidence -----------------------------------------------------------------------------------------------

    def _witness_comes_back(self, until: float) -> Healer:
        """A node dies in tasks that only a human can judge, comes back and testifies; then it is out of reach for
        longer than its lease and comes back to its session, or it dies once more."""
        world, draw = self.world, self.random
        world.favoured.append("wire")
        world.humans_away_until = max(world.humans_away_until, until)
        ends: list[Healer] = []

        def started(machine: Machine, work: Work) -> None:
            process = self._process(machine.name)
            if work.handler == "wire" and process is not None:
                ends.pop()()
                ends.append(world.watch("testified", testified))
                world.scheduler.after(0.001 * draw.random(), world.driver, process.die)

        def testified(node: str, event: Testified) -> None:
            process = self._process(node)
            if event.fact is Fact.STARTED and process is not None:
                ends.pop()()
                world.scheduler.after(0.3 * draw.random(), world.driver, away, process)

        def away(process: Process) -> None:
            if draw.random() < 0.3:
                process.die()
                return
            # Longer than the lease, and mostly not so long that the session lapses.
            span = (world.session_ms - world.margin_ms) / 1000 + 0.1 + 0.7 * draw.random()
            if draw.random() < 0.3:
                process.loop.hold(world.scheduler.now, world.scheduler.now + span)
            else:
                world.scheduler.after(span, world.driver, self._cut(self._around(process.name)))

        ends.append(world.watch("start", started))

        def heal() -> None:
            world.favoured.remove("wire")
            while ends:
                ends.pop()()

        return heal

    def _workers_hang(self, until: float) -> Healer:
        """A machine's workers cannot be killed for a while. Its node dies in a task, comes back with former workers
        still there, takes long tasks, and loses its session in them; when it has the next, the former ones are gone
        at last, and the later are not: whose journals tell of what?"""
        world, draw = self.world, self.random
        orphans: list[SimulatedWorker] = []
        cuts: list[Healer] = []
        name = ""
        world.long_work += 1
        world.favoured.append("wire")
        world.humans_away_until = max(world.humans_away_until, until)

        def begun(machine: Machine, work: Work) -> None:
            nonlocal name
            process = self._process(machine.name)
            if not name and process is not None:
                name = machine.name
                machine.workers_hang_until = until
                orphans.extend(machine.workers.values())
                world.scheduler.after(0.001 * draw.random(), world.driver, process.die)
            elif machine.name == name and work.handler == "wire" and not cuts and machine.workers_hang_until:
                cuts.append(self._cut(self._around(name)))
                world.scheduler.after((world.session_ms + 1500) / 1000, world.driver, cuts[0])

        def joined(node: str) -> None:
            if node == name and cuts:
                for orphan in orphans:
                    world.scheduler.after(0.1 * draw.random(), world.driver, orphan.end, -9)

        ends = [world.watch("start", begun), world.watch("session opened", joined)]

        def heal() -> None:
            for end in (*ends, *cuts):
                end()
            world.long_work -= 1
            world.favoured.remove("wire")

        return heal
