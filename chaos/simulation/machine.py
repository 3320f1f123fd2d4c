"""A simulated machine: its disk, its memory, its clocks, and who runs on it. It outlives the processes."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chaos.simulation.disk import Loss
from chaos.simulation.files import SimulatedFiles
from chaos.simulation.loop import Actor, Clock, Scheduler

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster
    from chaos.simulation.workers import MemoryJournal, SimulatedGuard, SimulatedWorker
    from node.workers.testimony import Manifest

DATA = "/data"
PAGE_BYTES = 4096


@dataclass
class LifeRecord:
    """The work journals of one life of a node, in the page cache."""

    manifest: Manifest | None = None
    journals: dict[str, MemoryJournal] = field(default_factory=dict)


class Machine:
    def __init__(self, world: Cluster, name: str, number: int, clock: Clock) -> None:
        self.world = world
        self.name = name
        self.number = number
        self.clock = clock
        self.scheduler: Scheduler = world.scheduler
        self.random: random.Random = world.scheduler.random
        self.files = SimulatedFiles()
        self.files.make_directory(DATA)
        self.boots = 1
        self.lives: dict[int, LifeRecord] = {}
        self.journals: dict[str, MemoryJournal] = {}
        self.workers: dict[int, SimulatedWorker] = {}
        self.guards: list[SimulatedGuard] = []
        self.workers_hang_until = 0.0
        """Until then workers sleep in the kernel when they are killed (a file system that does not answer)."""
        self.kernel = Actor(800 + number)
        self._pids = itertools.count(1000 * number + 1)
        self._incarnation = 0

    @property
    def boot_id(self) -> str:
        return f"{self.name}-boot-{self.boots}"

    def next_pid(self) -> int:
        return next(self._pids)

    def next_incarnation(self, at_least: int) -> int:
        """node/session.py: next_incarnation, whose file is synced before it is used."""
        self._incarnation = max(self._incarnation + 1, at_least, self.clock.wall_ms() // 1000)
        return self._incarnation

    def process_died(self) -> None:
        """The node's process is gone: its workers die with it, soon."""
        self.files = self.files.after_kill()
        self.guards.clear()
        for worker in list(self.workers.values()):
            worker.process = None
            self.scheduler.after(0.008 * self.random.random(), worker, worker.die, -9)

    def power_lost(self, loss: Loss) -> None:
        self.files = self.files.after_power_loss(self.random.randrange(2**32), loss)
        self.guards.clear()
        for worker in list(self.workers.values()):
            worker.process = None
            worker.end(-9)
        self.boots += 1
        self.journals.clear()
        # The directories and files are there; which of their pages reached the disk, nobody knows. Often it is
        # those that had not been written for long: the headers.
        old_too, share = self.random.random() < 0.3, self.random.choice((0.5, 0.9))
        for life in self.lives.values():
            for journal in life.journals.values():
                for page in range(0 if old_too else PAGE_BYTES, len(journal.data), PAGE_BYTES):
                    if self.random.random() < share:
                        journal.data[page : page + PAGE_BYTES] = bytes(
                            len(journal.data[page : page + PAGE_BYTES])
                        )

    def raft_store_deleted(self) -> None:
        """All files of the store are gone but the mark that there was one (raft/store.py)."""
        for path in list(self.files.disk.names):
            if not path.endswith("/initialised"):
                self.files.lose(path)
