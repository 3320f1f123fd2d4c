"""Replication: what a follower does with entries, and how a leader feeds its peers.

Follower: entries are compared one by one, the log is cut only at a real conflict and never at or below the commit
index, and nothing is acknowledged before it is synced; all that arrived together is synced and answered once.

Leader: sends optimistically and in a bounded window, the same message to all peers that stand at the same place,
*before* it syncs its own journal; a peer whose log differs answers where to go on. When the commit index moves and
nothing else is to be sent, an empty append carries it at once, because a proposer on a follower waits for it.
"""

from __future__ import annotations

from typing import Any

from pysyncobj.node import Node

from raft.engine_base import EngineCorrupt
from raft.engine_snapshot import Snapshots
from raft.wire import APPEND_BYTES, AppendEntries, AppendReply, Stale

APPENDS_PER_TURN = 8
"""To one peer in one step, so that one peer's catch-up does not starve the loop."""
ENTRIES_PER_APPEND = 2048


class Replication(Snapshots):
    def __init__(self, **ports: Any) -> None:
        self._ack: tuple[Node, int] | None = None
        """The leader to answer, and how far the log equals its own."""
        self._told: dict[Node, int] = {}  # the commit index last sent to a peer
        self._reset: dict[Node, tuple[int, float]] = {}
        super().__init__(**ports)

    # --- follower -----------------------------------------------------------------------------------------------

    def _on_append(self, node: Node, m: AppendEntries) -> None:
        if m.term < self.term:
            # Defect 5: silence would leave a deposed leader in office until its fallback.
            self.send(node, Stale(self.term))
            return
        self._follow(node, m.term)
        if m.beat:
            self._forward_hold = False
        self._SyncObj__leaderCommitIndex = m.commit_index
        if self._ack is not None and self._ack[0] != node:
            self._ack = None
        first, last = self.first_index, self.last_index
        previous, entries = m.prev_index, m.entries
        match = previous + len(entries)
        if previous > last:
            self.send(node, self.reply(0, last + 1))
            return
        if previous < first:
            # All up to ``first`` is committed here and so equals the leader's log.
            entries, previous = entries[first - previous :], first
        elif self.entry_term(previous) != m.prev_term:
            self.send(node, self.reply(0, self._conflict_start(previous)))
            return
        self._take_entries(previous, last, entries)
        if m.entries or m.beat:
            self._ack = (node, max(match, self._ack[1] if self._ack else 0))
        committed = min(m.commit_index, match)
        if committed > self.commit_index:
            self.commit_index = committed

    def _take_entries(self, previous: int, last: int, entries: list[tuple[int, bytes]]) -> None:
        """Defect 5: the library cut everything behind ``previous`` even if it was equal, acknowledged, applied."""
        journal, first = self.log, self.first_index
        index = previous
        for term, command in entries:
            index += 1
            if index <= last:
                if journal[index - first][2] == term:
                    continue
                if index <= self.commit_index:
                    raise EngineCorrupt(
                        f"{self.leader.id if self.leader else '?'} has term {term} at index {index}, here it is "
                        f"{self.entry_term(index)} and committed (commit index {self.commit_index})"
                    )
                journal.deleteEntriesFrom(index - first)
                last = index - 1
            journal.add(command, index, term)

    def _conflict_start(self, index: int) -> int:
        """Where to try again: the first entry of the conflicting term, and never what is committed."""
        if index <= self.commit_index:
            raise EngineCorrupt(
                f"a leader's log differs at index {index}, which is committed here "
                f"(commit index {self.commit_index})"
            )
        term = self.entry_term(index)
        while (
            index - 1 > self.commit_index
            and index - 1 > self.first_index
            and self.entry_term(index - 1) == term
        ):
            index -= 1
        return index

    def _answer_leader(self) -> None:
        """Defect 4: sync, and only then acknowledge; once for all that came in this turn of the loop."""
        self.log.sync()
        if self._ack is None:
            return
        node, match = self._ack
        self._ack = None
        if node == self.leader:
            # Defect 5: the term goes along, or a late answer could count for another leadership.
            self.send(node, self.reply(match))

    # --- leader -------------------------------------------------------------------------------------------------

    def _on_append_reply(self, node: Node, m: AppendReply) -> None:
        if m.term != self.term or not self.is_leader:
            return
        if m.match > self.last_index:
            self.ignored += 1  # nobody can hold more of this term than its leader: not evidence of anything
            return
        now = self.clock()
        matched, following = self._SyncObj__raftMatchIndex, self._SyncObj__raftNextIndex
        if m.learning:
            # It may have acknowledged to a later leader what it has forgotten: nothing is committed by its word,
            # and it is no part of the majority that keeps a leader in office.
            held = self._learners[node] = max(self._learners.get(node, 0), m.match)
        else:
            self._learners.pop(node, None)
            self._SyncObj__lastResponseTime[node] = now
            held = matched[node] = max(matched[node], m.match)
        following[node] = max(following[node], m.match + 1)
        transfer = self._outgoing.get(node)
        if transfer is not None and held >= self.first_index:
            del self._outgoing[node]
            following[node] = held + 1
        elif transfer is not None and transfer.snapshot is not None and held >= transfer.snapshot.index:
            # It has that snapshot, but while it was sent the journal was shortened beyond it: again, with a newer.
            del self._outgoing[node]
        elif m.next_index and transfer is None:
            wanted = min(max(m.next_index, held + 1), self.last_index + 1)
            # Appends already under way all get the same answer: go back once, and again only after a while.
            at, when = self._reset.get(node, (0, 0.0))
            if wanted != at or now - when > self.timings.heartbeat_ms / 1000:
                self._reset[node] = (wanted, now)
                following[node] = wanted

    def _SyncObj__sendAppendEntries(self) -> None:
        # Called by the library when a heartbeat is due and by a new leader. The sending itself is one per step.
        self._SyncObj__newAppendEntriesTime = self.clock() + self.timings.heartbeat_ms / 1000
        self._beat_due = True

    def _replicate(self) -> None:
        """Bring every connected peer as far as its window allows."""
        beat, self._beat_due = self._beat_due, False
        shared: dict[int, AppendEntries] = {}
        for node in self._SyncObj__otherNodes | self._SyncObj__readonlyNodes:
            if node in self._SyncObj__connectedNodes:
                self._feed(node, beat, shared)

    def _feed(self, node: Node, beat: bool, shared: dict[int, AppendEntries]) -> None:
        following, last = self._SyncObj__raftNextIndex, self.last_index
        sent = 0
        while following[node] <= last and self.links.has_room(node.id):
            index = following[node]
            if index <= self.first_index or node in self._outgoing:
                self._feed_snapshot(node)
                break
            if sent == APPENDS_PER_TURN:
                self.host.wake()
                break
            message = shared.get(index) or self._append_from(index)
            shared[index] = message
            if not self.send(node, message):
                break
            following[node] = index + len(message.entries)
            sent += 1
        if not sent and (beat or self._told.get(node) != self.commit_index):
            self._send_empty(node, beat)
        if sent:
            self._told[node] = self.commit_index

    def _append_from(self, index: int) -> AppendEntries:
        """Defect 12: the library cut a command that exceeded its batch size in a way that garbled it. A command is
        never cut here: the frame limit is above the largest command and a batch together."""
        journal, first = self.log, self.first_index
        entries: list[tuple[int, bytes]] = []
        size = 0
        start = index - first
        for command, _, term in journal[start : start + ENTRIES_PER_APPEND]:
            if entries and size + len(command) > APPEND_BYTES:
                break
            size += len(command)
            entries.append((term, command))
        return AppendEntries(self.term, self.commit_index, index - 1, journal[start - 1][2], entries, False)

    def _send_empty(self, node: Node, beat: bool) -> None:
        """A heartbeat, or the news of a commit."""
        if not self.links.has_room(node.id):
            return
        # A peer in a transfer, or behind the journal, cannot match any of it: the oldest entry is as good a
        # question.
        previous = self.first_index
        if node not in self._outgoing:
            previous = max(previous, self._SyncObj__raftNextIndex[node] - 1)
        message = AppendEntries(self.term, self.commit_index, previous, self.entry_term(previous), [], beat)
        if self.send(node, message):
            self._told[node] = self.commit_index

    def _forget_leadership(self) -> None:
        super()._forget_leadership()
        self._told.clear()
        self._reset.clear()
        self._ack = None
