"""The consensus engine: PySyncObj 0.3.17 with its defects closed, as a state machine without I/O of its own.

Theory. What the library gets right stays its own: it starts elections, counts votes, grants them to candidates with
a log at least as good (S:929), commits by figure 8's rule (S:670) and lets a new leader append a no-op (S:1227).
Everything else is replaced, each replacement naming the defect it closes (numbers as in docs, rows 1-14).

The host owns the loop: it calls ``receive``, ``connected``, ``disconnected`` as things happen, ``step`` soon
after the engine asks for it by ``Host.wake``, and ``step`` again when ``deadline`` has come. No call waits.
Everything that came in between two steps is appended, synced and sent as one. A step, in this order:

  follower: sync, acknowledge  |  stand for election if due  |  commit  |  append and forward proposals
  leader: send, then sync      |  apply

A leader's own entries count from the next step on, that is, synced (defect 4). Applying comes last, so that peers
work meanwhile.

Pre-vote (dissertation, 9.6; defect 9): before a term is spent, a majority must agree that it lost its leader
too. So an election may be tried after 30-120 ms when the connection to the leader breaks, and a cut pair
changes no term.

Any exception out of the engine means that this replica must stop: the disk failed, the machine raised, or an
invariant broke. The host calls ``stop`` and reports.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Callable
from typing import Any, Final, NoReturn

from pysyncobj import SyncObj
from pysyncobj.node import Node

from raft.engine_base import (
    EngineCorrupt,
    Host,
    Limits,
    Links,
    Machine,
    MachineFailed,
    Peer,
    SnapshotStore,
    Timings,
)
from raft.engine_election import HURRIES
from raft.engine_library import CANDIDATE, LEADER, Journal, UnfitLibrary, check_library
from raft.engine_rejoin import Rejoining
from raft.wire import (
    APPEND_BYTES,
    NO_OP,
    PAYLOAD,
    TOKEN_END,
    AppendEntries,
    AppendReply,
    Message,
    PreVote,
    PreVoteRequest,
    Propose,
    ProposeRefused,
    SnapshotChunk,
    SnapshotReply,
    Vote,
    VoteRequest,
    token,
)

__all__ = [
    "Engine",
    "EngineCorrupt",
    "Host",
    "Journal",
    "Limits",
    "Links",
    "Machine",
    "MachineFailed",
    "MembershipFixed",
    "SnapshotStore",
    "Timings",
    "UnfitLibrary",
    "check_library",
]

FROM_OBSERVERS: Final = (AppendReply, SnapshotReply, Propose)
TICK: Final = 1e-6
"""The library compares times with < and >; a step at a deadline itself would find nothing due."""
APPLY_BATCH: Final = 256


class MembershipFixed(Exception):
    """A request to change who votes."""


class Engine(Rejoining):
    """One replica's consensus. Single-threaded; see the module for who calls what."""

    def __init__(
        self,
        *,
        node_id: str,
        voters: tuple[str, ...] | list[str] | set[str],
        observer: bool = False,
        machine: Machine,
        journal: Journal,
        snapshots: SnapshotStore,
        links: Links,
        host: Host,
        clock: Callable[[], float],
        random: random_module.Random,
        timings: Timings | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._forwarded: list[bytes] = []
        self._uncommitted_bytes = 0
        super().__init__(
            node_id=node_id,
            voters=voters,
            observer=observer,
            machine=machine,
            journal=journal,
            snapshots=snapshots,
            links=links,
            host=host,
            clock=clock,
            random=random,
            timings=timings or Timings(),
            limits=limits or Limits(),
        )
        self.align()
        # At a start nobody leads here yet; pre-vote makes an early try harmless where somebody does.
        self.election_deadline = self.clock() + self.random.uniform(0.1, 0.4)

    # --- what the host calls ------------------------------------------------------------------------------------

    def connected(self, peer: str, observer: bool = False) -> None:
        """A link to an authenticated peer stands. What was sent on an earlier one may be lost."""
        node = self._nodes.get(peer)
        if node is None:
            node = self._nodes[peer] = Peer(peer)
        voter = node in self._SyncObj__otherNodes
        if voter:
            SyncObj._SyncObj__onNodeConnected(self, node)
        elif observer:
            SyncObj._SyncObj__onReadonlyNodeConnected(self, node)
        else:
            return
        self._SyncObj__raftNextIndex[node] = self.last_index + 1
        # A peer that lost its disk must not be believed to hold what it once acknowledged.
        self._SyncObj__raftMatchIndex[node] = 0
        self._learners.pop(node, None)
        now = self.clock()
        if self.is_leader:
            self._beat_due = True
        elif self.election_deadline < now:
            self.election_deadline = self._hurried_deadline()
        self.host.wake()

    def disconnected(self, peer: str) -> None:
        """The link is gone. If it led to the leader, the leader may be: ask the others soon."""
        node = self._nodes.get(peer)
        if node is None or node not in self._SyncObj__connectedNodes:
            return
        if node in self._SyncObj__otherNodes:
            SyncObj._SyncObj__onNodeDisconnected(self, node)
        else:
            SyncObj._SyncObj__onReadonlyNodeDisconnected(self, node)
            self._SyncObj__lastResponseTime.pop(node, None)
            del self._nodes[peer]
        for table in (self._outgoing, self._learners, self._told, self._reset):
            table.pop(node, None)
        if node == self.leader:
            self._heard = float("-inf")
            self._hurries = HURRIES
            self.election_deadline = min(self.election_deadline, self._hurried_deadline())
        self.host.wake()

    def receive(self, peer: str, message: Message) -> None:
        node = self._nodes.get(peer)
        if self.stopped or node is None:
            return
        voter = node in self._SyncObj__otherNodes
        # Defect 8: an observer's message once deposed the leader. Observers may say how far they are, and propose.
        if not voter and not isinstance(message, FROM_OBSERVERS):
            self.ignored += 1
            return
        with self.on_own_clock():
            # A term is adopted from any voter, at once; but not the one that a pre-vote only asks about.
            if voter and not isinstance(message, PreVoteRequest | PreVote | VoteRequest | Propose):
                self._step_down(message.term)  # type: ignore[union-attr]  # Ping never gets here
            self._handle(node, message)
        self.host.wake()

    def step(self) -> None:
        """Do all that is due, and all that came in since the last step."""
        if self.stopped:
            return
        with self.on_own_clock():
            self._guard_against_stall()
            led = self.is_leader
            if not led:
                self._answer_leader()
                self._ask_for_proof()
                self._stand_if_due()
            SyncObj._onTick(self, 0.0)
            if self.is_leader:
                self._replicate()
                self.log.sync()
                if not self._SyncObj__otherNodes and self.commit_index < self.last_index:
                    self.host.wake()  # alone: what was just synced is a majority
            elif led:
                # Fell back for want of answers (in the library's tick).
                self.election_deadline = self._fresh_deadline()
                self._forget_leadership()
            self._apply_committed()
        self._promised = self.deadline()

    def deadline(self) -> float:
        """The time by which ``step`` must be called even if nothing happens."""
        if self.stopped:
            return float("inf")
        if self.is_leader:
            return float(self._SyncObj__newAppendEntriesTime) + TICK
        if not self.votes or not self._SyncObj__connectedToAnyone():
            return float("inf")
        return self.election_deadline + TICK

    def stop(self) -> None:
        self.stopped = True
        self._doDestroy()

    @property
    def term_applied(self) -> int:
        """The term of the entry applied last."""
        return self._applied_term

    @property
    def leader_id(self) -> str | None:
        leader = self.leader
        return None if leader is None else str(leader.id)

    @property
    def role(self) -> str:
        if self.observer:
            return "observer"
        state = self._SyncObj__raftState
        return "leader" if state == LEADER else "candidate" if state == CANDIDATE else "follower"

    @property
    def has_quorum(self) -> bool:
        """A leader that a majority answers (it would step down), or a follower that hears one."""
        if self.is_leader:
            return True
        return self.leader is not None and self.clock() - self._heard < self.timings.election_ms_max / 1000

    def match_index(self, peer: str) -> int:
        """How far a leader knows the peer to be."""
        node = self._nodes.get(peer)
        if node is None or not self.is_leader:
            return 0
        return int(self._learners.get(node) or self._SyncObj__raftMatchIndex.get(node, 0))

    # --- messages -----------------------------------------------------------------------------------------------

    def _handle(self, node: Node, m: Message) -> None:
        match m:
            case AppendEntries():
                self._on_append(node, m)
            case AppendReply():
                self._on_append_reply(node, m)
            case Propose():
                self._on_propose(node, m)
            case ProposeRefused():
                self._forward_hold = True  # until its next heartbeat, or another leader
                self.host.refused(m.tokens)
            case SnapshotChunk():
                self._on_snapshot_chunk(node, m)
            case SnapshotReply():
                self._on_snapshot_reply(node, m)
            case PreVoteRequest():
                self._on_prevote_request(node, m)
            case PreVote():
                self._on_prevote(node, m)
            case VoteRequest():
                self._on_vote_request(node, m)
            case Vote():
                self._on_vote(node, m)
            case _:
                pass  # Stale: its term was all it had to say

    def _SyncObj__onMessageReceived(self, node: Node, message: object) -> NoReturn:
        # Defect 3: the library's own door for whatever a peer pickled. Nothing leads to it; so it stays.
        raise EngineCorrupt("a message came by the library's own transport")

    # --- leading ------------------------------------------------------------------------------------------------

    def _SyncObj__onBecomeLeader(self) -> None:
        self._forget_leadership()
        SyncObj._SyncObj__onBecomeLeader(self)
        self._uncommitted_bytes = 0
        # Defect 4: the no-op, and whatever a follower had not acknowledged, count from here on.
        self.log.sync()

    # --- proposals ----------------------------------------------------------------------------------------------

    def _checkCommandsToApply(self) -> None:
        """Called by the library's tick: take what the host wants proposed, and what peers forwarded."""
        if self.is_leader:
            forwarded, self._forwarded = self._forwarded, []
            self._append_own_term(forwarded)
            if not self._is_full():
                self._append_own_term(self.host.take(self.term, self.limits.uncommitted_bytes))
            return
        leader = self.leader
        if leader is None or leader not in self._SyncObj__connectedNodes or self._forward_hold:
            return
        while self.links.has_room(leader.id):
            commands = self.host.take(self.term, APPEND_BYTES)
            if not commands:
                return
            if not self.send(leader, Propose(self.term, commands)):
                self.host.refused([token(command) for command in commands])
                return

    def _append_own_term(self, commands: list[bytes]) -> None:
        journal, term, index = self.log, self.term, self.last_index
        for command in commands:
            index += 1
            journal.add(command, index, term)
            self._uncommitted_bytes += len(command)

    def _is_full(self) -> bool:
        """So much waits for a majority that more would only grow the heap."""
        if self.commit_index == self.last_index:
            self._uncommitted_bytes = 0
        return (
            self.last_index - self.commit_index > self.limits.uncommitted_entries
            or self._uncommitted_bytes > self.limits.uncommitted_bytes
        )

    def _on_propose(self, node: Node, m: Propose) -> None:
        if not self.is_leader or m.term != self.term or self._is_full():
            self.send(node, ProposeRefused(self.term, [token(command) for command in m.commands]))
            return
        self._forwarded.extend(m.commands)

    def _forget_leadership(self) -> None:
        super()._forget_leadership()
        # Never appended: whoever forwarded these learns it from the entries of the next term.
        self._forwarded = []

    def _applyCommand(self, command: bytes, callback: object, commandType: object = None) -> NoReturn:
        # Defects 7, 11: the library's queue and callbacks are not used; the host matches entries by their tokens.
        raise EngineCorrupt("commands go through Host.take, not through the library's queue")

    # --- applying -----------------------------------------------------------------------------------------------

    def _SyncObj__applyLogEntries(self) -> bool:
        return False  # the library applies before it sends; here a step ends with _apply_committed

    def _apply_committed(self) -> None:
        until = self.clock() + self.limits.apply_ms / 1000
        while self.applied_index < self.commit_index:
            start = self.applied_index + 1 - self.first_index
            count = min(APPLY_BATCH, self.commit_index - self.applied_index)
            for command, index, term in self.log[start : start + count]:
                result = self._SyncObj__doApplyCommand(command, index)
                self._SyncObj__raftLastApplied = index
                self._applied_term = term
                self._applied_bytes += len(command)
                if command == self._proof:
                    self._rejoined()
                self.host.applied(index, term, command, result)
            if self.applied_index < self.commit_index and self.clock() >= until:
                self.host.wake()
                break
        if not self.ready and self._applied_term == self.term:
            known = self.commit_index if self.is_leader else self._SyncObj__leaderCommitIndex
            self.ready = known is not None and self.applied_index >= known
            if self.ready and not (self.observer or self.votes or self.learns):
                self._rejoined()  # of two voters: the leader holds all that was ever acknowledged by both

    def _SyncObj__doApplyCommand(self, command: bytes, index: int = 0) -> object:
        # Defect 7: in the library a command that raises is applied again and again, on every node, for ever.
        # Here it stops this replica: what raised on a committed entry has a state that cannot be trusted.
        kind = command[0]
        if kind == PAYLOAD:
            try:
                return self.machine.apply(index, command[TOKEN_END:])
            except Exception as error:
                raise MachineFailed(
                    f"the state machine failed on the entry at index {index}: {error!r}"
                ) from error
        if kind != NO_OP:
            raise EngineCorrupt(f"the entry at index {index} is of kind {kind}, which no replica writes")
        return None

    def _doDestroy(self) -> None:
        self.log._destroy()

    # --- doors of the library that stay shut --------------------------------------------------------------------

    def _refuse_change(self, *_: Any, **__: Any) -> NoReturn:
        # Defect 10: the guard against two changes at once is never set (S:186), so majorities could disagree.
        raise MembershipFixed(
            "voters cannot be added or removed while the cluster runs: two overlapping changes could make two "
            "majorities; stop all nodes, change their configuration, and start them"
        )

    addNodeToCluster = removeNodeFromCluster = _refuse_change
    _addNodeToCluster = _removeNodeFromCluster = _refuse_change
    _SyncObj__changeCluster = _SyncObj__doChangeCluster = _refuse_change

    def _refuse_utility(self, *_: Any, **__: Any) -> NoReturn:
        # Defect 3: reachable by any stranger in the library; here by nobody.
        raise EngineCorrupt("the library's utility commands are off")

    setCodeVersion = _setCodeVersion = transferLeadership = _transferLeadership = _refuse_utility
    # Defects 2, 14: its dump file and its dictionary of attributes; see engine_snapshot.py.
    _SyncObj__loadDumpFile = _refuse_utility
    _SyncObj__sendNextNodeIdx = _refuse_utility
