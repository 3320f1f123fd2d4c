"""The settings of a node: what each means and its bounds, and the frozen object that they are parsed into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from node.addresses import Address, Peer

if TYPE_CHECKING:
    from oncekeeper.log.opening import Place

DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Setting:
    doc: str
    low: int | None = None
    high: int | None = None
    # All nodes of a cluster must agree on it, so that a node may not contradict ``cluster.json``.
    shared: bool = False


SETTINGS = {
    "node_id": Setting("name of this node in the cluster"),
    "cluster_id": Setting("32 hexadecimal digits, drawn when the cluster was made", shared=True),
    "cluster_dir": Setting("the cluster's data directory: cluster.json, secret, log/"),
    "data_dir": Setting("the node's own directory: raft/, work/, history.db, node.log, node.lock"),
    "peers": Setting("every node of the cluster, this one too, and where it is reached"),
    "raft": Setting("where this node listens for Raft"),
    "http": Setting("where this node listens for HTTP"),
    "wake": Setting("UDP port on loopback where this node is told of new tasks", 1, 65535),
    "tls": Setting(
        "whether raft links are mutual TLS; only a cluster on loopback may go without", shared=True
    ),
    "http_tls": Setting("whether the HTTP API is HTTPS; only on loopback it may go without", shared=True),
    "certs_dir": Setting("directory with ca.pem and this node's NODE.pem and NODE.key"),
    "app": Setting("MODULE:APP whose handlers run here; empty: this node only votes and serves"),
    "app_dir": Setting("directory that is put first on the import path for the application"),
    "log": Setting("the task log", shared=True),
    "partitions": Setting(
        "partitions of the task log; on Kafka, of each queue's topic", 1, 4096, shared=True
    ),
    "kafka_replication": Setting(
        "copies of each partition on Kafka; 0: as many as brokers, three at most", 0, 32
    ),
    "kafka_acks": Setting("what a send waits for on Kafka: all, or 1 (faster; a broker's loss may lose it)"),
    "kafka_properties": Setting(
        "file of librdkafka's own settings (KEY=VALUE lines), readable by its owner alone"
    ),
    "kafka_protocol": Setting("how nodes share partitions on Kafka: consumer, classic, or auto"),
    "bloom_seed": Setting("seed of the Bloom filter; drawn for each cluster", 0, 2**32 - 1, shared=True),
    "consumes": Setting("whether this node takes tasks from the log"),
    "session_timeout_ms": Setting("ledger time without a heartbeat until the session lapses", 200, 590_000),
    "heartbeat_ms": Setting("time between heartbeats of the session", 20, 200_000),
    "fence_margin_ms": Setting("how long before its session can lapse a node stops its work", 10, 600_000),
    "cpu_workers": Setting("processes for CPU handlers; -1: the cores, shared by the nodes here", -1, 1024),
    "io_workers": Setting("processes for I/O handlers", 0, 1024),
    "io_threads": Setting("threads in each process for I/O handlers", 1, 4096),
    "memory_bytes_max": Setting("memory of one worker process; 0: unlimited", 0),
    "testimony_wait_ms": Setting("how long a suspect's former holder may take to testify", 0, 600_000),
    "schedule_late_ms": Setting("how late a schedule's firing may be and still not be missed", 0, 86_400_000),
    "drain_ms_max": Setting("how long a stopping node lets running tasks finish", 0, 3_600_000),
    "log_keep_ms": Setting("how long committed tasks stay in the embedded log", 0),
    "history_keep_ms": Setting("how long the history of a task is kept", 0),
    "crash_at": Setting(
        "for tests of recovery: STEP or STEP:N, kill this node when it comes there (N times)"
    ),
    "journal_entries_max": Setting("Raft log entries after which a snapshot shortens the journal", 100),
    "record_history": Setting(
        "for checkers of whole histories: a file that gets a line for what is asked and heard"
    ),
    "history_queue_max": Setting("history records that may wait for the disk; then intake pauses", 100),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What each field means, and its bounds, stands in SETTINGS."""

    node_id: str
    cluster_id: str
    cluster_dir: Path
    data_dir: Path
    peers: Mapping[str, Peer]
    raft: Address
    http: Address
    wake: int
    tls: bool = False
    http_tls: bool = False
    certs_dir: Path = Path()
    app: str = ""
    app_dir: Path = Path()
    log: str = "embedded"
    partitions: int = 12
    kafka_replication: int = 0
    kafka_acks: str = "all"
    kafka_properties: str = ""
    kafka_protocol: str = "auto"
    bloom_seed: int = 0
    consumes: bool = True
    session_timeout_ms: int = 4000
    heartbeat_ms: int = 1000
    fence_margin_ms: int = 1000
    cpu_workers: int = -1
    io_workers: int = 1
    io_threads: int = 16
    memory_bytes_max: int = 1 << 30
    testimony_wait_ms: int = 1500
    schedule_late_ms: int = 30_000
    drain_ms_max: int = 10_000
    log_keep_ms: int = DAY_MS
    history_keep_ms: int = 7 * DAY_MS
    history_queue_max: int = 100_000
    crash_at: str = ""
    journal_entries_max: int = 100_000
    record_history: str = ""

    @property
    def log_place(self) -> Place:
        from oncekeeper.log.opening import Place

        return Place(
            url=self.log,
            directory=self.cluster_dir,
            cluster_id=self.cluster_id,
            partitions=self.partitions,
            replication=self.kafka_replication,
            acks=self.kafka_acks,
            settings_file=str(self.cluster_dir / self.kafka_properties) if self.kafka_properties else "",
            protocol=self.kafka_protocol,
            index_dir=self.data_dir,
        )

    @property
    def secret_path(self) -> Path:
        return self.cluster_dir / "secret"

    @property
    def raft_peers(self) -> dict[str, Address]:
        return {name: peer.raft for name, peer in self.peers.items()}

    @property
    def wake_ports(self) -> tuple[int, ...]:
        """The wake ports of all nodes, this one too."""
        return tuple(peer.wake for peer in self.peers.values())
