"""How a replica is set up, and how it says that it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from ssl import SSLContext

from raft.engine import Limits, Timings
from raft.transport import OBSERVER, VOTER, Address, LinkTimings, PeerCounters


@dataclass(frozen=True)
class ReplicaConfig:
    node_id: str
    cluster_id: str
    secret: bytes
    listen: Address
    peers: Mapping[str, Address]
    """The voters but for this node, and where each is dialled."""
    data_dir: Path
    role: str = VOTER
    unborn: Path | None = None
    """A file outside of ``data_dir`` that stands as long as this replica has never held anything (raft/store.py).
    None: nobody laid it down, and only ``data_dir`` can tell."""
    observers: tuple[str, ...] = ()
    """Ids of the observers that may connect."""
    timings: Timings = field(default_factory=Timings)
    links: LinkTimings = field(default_factory=LinkTimings)
    limits: Limits = field(default_factory=Limits)
    server_ssl: SSLContext | None = None
    client_ssl: SSLContext | None = None
    pending_max: int = 100_000
    pending_bytes_max: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        if self.role not in (VOTER, OBSERVER):
            raise ValueError(f"role={self.role!r} must be {VOTER!r} or {OBSERVER!r}")
        if self.node_id in self.peers:
            raise ValueError(f"peers must not name the node itself: {self.node_id!r}")
        if self.role == OBSERVER and not self.peers:
            raise ValueError("peers is empty: an observer needs voters to learn from")
        both = set(self.observers) & {self.node_id, *self.peers}
        if both and self.role == VOTER:
            raise ValueError(f"observers={sorted(both)} are voters too: a node is one of both")
        for name in (self.node_id, *self.peers, *self.observers):
            if not 1 <= len(name.encode()) <= 64:
                raise ValueError(f"node id {name!r} must have 1 to 64 bytes")
        if len(self.secret) < 16:
            raise ValueError(f"secret has {len(self.secret)} bytes; at least 16 are needed")
        if self.links.idle_ms < self.timings.election_ms_max:
            raise ValueError(
                f"links.idle_ms={self.links.idle_ms} must not be below election_ms_max="
                f"{self.timings.election_ms_max}: a slow leader is not a lost link"
            )


@dataclass(frozen=True)
class PeerStatus:
    name: str
    role: str
    connected: bool
    match_index: int
    """Known to a leader only; else 0."""
    counters: PeerCounters


@dataclass(frozen=True)
class ReplicaStatus:
    node_id: str
    role: str
    """leader, follower, candidate, observer, or stopped."""
    term: int
    leader: str | None
    applied_index: int
    commit_index: int
    last_index: int
    snapshot_index: int
    has_quorum: bool
    ready: bool
    """Has caught up, since the start, with what a leader of the present term had committed."""
    pending: int
    strangers: int
    fatal: str | None
    peers: tuple[PeerStatus, ...]
    refused: Mapping[str, int] = field(default_factory=dict)
    """Connections refused, by reason (raft/tls.py, raft/connection.py); the strangers are those who dialled us."""
