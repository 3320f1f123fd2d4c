"""One life of a node: the real Service on simulated parts, on a loop of its own, until it dies."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from chaos.simulation import peers
from chaos.simulation.loop import Killed, ProcessLoop
from chaos.simulation.machine import DATA, Machine
from chaos.simulation.network import SimulatedTransport
from chaos.simulation.workers import SimulatedEvidence
from node.config import Address, NodeConfig, Peer
from node.parts import Parts
from node.service import Service
from node.workers.events import PoolSettings
from node.workers.pools import WorkerPools
from oncekeeper.log.memory import MemoryLog
from oncekeeper.log.port import TaskLog, UnknownAppend, Unsent
from raft.codec import decode_proposal
from raft.commands import Heartbeat
from raft.engine import Limits, Timings
from raft.ledger import Ledger
from raft.replica import Outcome, Replica, ReplicaConfig, ReplicaStatus
from raft.store import mark_initialised, open_store

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster

T = TypeVar("T")
CLUSTER_ID = "51" * 16
TESTIMONY_MS = 600


class NodeLog:
    """oncekeeper/log of one node: reads at once, writes by the log's thread. Writes may fail or be unknown."""

    def __init__(self, process: Process, log: MemoryLog) -> None:
        self.reader: TaskLog = log
        self._process = process
        self._writer = _Writer(process, log)

    group = None  # ownership is the ledger's
    delay_index = None  # what one node wrote, all see at once

    async def look(self, work: Callable[[Any], T]) -> T:
        return await self.run(work)

    async def run(self, work: Callable[[Any], T]) -> T:
        result: T = await self._process.loop.run_in_executor(None, work, self._writer)
        return result

    def close(self) -> None:
        pass


class _Writer:
    """Each write is durable or not done; between two writes of one piece of work the node may die."""

    def __init__(self, process: Process, log: MemoryLog) -> None:
        self._process = process
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def _write(self, name: str, act: Callable[..., T], *args: Any) -> T:
        process = self._process
        world = process.world
        if process.loop.dead:
            raise Killed
        draw = world.random.random()
        if draw < world.log_fails:
            if draw < world.log_fails / 2:
                raise Unsent("simulated: the log's disk is full")
            act(*args)
            raise UnknownAppend("simulated: stored, and the answer was lost")
        result = act(*args)
        if world.kill_after_write == name:
            world.kill_after_write = ""
            world.witness.note(process.name, "KILL", None, f"after its {name}")
            process.die()
            raise Killed
        return result

    def append(self, batches: Any) -> Any:
        return self._write("append", self._process.world.append, batches)

    def commit(self, positions: Any) -> None:
        self._process.world.witness.committing(self._process.name, dict(positions))
        self._write("commit", self._log.commit, positions)

    def put_aside(self, tasks: Any) -> None:
        self._write("put_aside", self._log.put_aside, tasks)

    def drop_aside(self, tasks: Any) -> None:
        self._write("drop_aside", self._log.drop_aside, tasks)

    @property
    def delays(self) -> _DelayWriter:
        return _DelayWriter(self)


class _DelayWriter:
    """log.delays of a writer."""

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer
        self._store = writer._log.delays

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def defer(self, tasks: Any) -> None:
        self._writer._write("defer", self._store.defer, tasks)

    def move(self, places: Any, due_ms: int, was_ms: int | None = None) -> Any:
        process = self._writer._process
        process.world.happened("moved", process)
        return self._writer._write("move", self._store.move, places, due_ms, was_ms)

    def drop(self, places: Any) -> Any:
        world = self._writer._process.world
        world.witness.dropping(self._writer._process.name, places)
        return self._writer._write("drop", self._store.drop, places)

    def enqueue(self, rows: Any) -> Any:
        world = self._writer._process.world
        return self._writer._write("enqueue", lambda: world.seen_appended(lambda: self._store.enqueue(rows)))


class NoHistory:
    """The history of tasks is for people; here its disk is sometimes behind, which pauses intake."""

    trouble: str | None = None

    def __init__(self, world: Cluster) -> None:
        self._world = world

    @property
    def room(self) -> bool:
        return not self._world.history_full

    def add_attempts(self, attempts: Iterable[Any]) -> bool:
        return True

    def add_events(self, events: Iterable[Any]) -> bool:
        return True

    def close(self) -> None:
        pass


class NoHttp:
    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass


