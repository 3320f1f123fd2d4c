"""Opening a replica's durable store, and what becomes of one that is damaged.

Damage is never believed and never repaired in place. The store is moved aside whole, and the replica comes back
as one that has forgotten everything: it learns from its peers, and gives no vote until it has caught up with
them (``Journal.rejoining``). So a flipped bit on one disk costs a resynchronisation; and if a majority of the
disks is damaged at once, nobody votes and the cluster stands still, because going on could lose what was
acknowledged. A cluster of one has nobody to learn from: there the damage is raised.

A file ``initialised`` beside the store tells a new replica from one whose store was deleted: the latter has
forgotten its votes too. It is written once the store holds something durable, never before: a power loss in the
first moments of a cluster leaves empty stores, and those are new ones.

That file is lost with the store's whole directory. So whoever makes a cluster may lay down, outside of it, a file
that says the opposite: this replica has never held anything (``ReplicaConfig.unborn``). It is removed at the same
moment; an empty store without it has lost what it had, be it a directory or the whole disk.
"""

from __future__ import annotations

import logging
import os

from raft.files import OS_FILES, Files
from raft.journal import Journal, JournalDamaged
from raft.journal_quarantine import quarantine
from raft.replica_config import ReplicaConfig
from raft.snapshots import SnapshotDamaged, SnapshotGap, SnapshotStore, check_alignment

_log = logging.getLogger("oncekeeper.raft")

INITIALISED = "initialised"


class StoreLost(Exception):
    """There was a store here, and it is gone."""


def open_store(config: ReplicaConfig, files: Files = OS_FILES) -> tuple[Journal, SnapshotStore]:
    """The journal and the snapshots of a replica, whole and aligned; healed by moving a damaged store aside."""
    try:
        journal, snapshots = _open(config, files)
    except (JournalDamaged, SnapshotDamaged, SnapshotGap, StoreLost) as damage:
        if not config.peers:
            raise
        moved = _move_aside(config, files)
        _log.critical(
            "the store of %s cannot be believed (%s); it was moved to %s, and the replica learns anew from its "
            "peers, without a vote until it has caught up",
            config.node_id,
            damage,
            moved,
        )
        journal, snapshots = _open(config, files)
    return journal, snapshots


def _open(config: ReplicaConfig, files: Files) -> tuple[Journal, SnapshotStore]:
    snapshots = SnapshotStore(config.data_dir / "snapshots", files=files, cluster_id=config.cluster_id)
    journal = Journal.open(config.data_dir / "journal", files=files, cluster_id=config.cluster_id)
    try:
        header = snapshots.header()
        check_alignment(journal, header)
        if header is not None:
            snapshots.load()  # the body's checksum too: the engine would find out when nothing can be healed
        empty = not len(journal) and not journal.getCurrentTerm() and header is None
        if empty and not journal.rejoining and _was_used(config, files):
            raise StoreLost(f"{config.data_dir / 'journal'} is empty, and this replica was in use before")
    except BaseException:
        journal.close()
        raise
    return journal, snapshots


def _was_used(config: ReplicaConfig, files: Files) -> bool:
    if files.exists(f"{config.data_dir}/{INITIALISED}"):
        return True
    return config.unborn is not None and not files.exists(os.fspath(config.unborn))


def _move_aside(config: ReplicaConfig, files: Files) -> str:
    # The journal first: it leaves the marker that withholds the vote, whatever happens after.
    moved = quarantine(config.data_dir / "journal", files)
    folder = f"{config.data_dir}/snapshots"
    for name in files.list(folder):
        files.rename(f"{folder}/{name}", f"{moved}/snapshot-{name}")
    return moved


def mark_initialised(
    directory: str | os.PathLike[str],
    files: Files = OS_FILES,
    unborn: str | os.PathLike[str] | None = None,
) -> None:
    """To be called when the replica has caught up: then it has a term, and entries, on its disk."""
    directory = os.fspath(directory)
    marker = f"{directory}/{INITIALISED}"
    if not files.exists(marker):
        file = files.open(marker, create=True)
        try:
            file.fsync()
        finally:
            file.close()
        files.sync_directory(directory)
    if unborn is not None and files.exists(os.fspath(unborn)):
        files.unlink(os.fspath(unborn))
        files.sync_directory(os.path.dirname(os.fspath(unborn)))
