"""The node's durable memory of Raft: its log entries, its term and its vote, in one append-only store.

Theory. The store is a row of segments; every change is a record appended to the newest: an entry, a new term
and vote, a cut (entries that conflict with the leader's), a new head (a snapshot holds the rest). Nothing is
overwritten and nothing is copied to shrink the log: a new head only unlinks segments that no live entry lies in.
One ``sync`` writes all that was added since the last as one batch and waits for the disk once (group commit). A
batch is whole or was never written. What ``sync`` returned from survives power loss; what it did not, may.

Term and vote lie in the same row, so that no crash can tear them from the log, and each segment's header repeats
them, so that dropping old segments never forgets a vote (Raft, figure 2: persist before answering).

After any failed write or sync the object refuses everything: the kernel may have dropped the pages it could not
write, and a later sync that "succeeds" would be a lie. The node must stop and open the store again.

The interface is that of ``pysyncobj.journal.Journal`` (positions are list positions, not indices), and ``sync``.
One owner, one thread. Formats: journal_format.py; what is believed on opening: journal_recovery.py.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import NoReturn, overload

from google_crc32c import extend as crc32c_extend
from google_crc32c import value as crc32c

from raft.files import OS_FILES, Files
from raft.journal_format import (
    BATCH_BODY_BYTES_MAX,
    RECORD_HEADER_BYTES,
    VOTE_BYTES_MAX,
    Kind,
    encode_record,
)
from raft.journal_quarantine import quarantine
from raft.journal_recovery import (
    REJOINING_NAME,
    Entry,
    JournalDamaged,
    JournalError,
    JournalFailed,
    JournalRefused,
    Recovered,
    recover,
    runs_from,
)
from raft.journal_segments import Segments

__all__ = [
    "Entry",
    "Journal",
    "JournalDamaged",
    "JournalError",
    "JournalFailed",
    "JournalRefused",
    "quarantine",
]

_TAIL = Struct("<IBQQ").pack
_U32 = Struct("<I").pack
SEGMENT_BYTES = 64 << 20


class _Refusing(list[Entry]):
    """Stands in for the entries after a failure, so that reads cost nothing while all is well."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self._why = why

    def _refuse(self, *_: object) -> NoReturn:
        raise JournalFailed(self._why)

    __getitem__ = __len__ = __iter__ = __bool__ = _refuse