class Wake:
    """The datagrams on loopback: fast, and sometimes lost."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def listen(self, on_wake: Callable[[frozenset[int] | None], None]) -> None:
        self._process.on_wake = on_wake

    def wake(self, partitions: Iterable[int]) -> None:
        self._process.world.wake(frozenset(partitions))

    def close(self) -> None:
        self._process.on_wake = None


class Process:
    def __init__(self, world: Cluster, machine: Machine, life: int) -> None:
        self.world = world
        self.machine = machine
        self.name = machine.name
        self.life = life
        self.loop = ProcessLoop(
            world.scheduler,
            machine.clock,
            10 * machine.number + life % 10,
            machine.name,
            world.callback_raised,
        )
        self.loop.machine = machine
        self.loop.process = self
        self.loop.on_killed = self.die
        self.transport: SimulatedTransport | None = None
        self.on_wake: Callable[[frozenset[int] | None], None] | None = None
        self.service: Service | None = None
        self.files_left = 0
        machine.files.before_step = self._file_step

    @property
    def alive(self) -> bool:
        return not self.loop.dead

    def start(self) -> None:
        self.world.scheduler.after(0.001, self.loop, self.loop.enter, self._begin)

    def _begin(self) -> None:
        self.loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            service = self.service = self.world.make_service(self)
            code = await service.run()
        except OSError as error:
            code = 1
            self.world.witness.note(self.name, "EXIT", None, f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001  # the process ends with a traceback, and is started again
            code = 1
            self.world.process_failed(self, error)
        self.world.witness.note(self.name, "EXIT", None, f"code {code}")
        self.die()

    def die(self, power: bool = False) -> None:
        """The end of the process, at once; the kernel closes what it had open."""
        if self.loop.dead:
            return
        self.loop.dead = True
        if self.transport is not None:
            if power:
                self.transport.vanish()
            else:
                self.transport.shut()
        self.world.process_ended(self, power)

    def _file_step(self, operation: str) -> None:
        if self.loop.dead:
            raise Killed
        if self.files_left:
            self.files_left -= 1
            if not self.files_left:
                self.world.witness.note(self.name, "KILL", None, f"at {operation}")
                self.die()
                raise Killed
        stall = self.world.stalls.get(self.name)
        if stall and operation in ("fdatasync", "fsync"):
            self.loop.hold(self.world.scheduler.now, self.world.scheduler.now + stall)


class WatchedReplica(Replica):
    """Tells whoever aims a fault by it of each heartbeat of the session that is proposed."""

    def __init__(self, process: Process, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._process = process

    async def propose(self, payload: bytes, *, timeout_ms: int = 5000) -> Outcome:
        world = self._process.world
        if world.watchers.get("heartbeat"):
            commands = decode_proposal(payload).commands
            if any(isinstance(command, Heartbeat) for command in commands):
                world.happened("heartbeat", self._process)
        return await super().propose(payload, timeout_ms=timeout_ms)


def build_parts(process: Process) -> Parts:
    """What node/assembly.py builds, simulated."""
    world, machine = process.world, process.machine
    addresses = {
        name: Peer(Address("127.0.0.1", 7000 + at), Address("127.0.0.1", 8000 + at), 9000 + at)
        for at, name in enumerate(world.names)
    }
    here = addresses[process.name]
    config = NodeConfig(
        node_id=process.name,
        cluster_id=CLUSTER_ID,
        cluster_dir=Path("/cluster"),
        data_dir=Path(DATA),
        peers=addresses,
        raft=here.raft,
        http=here.http,
        wake=here.wake,
        app="app:app",
        partitions=world.log.partitions,
        bloom_seed=7,
        session_timeout_ms=world.session_ms,
        heartbeat_ms=world.heartbeat_ms,
        fence_margin_ms=world.margin_ms,
        testimony_wait_ms=TESTIMONY_MS,
        drain_ms_max=500,
        schedule_late_ms=world.late_ms,
        crash_at=world.crash_at.pop(process.name, ""),
    )
    raft = ReplicaConfig(
        node_id=process.name,
        cluster_id=CLUSTER_ID,
        secret=bytes(32),
        listen=(here.raft.host, here.raft.port),
        peers={
            name: (peer.raft.host, peer.raft.port) for name, peer in addresses.items() if name != process.name
        },
        data_dir=Path(DATA) / "raft",
        timings=Timings(),
        limits=Limits(compact_entries=world.compact_entries, tail_entries=world.tail_entries),
    )
    pools = PoolSettings(cpu_workers=1, io_workers=1, io_threads=4)

    def make_transport(**options: Any) -> Any:
        transport = process.transport = SimulatedTransport(world.network, process.loop, options)
        return transport

    def make_replica(
        ledger: Ledger,
        on_applied: Callable[[int, bytes, Any], None],
        on_status: Callable[[ReplicaStatus], None],
        on_fatal: Callable[[BaseException], None],
        on_restored: Callable[[int], None],
    ) -> Any:
        def applied(index: int, payload: bytes, result: Any) -> None:
            world.witness.applied(process.name, index, payload, result, ledger, process.life)
            on_applied(index, payload, result)

        def fatal(error: BaseException) -> None:
            world.replica_failed(process, error)
            on_fatal(error)

        def restored(index: int) -> None:
            world.witness.note(process.name, "RESTORED", None, f"index {index}")
            world.witness.reached.add("restored")
            world.witness.restored(process.name, process.life, index)
            on_restored(index)

        return WatchedReplica(
            process,
            raft,
            ledger,
            on_applied=applied,
            on_status=on_status,
            on_fatal=fatal,
            on_restored=restored,
            open_store=lambda each: open_store(each, machine.files),
            mark_ready=lambda: mark_initialised(raft.data_dir, machine.files),
            make_transport=make_transport,
            clock=machine.clock.time,
            draw=random.Random(world.random.getrandbits(64)),
        )

    proposer = world.random.getrandbits(64)
    world.witness.proposers[proposer] = world.scheduler.now

    def make_pools(incarnation: int, on_reports: Any, on_event: Any) -> Any:
        # The slots' files are in the machine's memory (chaos/simulation/workers.py); the path is only a name.
        return WorkerPools("app:app", "", pools, Path("/work"), incarnation, on_reports, on_event)

    async def close_peers() -> None:
        pass

    return Parts(
        config=config,
        clock=machine.clock,
        log=NodeLog(process, world.log),
        records=NoHistory(world),
        wake=Wake(process),
        evidence=SimulatedEvidence(machine),
        slots={"cpu": 1, "io": 4},
        proposer_name=proposer,
        next_incarnation=machine.next_incarnation,
        make_replica=make_replica,
        make_pools=make_pools,
        make_http=lambda face: NoHttp(),
        ask_peer=functools.partial(peers.ask, process),
        close_peers=close_peers,
    )
