"""Opening a replica's durable store, and what becomes of one that is damaged.

Damage is never believed and never repaired in place. The store is moved aside whole, and the replica comes back
as one that has forgotten everything: it learns from its peers, and gives no vote until it has caught up with
them (``Journal.rejoining``). So a flipped bit on one disk costs a resynchronisation; and if a majority of the
disks is damaged at once, nobody votes and the cluster stands still, because going on could lose what was
acknowledged. A cluster of one has nobody to learn from: there the damage is raised.

A file ``initialised`` beside the store tells a new replica from one whose store was deleted: the latter has
forgotten its votes too.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from raft.journal import Journal, JournalDamaged
from raft.journal_quarantine import quarantine
from raft.replica_config import ReplicaConfig
from raft.snapshots import SnapshotDamaged, SnapshotGap, SnapshotStore, check_alignment

_log = logging.getLogger("oncekeeper.raft")

INITIALISED = "initialised"


class StoreLost(Exception):
    """There was a store here, and it is gone."""


def open_store(config: ReplicaConfig) -> tuple[Journal, SnapshotStore]:
    """The journal and the snapshots of a replica, whole and aligned; healed by moving a damaged store aside."""
    try:
        journal, snapshots = _open(config)
    except (JournalDamaged, SnapshotDamaged, SnapshotGap, StoreLost) as damage:
        if not config.peers:
            raise
        moved = _move_aside(config)
        _log.critical(
            "the store of %s cannot be believed (%s); it was moved to %s, and the replica learns anew from its "
            "peers, without a vote until it has caught up",
            config.node_id,
            damage,
            moved,
        )
        journal, snapshots = _open(config)
    _mark_initialised(config.data_dir)
    return journal, snapshots


def _open(config: ReplicaConfig) -> tuple[Journal, SnapshotStore]:
    snapshots = SnapshotStore(config.data_dir / "snapshots", cluster_id=config.cluster_id)
    journal = Journal.open(config.data_dir / "journal", cluster_id=config.cluster_id)
    try:
        header = snapshots.header()
        check_alignment(journal, header)
        empty = not len(journal) and not journal.getCurrentTerm() and header is None
        if empty and not journal.rejoining and (config.data_dir / INITIALISED).exists():
            raise StoreLost(f"{config.data_dir / 'journal'} is empty, and this replica was in use before")
    except BaseException:
        journal.close()
        raise
    return journal, snapshots


def _move_aside(config: ReplicaConfig) -> str:
    # The journal first: it leaves the marker that withholds the vote, whatever happens after.
    moved = quarantine(config.data_dir / "journal")
    folder = config.data_dir / "snapshots"
    for name in os.listdir(folder) if folder.exists() else ():
        os.replace(folder / name, Path(moved) / f"snapshot-{name}")
    return moved


def _mark_initialised(directory: Path) -> None:
    marker = directory / INITIALISED
    if marker.exists():
        return
    descriptor = os.open(marker, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
