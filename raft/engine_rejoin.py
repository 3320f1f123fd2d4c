"""How a voter that lost its journal becomes one again.

It has forgotten which entries it acknowledged and whom it gave votes, in terms that it does not know of. Until that
cannot matter any more it gives no vote, and what it acknowledges counts for no commit (AppendReply.learning). It is
not enough that it has caught up with somebody who leads: he may have been deposed in a term that it has forgotten,
and would find in it the majority that he has lost.

So it asks the leader for a *proof*: an entry that it has made up in this life. When that is committed, a majority
without it has taken it, later than anything that was forgotten. Each majority that it was ever part of has a member
in common with this one; so no term that it took part in is above the leader's, and the leader's log, which it holds
up to the proof, has all that was ever committed by its word. (The argument is that of recovery in Viewstamped
Replication, Liskov and Cowling 2012, section 4.3.) Of three voters both others are needed for that.
"""

from __future__ import annotations

from typing import Any, Final

from raft.engine_election import Elections
from raft.wire import INDEX_MAX, NO_OP, Propose, command

ASK_S: Final = 0.5


class Rejoining(Elections):
    def __init__(self, **ports: Any) -> None:
        self._proof = b""
        self._asked_at = float("-inf")
        super().__init__(**ports)

    def _ask_for_proof(self) -> None:
        """By a follower, at each step. Again and again: what was asked may be lost, or be behind a snapshot."""
        leader = self.leader
        if not self.learns or leader is None or self.clock() - self._asked_at < ASK_S:
            return
        if leader not in self._SyncObj__connectedNodes or not self.links.has_room(leader.id):
            return
        if not self._proof:
            draw = self.random.randrange
            self._proof = command(NO_OP, draw(INDEX_MAX) + 1, draw(INDEX_MAX) + 1)
        self._asked_at = self.clock()
        self.send(leader, Propose(self.term, [self._proof]))

    def _rejoined(self) -> None:
        if self.votes or self.observer:
            return
        self.log.sync()
        self.log.finish_rejoining()
        self.election_deadline = self._fresh_deadline()
