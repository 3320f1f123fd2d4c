"""Snapshots: compaction of the own journal, and bringing up a peer that is too far behind for entries.

A snapshot is explicit state bytes as of one applied index (defect 14: the library dumps whatever attributes it
finds, in a forked child that may rename its file after a restart). It is written and synced beside the loop and
made current by the living process on the loop, one such job at a time. The journal keeps a tail below the
snapshot.

Safe because: a snapshot holds only applied, hence committed, entries; it is made current before the journal
gives up what it covers; and a start aligns the journal to it (``align``), so a crash between the two loses nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
from pysyncobj.node import Node

from raft.engine_base import EngineBase, EngineCorrupt
from raft.snapshots import Snapshot as StoredSnapshot
from raft.wire import (
    SNAPSHOT_CHUNK_BYTES,
    SnapshotChunk,
    SnapshotReply,
    Stale,
)

log = logging.getLogger(__name__)

RETRY_S = 10.0
RESEND_S = 1.0
NO_OP_COMMAND = b"\x01"


@dataclass
class Outgoing:
    """A transfer to one peer: a chunk at a time, the next when the last was answered."""

    snapshot: StoredSnapshot | None = None  # None: being read
    checksum: int = 0
    offset: int = 0
    sent_at: float = float("-inf")
    read_not_before: float = float("-inf")
    reading: bool = False


@dataclass
class Incoming:
    index: int
    term: int
    size: int
    checksum: int
    data: bytearray = field(default_factory=bytearray)


class Snapshots(EngineBase):
    def __init__(self, **ports: Any) -> None:
        self.snapshot_index = 1
        self._outgoing: dict[Node, Outgoing] = {}
        self._learners: dict[Node, int] = {}
        """How far those are whose word counts for no commit."""
        self._incoming: Incoming | None = None
        self._arrived: StoredSnapshot | None = None  # whole, and to be stored or being stored
        self._storing = False
        self._compact_not_before = float("-inf")
        self._applied_bytes = 0  # since the last snapshot
        super().__init__(**ports)

    # --- start ------------------------------------------------------------------------------------------------

    def align(self) -> None:
        """Bring machine, snapshot and journal together at start."""
        stored = self.snapshots.load()
        index, term = (stored.index, stored.term) if stored else (1, 0)
        if stored:
            self.machine.restore(stored.state)
        journal = self.log
        if len(journal) == 0:
            journal.add(NO_OP_COMMAND, index, term)
        if self.first_index > index:
            raise EngineCorrupt(
                f"the journal begins at index {self.first_index}, but the snapshot ends at {index}: entries "
                "between them are lost; this replica must be rebuilt from its peers"
            )
        # Defect 2: the library throws the whole journal away when its head is not the snapshot's. Here everything
        # behind the snapshot stays, unless the journal does not reach it: then a leader's snapshot was installed
        # just before a crash, and nothing in the journal is newer.
        if self.last_index < index or self.entry_term(index) != term:
            journal.clear()
            journal.add(NO_OP_COMMAND, index, term)
        journal.sync()
        self.snapshot_index = self.applied_index = index
        self._applied_term = term
        kept = journal.getRaftCommitIndex()
        self._SyncObj__raftCommitIndex = min(max(kept, index), self.last_index)
        self._SyncObj__raftCurrentTerm = max(journal.getCurrentTerm(), self.last_term)
        voted = journal.getVotedForNodeId() if journal.getCurrentTerm() == self.term else None
        self._SyncObj__votedForNodeId = voted

    # --- own journal --------------------------------------------------------------------------------------------

    def _SyncObj__tryLogCompaction(self) -> None:
        # Called by the library at the end of every tick.
        entries = self.applied_index - self.snapshot_index
        if entries < self.limits.compact_entries and self._applied_bytes < self.limits.compact_bytes:
            return
        if entries > 0 and not self._storing and self.clock() >= self._compact_not_before:
            self.compact()

    def compact(self) -> None:
        """Take a snapshot of the machine as it is now, and shorten the journal when it is durable."""
        snapshot = StoredSnapshot(self.applied_index, self._applied_term, self.machine.snapshot())
        self._applied_bytes = 0
        self._store(snapshot, self._compacted)

    def _store(self, snapshot: StoredSnapshot, then: Callable[[StoredSnapshot], None]) -> None:
        self._storing = True

        def done(install: Callable[[], None] | None, error: BaseException | None) -> None:
            self._storing = False
            if self.stopped:
                return
            if error is not None or install is None:
                # A full disk, say. The journal still holds everything: try again later.
                log.error("snapshot at index %d not stored: %s", snapshot.index, error)
                self._compact_not_before = self.clock() + RETRY_S
                self._arrived = None
            elif snapshot.index > self.snapshot_index:
                install()
                self.snapshot_index = snapshot.index
                then(snapshot)
            if self._arrived is not None:
                self._install_arrived()
            self.host.wake()

        self.host.background(lambda: self.snapshots.write(snapshot), done)

    def _compacted(self, snapshot: StoredSnapshot) -> None:
        keep_from = snapshot.index - self.limits.tail_entries
        if keep_from > self.first_index:
            self.log.deleteEntriesTo(keep_from - self.first_index)

    # --- receiving ----------------------------------------------------------------------------------------------

    def _on_snapshot_chunk(self, node: Node, m: SnapshotChunk) -> None:
        if m.term < self.term:
            self.send(node, Stale(self.term))
            return
        self._follow(node, m.term)
        # Defect 1: the library took ``m.commit_index`` here and committed entries that no leader had matched.
        # The commit index moves only when the snapshot is installed, and then to the snapshot's own index.
        if m.index <= self.applied_index:
            # Defect 6: a re-sent snapshot must not rewind the machine. What is applied here matches it.
            self._incoming = None
            self.log.sync()
            self.send(node, self.reply(m.index))
            return
        if m.size > self.limits.snapshot_bytes:
            raise EngineCorrupt(f"a snapshot of {m.size} bytes is above {self.limits.snapshot_bytes}")
        if self._arrived is not None:
            self.send(node, SnapshotReply(self.term, m.index, m.size))
            return
        part = self._incoming
        if part is None or (part.index, part.term, part.size, part.checksum) != (
            m.index,
            m.index_term,
            m.size,
            m.checksum,
        ):
            part = self._incoming = Incoming(m.index, m.index_term, m.size, m.checksum)
        if m.offset == len(part.data):
            part.data += m.data
        if len(part.data) == part.size:
            self._incoming = None
            state = bytes(part.data)
            if google_crc32c.value(state) != part.checksum:
                self.send(node, SnapshotReply(self.term, m.index, 0))  # damaged on the way: once more
                return
            self._arrived = StoredSnapshot(part.index, part.term, state)
            if not self._storing:
                self._install_arrived()
        self.send(node, SnapshotReply(self.term, m.index, len(part.data)))

    def _install_arrived(self) -> None:
        arrived = self._arrived
        if arrived is None or arrived.index <= self.applied_index:
            self._arrived = None
            return
        self._store(arrived, self._installed)

    def _installed(self, snapshot: StoredSnapshot) -> None:
        self._arrived = None
        if snapshot.index <= self.applied_index:
            return  # entries overtook it while it was written
        self.machine.restore(snapshot.state)
        journal, index = self.log, snapshot.index
        if self.first_index <= index <= self.last_index and self.entry_term(index) == snapshot.term:
            journal.deleteEntriesTo(index - self.first_index)
        else:
            journal.clear()
            journal.add(NO_OP_COMMAND, index, snapshot.term)
        journal.sync()
        self.applied_index = index
        self._applied_term = snapshot.term
        self.commit_index = max(self.commit_index, index)
        self._applied_bytes = 0
        self.host.restored(index, snapshot.term)
        if self.leader is not None and not self.is_leader:
            self.send(self.leader, self.reply(index))

    # --- sending ------------------------------------------------------------------------------------------------

    def _feed_snapshot(self, node: Node) -> None:
        transfer = self._outgoing.get(node)
        if transfer is None:
            transfer = self._outgoing[node] = Outgoing()
        if transfer.snapshot is None and not transfer.reading and self.clock() >= transfer.read_not_before:
            self._read_for(node, transfer)
        if transfer.snapshot is None or not self.links.has_room(node.id):
            return
        if self.clock() - transfer.sent_at >= RESEND_S:
            self._send_chunk(node, transfer)

    def _read_for(self, node: Node, transfer: Outgoing) -> None:
        for other in self._outgoing.values():
            # What another peer is sent will do here too, if the journal goes on from it.
            if other.snapshot is not None and other.snapshot.index >= self.first_index:
                transfer.snapshot, transfer.checksum = other.snapshot, other.checksum
                return

        transfer.reading = True

        def read() -> tuple[StoredSnapshot, int]:
            stored = self.snapshots.load()
            if stored is None:
                raise EngineCorrupt(f"the journal begins at {self.first_index}, but there is no snapshot")
            return stored, google_crc32c.value(stored.state)

        def done(result: tuple[StoredSnapshot, int] | None, error: BaseException | None) -> None:
            if self.stopped or self._outgoing.get(node) is not transfer:
                return
            transfer.reading = False
            if error is not None or result is None:
                # An unreadable snapshot must not go to others. Later a newer one may stand, or another lead.
                log.error("snapshot for %s not read: %s", node.id, error)
                transfer.read_not_before = self.clock() + RETRY_S
                return
            transfer.snapshot, transfer.checksum = result
            self.host.wake()

        self.host.background(read, done)

    def _send_chunk(self, node: Node, transfer: Outgoing) -> None:
        snapshot = transfer.snapshot
        if snapshot is None:
            return
        data = snapshot.state[transfer.offset : transfer.offset + SNAPSHOT_CHUNK_BYTES]
        chunk = SnapshotChunk(
            self.term,
            self.commit_index,
            snapshot.index,
            snapshot.term,
            len(snapshot.state),
            transfer.checksum,
            transfer.offset,
            data,
        )
        if self.send(node, chunk):
            transfer.sent_at = self.clock()

    def _on_snapshot_reply(self, node: Node, m: SnapshotReply) -> None:
        transfer = self._outgoing.get(node)
        if m.term != self.term or not self.is_leader or transfer is None or transfer.snapshot is None:
            return
        if node not in self._learners:
            self._SyncObj__lastResponseTime[node] = self.clock()
        if m.index != transfer.snapshot.index or m.offset == transfer.offset:
            return
        if m.offset <= len(transfer.snapshot.state):
            transfer.offset = m.offset
            if m.offset < len(transfer.snapshot.state):
                self._send_chunk(node, transfer)

    def _forget_leadership(self) -> None:
        self._outgoing.clear()
        self._learners.clear()
