"""A node of real parts: real clocks, disks, sockets and processes (node/parts.py)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

from node.cluster import UNBORN, http_token, read_secret
from node.config import ConfigError, NodeConfig
from node.facade import NodeFacade
from node.grouplog import GroupLog
from node.http.peers import PeerClient
from node.http.server import HttpServer
from node.logging import set_up_logging
from node.logthread import LogThread
from node.parts import LogPart, Parts
from node.records import Records, RecordsLimits
from node.service import Service
from node.session import next_incarnation
from node.tls import NodeTls, load_tls
from node.wake import Waker, listen
from node.workers.events import PoolEvent, PoolSettings
from node.workers.pools import WorkerPools
from node.workers.port import Report
from node.workers.testimony import Evidence, forget, incarnations, read_testimony
from oncekeeper.log.opening import plugin_of
from raft.engine import Limits
from raft.ledger import Ledger
from raft.replica import Replica, ReplicaConfig, ReplicaStatus

_log = logging.getLogger("oncekeeper.node")


class SystemClock:
    def lease_ms(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000

    def monotonic_ms(self) -> float:
        return time.monotonic() * 1000

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


class LoopbackWake:
    """node/wake.py, as one part."""

    def __init__(self, config: NodeConfig) -> None:
        self._port = config.wake
        self._waker = Waker(config.wake_ports)
        self._transport: asyncio.DatagramTransport | None = None

    async def listen(self, on_wake: Callable[[frozenset[int] | None], None]) -> None:
        self._transport = await listen(self._port, on_wake)

    def wake(self, partitions: Iterable[int]) -> None:
        self._waker.wake(partitions)

    def close(self) -> None:
        self._waker.close()
        if self._transport is not None:
            self._transport.close()


class NobodyWakes:
    """A log that tells its readers by itself what is new."""

    async def listen(self, on_wake: Callable[[frozenset[int] | None], None]) -> None:
        pass

    def wake(self, partitions: Iterable[int]) -> None:
        pass

    def close(self) -> None:
        pass


def log_part(config: NodeConfig) -> LogPart:
    plugin, place = plugin_of(config.log), config.log_place
    if plugin.is_of_one_machine:
        return LogThread(lambda: plugin.open(place, create=True))
    return GroupLog(plugin, place)


class WorkJournals:
    """The directories of this node's former lives."""

    def __init__(self, config: NodeConfig) -> None:
        self._directory = config.data_dir / "work"

    def lives(self) -> tuple[int, ...]:
        return incarnations(self._directory)

    async def read(self, life: int) -> Evidence:
        # In a thread: it waits for that life's workers to be gone.
        return await asyncio.to_thread(read_testimony, self._directory, life)

    def forget(self, life: int) -> None:
        forget(self._directory, life)


def journal_limits(entries_max: int) -> Limits:
    """A tenth stays below each snapshot, so that a follower slightly behind needs entries only."""
    return Limits(compact_entries=entries_max, tail_entries=entries_max // 10)


def replica_config(config: NodeConfig, secret: bytes, tls: NodeTls | None = None) -> ReplicaConfig:
    # The wish decides and not the certificates at hand: without them a node that wants TLS must not start.
    if config.tls and tls is None:
        raise ConfigError("tls=true, and no certificates were loaded", "tls")
    return ReplicaConfig(
        node_id=config.node_id,
        cluster_id=config.cluster_id,
        secret=secret,
        listen=(config.raft.host, config.raft.port),
        peers={
            name: (address.host, address.port)
            for name, address in config.raft_peers.items()
            if name != config.node_id
        },
        data_dir=config.data_dir / "raft",
        limits=journal_limits(config.journal_entries_max),
        # Laid down when the cluster was made. Nodes that were set up by hand have none.
        unborn=config.data_dir / UNBORN if (config.cluster_dir / "cluster.json").exists() else None,
        server_ssl=tls.link_server if tls and config.tls else None,
        client_ssl=tls.link_client if tls and config.tls else None,
    )


def pool_settings(config: NodeConfig) -> PoolSettings:
    return PoolSettings(
        cpu_workers=max(0, config.cpu_workers),
        io_workers=max(1, config.io_workers),
        io_threads=config.io_threads,
        memory_bytes_max=config.memory_bytes_max,
    )


def real_parts(config: NodeConfig, secret: bytes) -> Parts:
    settings = pool_settings(config)
    token = http_token(secret)
    tls = load_tls(config)
    http_tls = tls if config.http_tls else None
    peers = PeerClient(
        {name: str(peer.http) for name, peer in config.peers.items() if name != config.node_id},
        token,
        http_tls.http_peers if http_tls else None,
    )

    def make_replica(
        ledger: Ledger,
        on_applied: Callable[[int, bytes, Any], None],
        on_status: Callable[[ReplicaStatus], None],
        on_fatal: Callable[[BaseException], None],
        on_restored: Callable[[int], None],
    ) -> Replica:
        return Replica(
            replica_config(config, secret, tls),
            ledger,
            on_applied=on_applied,
            on_status=on_status,
            on_fatal=on_fatal,
            on_restored=on_restored,
        )

    def make_pools(
        incarnation: int,
        on_reports: Callable[[list[Report]], None],
        on_event: Callable[[PoolEvent], None],
    ) -> WorkerPools:
        work_dir = config.data_dir / "work"
        app_dir = str(config.app_dir)
        return WorkerPools(config.app, app_dir, settings, work_dir, incarnation, on_reports, on_event)

    def make_http(face: NodeFacade) -> HttpServer:
        names = {config.peers[config.node_id].http.host} | (http_tls.hosts if http_tls else set())
        return HttpServer(face, config.http, token, frozenset(names), http_tls)

    return Parts(
        config=config,
        clock=SystemClock(),
        log=log_part(config),
        records=Records.open(
            config.data_dir / "history.db",
            RecordsLimits(keep_ms=config.history_keep_ms, rows_max=config.history_queue_max),
        ),
        wake=LoopbackWake(config) if plugin_of(config.log).is_of_one_machine else NobodyWakes(),
        evidence=WorkJournals(config),
        slots={
            "cpu": settings.cpu_workers or settings.io_workers * settings.io_threads,
            "io": settings.io_workers * settings.io_threads,
        },
        proposer_name=secrets.randbits(64),
        next_incarnation=lambda at_least: next_incarnation(config.data_dir, at_least),
        make_replica=make_replica,
        make_pools=make_pools,
        make_http=make_http,
        ask_peer=peers.ask,
        close_peers=peers.close,
    )


async def run_node(config: NodeConfig) -> int:
    """Run one node until it is told to stop; its exit code."""
    set_up_logging(config.node_id)
    os.environ["ONCEKEEPER_CLUSTER"] = str(config.cluster_dir)  # for handlers that submit
    _log.info("node %s, pid %d, of cluster %s", config.node_id, os.getpid(), config.cluster_id)
    service = Service(real_parts(config, read_secret(config.cluster_dir)))
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(service.callback_failed)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    with contextlib.suppress(asyncio.CancelledError):
        return await service.run()
    return 1
