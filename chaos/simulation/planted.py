"""Bugs, planted one at a time into the node's code for the length of a run: what does the simulator see?

Each is a small mutation of real code, of the kind that a hurried change makes. A bug that no seed finds is a hole
in the simulator. docs/simulation.md has the table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import chaos.simulation.workers
import dedup.keyed
import node.coordinator
import node.doubt
import node.offsets
import node.performing
import node.service
import node.session
import node.settling
import node.sweeper
import node.sweeping
import node.testify
import node.testifying
import node.workers.pools
import node.workers.slot
import node.workers.testimony
import raft.engine
import raft.engine_append
import raft.engine_base
import raft.engine_election
import raft.engine_snapshot
import raft.journal
import raft.journal_segments
import raft.ledger
import raft.ledger_claims
import raft.ledger_registry
import raft.ledger_sessions
import raft.ledger_snapshot
import raft.ledger_state
import raft.ledger_suspects
import raft.ledger_tokens
import raft.replica
import raft.snapshots
import raft.store
from chaos.simulation.planted_delays import DELAYS
from chaos.simulation.planted_schedules import RESCHEDULES, SCHEDULES
from chaos.simulation.plants import Plant
from chaos.simulation.plants import edit as _edit
from chaos.simulation.plants import replaced as _set
from chaos.simulation.plants import rule as _rule


def _put(owner: Any, name: str, value: Any) -> Callable[[], AbstractContextManager[None]]:
    return lambda: _set(owner, name, value)


def _all(*plants: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    @contextlib.contextmanager
    def put_in() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for plant in plants:
                stack.enter_context(plant())
            yield

    return put_in


_append, _elect, _snap = (
    raft.engine_append.Replication,
    raft.engine_election.Elections,
    raft.engine_snapshot.Snapshots,
)
_coordinator = node.coordinator.Coordinator

PLANTS: tuple[Plant, ...] = (
    # --- the journal and the vote -------------------------------------------------------------------------------
    Plant(
        "no-fsync",
        "the journal writes a batch and does not sync it",
        _edit(raft.journal_segments.Segments, "append", "self._file.fdatasync()", "pass"),
    ),
    Plant(
        "ack-before-sync",
        "a follower acknowledges what it has not synced",
        _edit(_append, "_answer_leader", "self.log.sync()\n", "pass\n"),
    ),
    Plant(
        "leader-counts-unsynced",
        "a leader counts its own entries without ever syncing them",
        _edit(
            raft.engine.Engine, "step", "self._replicate()\n            self.log.sync()", "self._replicate()"
        ),
    ),
    Plant(
        "vote-forgotten",
        "term and vote are kept in memory only",
        _edit(
            raft.journal.Journal,
            "setCurrentTerm",
            "self._append(Kind.TERM, int(votedForNodeId is not None), term, vote)",
            "pass",
        ),
    ),
    Plant(
        "vote-for-anybody",
        "a vote does not compare logs, nor does a pre-vote",
        _all(
            _edit(_elect, "_on_vote_request", '"last_log_term": m.last_term', '"last_log_term": 10**9'),
            _edit(
                _elect,
                "_on_prevote_request",
                "(m.last_term, m.last_index) < (self.last_term, self.last_index)",
                "False",
            ),
        ),
    ),
    Plant(
        "votes-without-journal",
        "a voter that lost its journal votes as if it remembered",
        _put(raft.engine_base.EngineBase, "votes", property(lambda self: not self.observer)),
    ),
    Plant(
        "learner-counts",
        "an entry is committed by the word of a voter that lost its journal (found by seed 118)",
        _edit(_append, "_on_append_reply", "if m.learning:", "if False:"),
    ),
    Plant(
        "catching-up-is-enough",
        "a voter that lost its journal votes again when it has caught up with whoever leads (found by seed 118)",
        _edit(
            raft.engine.Engine,
            "_apply_committed",
            "(self.observer or self.votes or self.learns)",
            "(self.observer or self.votes)",
        ),
    ),
    Plant(
        "failed-sync-forgiven",
        "after a failed sync the journal goes on as if nothing had been lost",
        _edit(raft.journal.Journal, "sync", 'self._fail(f"writing {segments.path}", error)', "pass"),
    ),
    Plant(
        "doubtful-tail-believed",
        "a tail whose sync may have failed is believed at the next start, and not written anew",
        _edit(
            raft.journal_segments.Segments,
            "resume",
            "self._file.pwrite(found.doubtful, found.proven_end)",
            "pass",
        ),
    ),
    # --- replication --------------------------------------------------------------------------------------------
    Plant(
        "cut-what-is-equal",
        "a follower cuts its log at every append, equal or not, committed or not",
        _edit(
            _append,
            "_take_entries",
            "if journal[index - first][2] == term:\n                continue\n"
            "            if index <= self.commit_index:",
            "if False:",
        ),
    ),
    Plant(
        "match-is-taken-back",
        "a leader believes that a peer holds everything as soon as it connects",
        _edit(
            raft.engine.Engine,
            "connected",
            "self._SyncObj__raftMatchIndex[node] = 0",
            "self._SyncObj__raftMatchIndex[node] = self.last_index",
        ),
    ),
    Plant(
        "stale-term-accepted",
        "a follower takes entries from a leader of an older term",
        _edit(_append, "_on_append", "if m.term < self.term:", "if False:"),
    ),
    Plant(
        "barrier-lies",
        "a read barrier is passed without asking anybody",
        _edit(
            raft.replica.Replica,
            "barrier",
            "waiting = self._proposals.barrier()",
            "return True",
        ),
    ),
    # --- snapshots ----------------------------------------------------------------------------------------------
    Plant(
        "snapshot-not-synced",
        "a snapshot takes its place before its bytes are durable",
        _edit(raft.snapshots.SnapshotStore, "write", "file.fsync()", "pass"),
    ),
    Plant(
        "journal-cut-first",
        "the journal gives up entries before the snapshot that holds them is durable",
        _edit(_snap, "compact", "self._store(snapshot, self._compacted)", "self._compacted(snapshot)"),
    ),
    Plant(
        "snapshot-rewinds",
        "an old snapshot that is sent again takes the machine back",
        _all(
            _edit(_snap, "_on_snapshot_chunk", "if m.index <= self.applied_index:", "if False:"),
            _edit(
                _snap,
                "_install_arrived",
                "if arrived is None or arrived.index <= self.applied_index:",
                "if arrived is None:",
            ),
            _edit(_snap, "_installed", "if snapshot.index <= self.applied_index:", "if False:"),
            _edit(_snap, "_store", "elif snapshot.index > self.snapshot_index:", "else:"),
        ),
    ),
    Plant(
        "snapshot-without-retries",
        "a snapshot forgets what waits for another attempt",
        _edit(
            raft.ledger,
            "state_bytes",
            "for ids, value in state.states.items():",
            "for ids, value in [e for e in state.states.items() if type(e[1]).__name__ != 'Waiting']:",
        ),
    ),
    Plant(
        "old-snapshot-for-ever",
        "a peer is sent the same snapshot again although the journal has left it behind (found by seed 159)",
        _edit(_append, "_on_append_reply", "and held >= transfer.snapshot.index", "and False"),
    ),
    Plant(
        "damaged-snapshot-opened",
        "the body of a snapshot is not checked when the store is opened (found by seed 47)",
        _edit(raft.store, "_open", "snapshots.load()", "pass"),
    ),
    # --- the ledger ---------------------------------------------------------------------------------------------
    Plant(
        "settle-without-fence",
        "a settle closes whatever claim is open, of whatever fence",
        _edit(
            raft.ledger_claims,
            "_settle_part",
            "elif value.fence != settlement.fence:\n            put(spans, count, Outcome.FENCED)\n"
            "        elif isinstance(value, OpenClaim):\n            if value.session != session:",
            "elif isinstance(value, OpenClaim):\n            if False:",
        ),
    ),
    Plant(
        "held-is-granted",
        "a claim of what another session holds is granted",
        _edit(raft.ledger_claims, "_claimable", "if value.session != command.session:", "if False:"),
    ),
    Plant(
        "fence-does-not-grow",
        "a retry is granted under the fence of the attempt before",
        _edit(
            raft.ledger_claims,
            "_claim_part",
            "OpenClaim(fence, command.session, value.attempt))\n            shown = fence",
            "OpenClaim(value.fence, command.session, value.attempt))\n            shown = value.fence",
        ),
    ),
    Plant(
        "rerun-on-timeout",
        "what a lapsed session held is free at once, without evidence",
        _edit(
            raft.ledger_sessions,
            "suspect_claims",
            "state.move(ids, len(ids), claim, suspect)",
            "now = state.now_ms\n"
            "        freed = Waiting(claim.fence, claim.attempt, now, 'retry', now)\n"
            "        state.move(ids, len(ids), claim, freed)",
        ),
    ),
    Plant(
        "testimony-twice",
        "a node may testify again, and otherwise",
        _edit(
            raft.ledger_suspects,
            "take_word",
            "if incarnation in suspect.testified:\n        return word.fact is Fact.STARTED\n"
            "    if word.fact is Fact.NEVER_STARTED and suspect.testified:",
            "if False:",
        ),
    ),
    Plant(
        "retry-delay-ignored",
        "a retry may start at once, whatever its delay",
        _edit(raft.ledger_claims, "_close", "now + settlement.delay_ms", "now"),
    ),
    Plant(
        "cancel-what-runs",
        "a cancel is acknowledged although the task was claimed",
        _edit(
            raft.ledger_registry,
            "_cancel_part",
            "elif isinstance(value, Waiting):",
            "elif isinstance(value, Waiting | OpenClaim):",
        ),
    ),
    Plant(
        "ruling-without-fence",
        "a ruling hits whatever suspect stands, of a later claim too",
        _rule(
            "rule", "Rule", "elif command.fence not in (0, value.fence):", "elif False:", raft.ledger_suspects
        ),
    ),
    Plant(
        "executed-forgotten",
        "an executed id is new again when it is seen again",
        _edit(
            raft.ledger_state.LedgerState,
            "unknown",
            "        if executed:\n            yield part, count, Outcome.EXECUTED\n            continue\n",
            "",
        ),
    ),
    Plant(
        "bloom-is-proof",
        "a positive of the Bloom filter is taken for proof that a key was executed",
        _put(dedup.keyed.Generation, "find", lambda self, keys, hashes: self.perhaps(hashes)),
    ),
    Plant(
        "token-window-ignored",
        "a proposal that is asked again is applied again",
        _put(raft.ledger_tokens.Tokens, "recall", lambda self, proposer, sequence, commands: None),
    ),
    # --- time and leases ----------------------------------------------------------------------------------------
    Plant(
        "advance-by-wall-clock",
        "ledger time is measured by the leader's wall clock",
        _edit(
            node.service.Service,
            "_keep_time",
            "now = self.clock.monotonic_ms()",
            "now = float(self.clock.wall_ms())",
        ),
    ),
    Plant(
        "stale-lease",
        "a node that cannot reach the ledger goes on working",
        _all(
            _put(node.session.SessionKeeper, "_lease_ended", lambda self: None),
            _edit(
                node.session.SessionKeeper,
                "_confirmed",
                "self._on_lease(self.lease.deadline_ms)",
                "self._on_lease(self.lease.deadline_ms + 3_600_000)",
            ),
        ),
    ),
    Plant(
        "lease-from-the-answer",
        "a lease is counted from the answer to a heartbeat, not from its sending, and without a margin",
        _edit(
            node.session.SessionKeeper,
            "_confirmed",
            "self.lease.confirmed(sent_ms)",
            "self.lease.confirmed(self._clock.lease_ms() + self._config.fence_margin_ms)",
        ),
    ),
    # --- the coordinator ----------------------------------------------------------------------------------------
    Plant(
        "commit-before-settle",
        "a position moves over a task when its worker says done, before the ledger has it",
        _edit(
            _coordinator,
            "_ended",
            "        else:\n            self._closings.append(each)",
            "        else:\n            self._closings.append(each)\n"
            "            if each.result is Result.DONE:\n"
            "                self._partitions.settled(each.piece)",
        ),
    ),
    Plant(
        "highest-instead-of-contiguous",
        "a position jumps to the highest settled offset",
        _edit(
            node.offsets.Offsets,
            "settle",
            "start = max(start, self.position)",
            "start = self.position",
        ),
    ),
    Plant(
        "answer-of-an-old-session",
        "a claim that was granted to a session of before is dispatched under the present one",
        _edit(
            _coordinator, "_granted", "if session != self.session or self._draining:", "if self._draining:"
        ),
    ),
    Plant(
        "dispatch-before-answer",
        "a task is dispatched when its claim is asked for, and not when it is granted",
        _edit(
            _coordinator,
            "_gather_claims",
            "(keyed if is_keyed(part) else ranges).append(part)",
            "(keyed if is_keyed(part) else ranges).append(part)\n"
            "                if info is not None:\n"
            "                    from node.settling import make_work\n"
            "                    from node.workers.port import Mode\n"
            "                    number = next(self._numbers)\n"
            "                    self._effects.append(m.Dispatch(make_work(number, Mode.RUN, part, 0, 1, info)))",
        ),
    ),
    Plant(
        "due-time-ignored",
        "a delayed task is run at once",
        _edit(
            _coordinator,
            "_route",
            "if wait_ms > 0:",
            "if False:",
        ),
    ),
    Plant(
        "due-time-looked-at-once",
        "how long to wait for a due time is computed once, by whatever the wall clock says then (found by seed 79)",
        _edit(_coordinator, "_route", "min(wait_ms, DUE_LOOK_MS)", "wait_ms"),
    ),
    Plant(
        "dead-before-aside",
        "a dead letter is settled before its message is put aside",
        _edit(
            _coordinator,
            "_dead",
            'self._put_aside("dead", closing.ended(Result.DEAD), reason)',
            "self._closings.append(closing.ended(Result.DEAD))",
        ),
    ),
    Plant(
        "aside-not-stored",
        "a message counts as put aside before the log has it",
        _edit(
            node.performing.Performing,
            "_store_aside",
            "await self._log.run(lambda log: log.put_aside(tasks))\n    self.feed(m.AsideStored(ticket))",
            "self.feed(m.AsideStored(ticket))\n    await asyncio.sleep(1.0)\n"
            "    await self._log.run(lambda log: log.put_aside(tasks))",
        ),
    ),
    Plant(
        "dead-is-for-good",
        "what the own ledger calls dead is passed, though it may be behind (found by seed 347)",
        _edit(
            _coordinator,
            "_intake",
            "if span.outcome in (Outcome.DEAD, Outcome.CANCELLED):",
            "if False:",
        ),
    ),
    # --- doubt --------------------------------------------------------------------------------------------------
    Plant(
        "check-not-asked",
        "a suspect whose handler has a check is run again without it",
        _edit(
            node.doubt.Doubts,
            "_decide",
            "self._check(doubt, info, effects)",
            "self._rule(doubt, Verdict.NOT_EXECUTED, 'check', '')\n            return False",
        ),
    ),
    Plant(
        "check-upside-down",
        "a check that found the effect is taken for one that did not",
        _edit(
            node.doubt.Doubts,
            "_checked",
            "self._rule(doubt, Verdict.EXECUTED,",
            "self._rule(doubt, Verdict.NOT_EXECUTED,",
        ),
    ),
    Plant(
        "held-not-put-aside",
        "a suspect that waits for a human is passed without being put aside",
        _edit(
            node.doubt.Doubts,
            "_park",
            "doubt.step = _Step.PARKING",
            "self._rule(doubt, Verdict.HELD, 'policy:hold', reason)\n    doubt.look_ms = 10**15\n    return",
        ),
    ),
    Plant(
        "sweeper-drops-first",
        "what was put aside is dropped before it is appended again",
        _edit(
            node.sweeper,
            "append_again",
            "if batches:\n",
            "log.drop_aside(kept)\n    if batches:\n",
        ),
    ),
    Plant(
        "failed-node-lingers",
        "a node that failed waits for answers that nobody will give (found by seed 85)",
        _edit(
            node.service.Service,
            "_wind_down",
            "while not self.coordinator.idle and self._exit_code == 0:",
            "while not self.coordinator.idle:",
        ),
    ),
    Plant(
        "stale-sweep",
        "a leader sweeps by a ledger that may be behind (found by seed 298)",
        _edit(
            node.sweeping.Sweeping,
            "_sweep",
            "while not await self._barrier():",
            "while False:",
        ),
    ),
    # --- evidence -----------------------------------------------------------------------------------------------
    Plant(
        "absence-is-proof",
        'an incomplete work journal proves "never started"',
        _edit(node.testifying, "testimonies", "life_evidence is not None and life_evidence.complete", "True"),
    ),
    Plant(
        "wrong-life-testifies",
        "the journals of a life before tell of this process's own former session (found by a hanging worker)",
        _edit(
            node.testifying.Testifying, "speak", "lives(suspects, evidence.lives())", "lives(suspects, kept)"
        ),
    ),
    Plant(
        "boot-id-ignored",
        "marks of before a power loss are taken for evidence",
        _edit(chaos.simulation.workers, "weigh", "if manifest.boot_id != boot_id:", "if False:"),
    ),
    Plant(
        "marks-forgotten-early",
        "a worker's marks are freed when it reports, before the settle is confirmed",
        _edit(
            node.workers.pools.WorkerPools,
            "_take",
            "if part.ended is Ended.NOT_STARTED or handed.work.mode is not Mode.RUN:",
            "if True:",
        ),
    ),
    Plant(
        "crashed-means-not-started",
        "a task whose worker died in it is taken for one that never started",
        _edit(
            node.workers.slot,
            "_ended",
            "return Ended.TIMED_OUT if position in handed.timed_out else Ended.CRASHED",
            "return Ended.NOT_STARTED",
        ),
    ),
    Plant(
        "finished-means-raised",
        "a task that had finished when its worker died is tried again",
        _edit(
            node.workers.slot,
            "_ended",
            "if state == State.FINISHED:\n        return Ended.DONE",
            "if state == State.FINISHED:\n        return Ended.RAISED",
        ),
    ),
    Plant(
        "kill-is-not-a-kill",
        "a node without a lease does not kill its workers, nor does its guard",
        _all(
            _put(node.workers.pools.WorkerPools, "kill_all", lambda self: None),
            _put(chaos.simulation.workers.SimulatedGuard, "kill", lambda self: None),
            _put(chaos.simulation.workers.SimulatedWorker, "_may_start", lambda self: True),
        ),
    ),
    *DELAYS,
    *SCHEDULES,
    *RESCHEDULES,
)
BY_NAME = {plant.name: plant for plant in PLANTS}
