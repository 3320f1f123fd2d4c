"""Elections: when to stand, whom to encourage, whom to vote for.

Pre-vote first (dissertation, 9.6; defect 9): a term is spent only when a majority agrees that it lost its
leader too. The election itself, the counting and the granting of votes are the library's; here each voter
counts once, a stale candidate is told so, and nobody stands who was merely asleep.
"""

from __future__ import annotations

from typing import Any, Final

from pysyncobj import SyncObj
from pysyncobj.node import Node

from raft.engine_append import Replication
from raft.wire import PreVote, PreVoteRequest, Stale, Vote, VoteRequest

HURRIES: Final = 3
HURRY_STEP_S: Final = 0.05


class Elections(Replication):
    def __init__(self, **ports: Any) -> None:
        self._prevotes: set[Node] = set()
        self._votes: tuple[int, set[Node]] = (0, set())
        self._promised = float("inf")
        """When the next step was due, as of the last."""
        super().__init__(**ports)

    def _guard_against_stall(self) -> None:
        # Defect 9: a process that was stopped finds its deadline passed and the leader's heartbeats unread.
        # Read first, stand later.
        if self.clock() - self._promised > 0.3 * self.timings.election_ms_min / 1000:
            grace = self.clock() + 0.5 * self.timings.election_ms_min / 1000
            self.election_deadline = max(self.election_deadline, grace)

    def _stand_if_due(self) -> None:
        if not self.votes:
            self.election_deadline = self._fresh_deadline()
            return
        if not self._SyncObj__connectedToAnyone():
            return
        if not self._prevoted and self.election_deadline < self.clock():
            self._ask_for_prevotes()
        if self._prevoted:
            # The library starts the election itself, in the tick that follows.
            self._prevoted = False
            self.election_deadline = float("-inf")

    def _ask_for_prevotes(self) -> None:
        self.election_deadline = self._fresh_deadline()
        if self._hurries:
            # The leader's link broke, but the other may not have noticed its own yet, or holds more of the log
            # and must stand itself: ask again soon. Asking costs no term.
            self._hurries -= 1
            self.election_deadline = min(self.election_deadline, self._hurried_deadline() + HURRY_STEP_S)
        self.leader = None
        self._prevotes = set()
        self._prevote_term = self.term + 1
        self._prevoted = not self._SyncObj__otherNodes
        for node in self._SyncObj__otherNodes:
            self.send(node, PreVoteRequest(self._prevote_term, self.last_index, self.last_term))

    def _on_prevote_request(self, node: Node, m: PreVoteRequest) -> None:
        if m.term <= self.term:
            self.send(node, Stale(self.term))
            return
        if not self.votes or self.is_leader:
            return
        if self.leader is not None and self.clock() - self._heard < self.timings.election_ms_min / 1000:
            return
        if (m.last_term, m.last_index) < (self.last_term, self.last_index):
            return
        # Whom one encourages one does not compete with: else both would stand and split the vote.
        self.election_deadline = max(self.election_deadline, self._fresh_deadline())
        self.send(node, PreVote(m.term))

    def _on_prevote(self, node: Node, m: PreVote) -> None:
        if m.term != self._prevote_term or m.term != self.term + 1 or self.leader is not None:
            return
        self._prevotes.add(node)
        if 2 * (len(self._prevotes) + 1) > len(self._SyncObj__otherNodes) + 1:
            self._prevote_term = 0
            self._prevoted = True

    def _on_vote_request(self, node: Node, m: VoteRequest) -> None:
        if m.term < self.term:
            self.send(node, Stale(self.term))
            return
        if not self.votes:
            return
        self._step_down(m.term)
        self.log.sync()  # the log that this vote measures the candidate against must be the one that lasts
        SyncObj._SyncObj__onMessageReceived(
            self,
            node,
            {
                "type": "request_vote",
                "term": m.term,
                "last_log_index": m.last_index,
                "last_log_term": m.last_term,
            },
        )

    def _on_vote(self, node: Node, m: Vote) -> None:
        # The library counts answers, not voters: a repeated one would count twice.
        if m.term != self.term:
            return
        if self._votes[0] != m.term:
            self._votes = (m.term, set())
        if node not in self._votes[1]:
            self._votes[1].add(node)
            SyncObj._SyncObj__onMessageReceived(self, node, {"type": "response_vote", "term": m.term})