class Journal:
    """Made by ``Journal.open`` only. Not safe for use from several threads at once."""

    __slots__ = (
        "_batch",
        "_batch_bytes",
        "_batch_records",
        "_commit_index",
        "_directory",
        "_entries",
        "_entry_bytes",
        "_failed",
        "_files",
        "_next_index",
        "_oldest",
        "_rejoining",
        "_runs",
        "_segment",
        "_segment_bytes",
        "_segments",
        "_synced_index",
        "_term",
        "_vote",
        "torn_bytes",
    )

    def __init__(self, directory: str, files: Files, cluster: bytes, segment_bytes: int) -> None:
        self._directory, self._files = directory, files
        self._segment_bytes = segment_bytes
        self._segments = Segments(files, directory, cluster)
        self._segment = 0  # = self._segments.number, one step nearer to the hot path
        self._oldest = 1
        self._entries: list[Entry] = []
        self._runs: list[tuple[int, int]] = []  # (first live index, segment that has it), ascending
        self._next_index = 0  # 0: any
        self._entry_bytes = 0
        self._term = 0
        self._vote: str | None = None
        self._batch: list[bytes] = []
        self._batch_bytes = self._batch_records = 0
        self._synced_index = 0
        self._commit_index = 1
        self._failed: str | None = None
        self._rejoining = files.exists(f"{directory}/{REJOINING_NAME}")
        self.torn_bytes = 0
        """Bytes of an unsynced batch that a crash had left at the end, cut on opening."""

    # --- opening and closing

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        files: Files = OS_FILES,
        cluster_id: str = "",
        segment_bytes: int = SEGMENT_BYTES,
    ) -> Journal:
        """Open or make the store; ``cluster_id`` is 32 hex digits, or empty for a store that belongs to none.

        Raises JournalDamaged (do not vote; see ``quarantine``), JournalRefused (another cluster's, or newer),
        JournalFailed.
        """
        path = os.fspath(directory)
        cluster = bytes.fromhex(cluster_id).rjust(16, b"\0")
        if len(cluster) != 16:
            raise ValueError(f"cluster_id has {len(cluster)} bytes; it must have 16 (32 hex digits)")
        journal = cls(path, files, cluster, segment_bytes)
        try:
            found = recover(files, path, cluster)
            if found is None:
                journal._segments.create()
                journal._begin_segment()
            else:
                journal._resume(found)
        except OSError as error:
            journal._segments.close()
            journal._fail(f"opening {path}", error)
        journal._synced_index = journal.last_index
        return journal

    def _resume(self, found: Recovered) -> None:
        contents = found.contents
        self._entries, self._runs, self._next_index = contents.entries, contents.runs, contents.next_index
        self._entry_bytes = sum(len(entry[0]) for entry in contents.entries)
        self._term, self._vote, self._oldest = contents.term, contents.vote, contents.oldest
        self._commit_index = found.mark.commit_index
        self.torn_bytes = found.torn_bytes
        self._segments.resume(found)
        self._segment = self._segments.number

    def _destroy(self) -> None:
        """Sync and close. After a failure it only closes."""
        try:
            if self._failed is None:
                self.sync()
                self._segments.sync_mark()
        except OSError as error:
            self._fail("closing", error)
        finally:
            self._segments.close()
            self._refuse_from_now_on(self._failed or f"the journal in {self._directory} is closed")

    close = _destroy

    # --- entries

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Append in memory; durable when ``sync`` returns."""
        if self._failed is not None:
            raise JournalFailed(self._failed)
        if idx != self._next_index and (self._next_index or idx < 1):
            raise ValueError(f"entry {idx} cannot be added: {self._next_index or 'one above 0'} must follow")
        if not self._runs or self._runs[-1][1] != self._segment:
            self._runs.append((idx, self._segment))
        size = len(command)
        tail = _TAIL(size, 1, idx, term)  # encode_record, inlined: this is the hot path
        self._batch += (_U32(crc32c_extend(crc32c(tail), command)), tail, command)
        self._batch_bytes += RECORD_HEADER_BYTES + size
        self._batch_records += 1
        self._entries.append((command, idx, term))
        self._entry_bytes += size
        self._next_index = idx + 1

    def sync(self) -> None:
        """Make all that was added, cut or set durable: one write, one fdatasync. Nothing pending: nothing done."""
        self._refuse_if_failed()
        if not self._batch:
            return
        if self._batch_bytes > BATCH_BODY_BYTES_MAX:
            raise ValueError(
                f"{self._batch_bytes} bytes in one batch; sync before {BATCH_BODY_BYTES_MAX} are added"
            )
        segments = self._segments
        try:
            segments.append(self._batch, self._batch_bytes, self._batch_records, self._commit_index)
            self._batch, self._batch_bytes, self._batch_records = [], 0, 0
            self._synced_index = self.last_index
            segments.drop_below(self._oldest)
            if segments.sizes[self._segment] >= self._segment_bytes:
                self._begin_segment()
        except OSError as error:
            self._fail(f"writing {segments.path}", error)

    def _begin_segment(self) -> None:
        self._segments.begin_next(self._next_index, self._oldest, self._term, self._vote, self._commit_index)
        self._segment = self._segments.number

    def _append(self, kind: Kind, index: int, term: int, payload: bytes = b"") -> None:
        self._refuse_if_failed()
        record = encode_record(kind, index, term, payload)
        self._batch.append(record)
        self._batch_bytes += len(record)
        self._batch_records += 1

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        """Forget the entries from list position ``entryFrom`` on; durable with the next ``sync``."""
        if entryFrom >= len(self._entries):
            return
        index = self._entries[entryFrom][1]
        self._append(Kind.CUT, index, 0)
        self._entry_bytes -= sum(len(entry[0]) for entry in self._entries[entryFrom:])
        del self._entries[entryFrom:]
        while self._runs and self._runs[-1][0] >= index:
            self._runs.pop()
        self._next_index = index
        self._synced_index = min(self._synced_index, index - 1)

    def deleteEntriesTo(self, entryTo: int) -> None:
        """Forget the first ``entryTo`` entries; segments that hold no other go with the next ``sync``.

        Call it only when a durable snapshot holds them.
        """
        entryTo = min(entryTo, len(self._entries))
        if entryTo <= 0:
            return
        index = self._entries[entryTo - 1][1] + 1
        runs = runs_from(self._runs, index) if entryTo < len(self._entries) else []
        oldest = runs[0][1] if runs else self._segment
        self._append(Kind.HEAD, index, oldest)
        self._entry_bytes -= sum(len(entry[0]) for entry in self._entries[:entryTo])
        del self._entries[:entryTo]
        self._runs, self._oldest = runs, oldest

    def clear(self) -> None:
        """Forget all entries; the next may have any index. One batch with what is added until the next ``sync``."""
        self._append(Kind.RESET, 0, self._segment)
        self._entries.clear()
        self._runs, self._oldest = [], self._segment
        self._next_index = self._synced_index = self._entry_bytes = 0

    @overload
    def __getitem__(self, item: int) -> Entry: ...

    @overload
    def __getitem__(self, item: slice) -> list[Entry]: ...

    def __getitem__(self, item: int | slice) -> Entry | list[Entry]:
        return self._entries[item]

    def __len__(self) -> int:
        return len(self._entries)

    # --- term, vote, commit index

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        """Durable on return, with all added before. Terms never fall; a vote never changes in its term."""
        if term < self._term:
            raise ValueError(f"term {term} is below the current term {self._term}")
        if term == self._term and self._vote not in (None, votedForNodeId):
            raise ValueError(
                f"the vote of term {term} went to {self._vote!r} and cannot become {votedForNodeId!r}"
            )
        vote = b"" if votedForNodeId is None else votedForNodeId.encode()
        if len(vote) > VOTE_BYTES_MAX:
            raise ValueError(f"a node id of {len(vote)} bytes; at most {VOTE_BYTES_MAX} are kept")
        self._append(Kind.TERM, int(votedForNodeId is not None), term, vote)
        # Before the sync, which may begin a new segment, whose header repeats them.
        self._term, self._vote = term, votedForNodeId
        self.sync()

    def getCurrentTerm(self) -> int:
        self._refuse_if_failed()
        return self._term

    def getVotedForNodeId(self) -> str | None:
        self._refuse_if_failed()
        return self._vote

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """Kept as a hint that spares a restart some waiting; Raft does not need it."""
        self._commit_index = raftCommitIndex

    def getRaftCommitIndex(self) -> int:
        return max(1, min(self._commit_index, self.last_index))

    # --- facts

    @property
    def last_index(self) -> int:
        """Index of the last entry, synced or not; 0 when there is none."""
        return self._entries[-1][1] if self._entries else 0

    @property
    def synced_index(self) -> int:
        """Entries up to here survive power loss: the most a leader counts for itself or a follower confirms."""
        return self._synced_index

    @property
    def bytes_total(self) -> int:
        """Bytes of the live entries' commands."""
        return self._entry_bytes

    @property
    def bytes_on_disk(self) -> int:
        return sum(self._segments.sizes.values())

    @property
    def rejoining(self) -> bool:
        """True since ``quarantine``: votes given before are forgotten, so this node may learn but not vote."""
        return self._rejoining

    def finish_rejoining(self) -> None:
        """The node has caught up with a leader whose term is above any it may have voted in: it may vote again."""
        self._refuse_if_failed()
        if not self._rejoining:
            return
        try:
            self._files.unlink(f"{self._directory}/{REJOINING_NAME}")
            self._files.sync_directory(self._directory)
        except OSError as error:
            self._fail("removing the rejoining marker", error)
        self._rejoining = False

    def onOneSecondTimer(self) -> None:
        """Make the mark durable: then damage to the last batch is told from a torn tail even after power loss."""
        self.sync()
        try:
            self._segments.sync_mark()
        except OSError as error:
            self._fail("syncing the mark", error)

    # --- failure

    def _fail(self, doing: str, error: OSError) -> NoReturn:
        why = (
            f"{doing} failed: {error}. What reached the disk is unknown, so this journal takes and gives nothing "
            "more: stop the node, mend the disk (space, permissions, hardware) and start it again"
        )
        self._refuse_from_now_on(why)
        raise JournalFailed(why) from error

    def _refuse_if_failed(self) -> None:
        if self._failed is not None:
            raise JournalFailed(self._failed)

    def _refuse_from_now_on(self, why: str) -> None:
        self._failed = why
        self._entries = _Refusing(why)
