"""The ledger: a pure, total, deterministic function of its commands.

``effects = ledger.apply(index, payload)``. Replicas that apply the same entries hold the same state and give the
same answers; ``digest`` compares them. No clock, no I/O, no randomness is in here: time is what ``Advance`` says,
and the fence of a claim is the index of its entry, which only grows (Gray & Cheriton, Leases, SOSP 1989, for the
sessions; Kleppmann, How to do distributed locking, 2016, for why a lease needs a fence).

Three kinds of wrong. Bytes or commands that break a rule are answered ``Rejected`` and change nothing. Ids that
cannot be acted on get an outcome that says what stands. A broken invariant raises ``LedgerCorrupt``, and the node
must stop. Nothing else is ever raised by ``apply``.

A proposal's token (proposer, sequence) is looked up first, so proposing again is safe (raft/ledger_tokens.py).
The rules are in ledger_sessions, ledger_claims, ledger_suspects, ledger_schedules and ledger_registry; the state
and its moves in ledger_state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from dedup.ids import Ids, TaskId
from dedup.suspects import Suspect, SuspectRun, page
from raft import (
    ledger_claims,
    ledger_reads,
    ledger_registry,
    ledger_schedules,
    ledger_sessions,
    ledger_suspects,
)
from raft.codec import CodecError, decode_proposal, open_snapshot, seal_snapshot
from raft.commands import (
    Advance,
    AllocateIds,
    Answer,
    Cancel,
    Claim,
    DeleteSchedule,
    Effects,
    Fire,
    Heartbeat,
    Hold,
    Join,
    Launched,
    Leave,
    PauseSchedule,
    Proposal,
    PutClass,
    PutQueue,
    PutSchedule,
    Rejected,
    Revive,
    Rule,
    Settle,
    Span,
    Testify,
)
from raft.ledger_check import check_invariants
from raft.ledger_reads import TaskState
from raft.ledger_snapshot import state_bytes, state_from
from raft.ledger_state import (
    BadInput,
    Counts,
    Firing,
    HandlerClass,
    LedgerCorrupt,
    LedgerSettings,
    LedgerState,
    QueueSetting,
    Schedule,
    Session,
)
from raft.ledger_tokens import UINT64_MAX

__all__ = ["Counts", "Ledger", "LedgerCorrupt", "LedgerSettings", "Session", "TaskState"]

DIGEST_BYTES = 16

# Each function checks its whole command before it changes anything.
_RULES: Final[Mapping[type, Callable[[LedgerState, Any], Answer]]] = {
    Claim: ledger_claims.claim,
    Settle: ledger_claims.settle,
    Heartbeat: ledger_sessions.heartbeat,
    Advance: ledger_sessions.advance,
    Join: ledger_sessions.join,
    Leave: ledger_sessions.leave,
    AllocateIds: ledger_registry.allocate_ids,
    Testify: ledger_suspects.testify,
    Rule: ledger_suspects.rule,
    Cancel: ledger_registry.cancel,
    Revive: ledger_registry.revive,
    Hold: ledger_registry.hold,
    PutQueue: ledger_registry.put_queue,
    PutClass: ledger_registry.put_class,
    PutSchedule: ledger_schedules.put_schedule,
    DeleteSchedule: ledger_schedules.delete_schedule,
    PauseSchedule: ledger_schedules.pause_schedule,
    Fire: ledger_schedules.fire,
    Launched: ledger_schedules.launched,
}

_UNREADABLE = Proposal(0, 0, ())


class Ledger:
    """One replica. Not for use by several threads at once."""

    def __init__(self, bloom_seed: int, settings: LedgerSettings | None = None) -> None:
        """``bloom_seed`` and ``settings`` must be equal on all replicas of a cluster."""
        self._state = LedgerState(bloom_seed, settings or LedgerSettings())
        self._listing: tuple[int, list[SuspectRun]] = (-1, [])

    # --- changes ----------------------------------------------------------------------------------------------

    def apply(self, index: int, payload: bytes) -> Effects:
        """Apply the log entry ``index``. Bytes that are no proposal get a single ``Rejected``.

        The proposal of such Effects is ``Proposal(0, 0, ())``. LedgerCorrupt as for ``apply_proposal``.
        """
        try:
            proposal = decode_proposal(payload)
        except CodecError as error:
            # Every replica refuses these bytes alike: the entry counts, and changes nothing else.
            self._step(index)
            return Effects(index, _UNREADABLE, (Rejected(str(error)),), ())
        return self.apply_proposal(index, proposal)

    def apply_proposal(self, index: int, proposal: Proposal) -> Effects:
        """Apply a decoded entry. ``index`` must be above the last one; gaps are entries of the engine's own.

        LedgerCorrupt if it is not, or if the state contradicts itself.
        """
        self._step(index)
        state = self._state
        proposer, sequence, commands = proposal.proposer, proposal.sequence, proposal.commands
        if not (0 <= proposer <= UINT64_MAX and 1 <= sequence <= UINT64_MAX):
            return self._refuse(
                index, proposal, "proposer and sequence must fit 64 bits, and sequence be >= 1"
            )
        if len(commands) > state.settings.commands_max:
            limit = state.settings.commands_max
            return self._refuse(index, proposal, f"commands: {len(commands)} are more than {limit}")
        known = state.tokens.recall(proposer, sequence, len(commands))
        if known is not None:
            return Effects(index, proposal, known, (), True)
        answers = tuple([self._answer(command) for command in commands])
        state.tokens.keep(proposer, sequence, answers, state.now_ms)
        events = tuple(state.events)
        state.events.clear()
        return Effects(index, proposal, answers, events)

    def _step(self, index: int) -> None:
        if index <= self._state.index:
            raise LedgerCorrupt(f"entry {index} must be above {self._state.index}, which was applied")
        self._state.index = index

    def _answer(self, command: object) -> Answer:
        try:
            return _RULES[type(command)](self._state, command)
        except BadInput as bad:
            return Rejected(str(bad))

    def _refuse(self, index: int, proposal: Proposal, reason: str) -> Effects:
        return Effects(index, proposal, (Rejected(reason),) * len(proposal.commands), ())

    # --- the whole --------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """The state, sealed (raft/codec.py); equal states give equal bytes. Costs time in the state's size."""
        return seal_snapshot(state_bytes(self._state))

    def restore(self, data: bytes) -> None:
        """Become the state of a snapshot. CodecError, and no change, if the bytes are none of this cluster."""
        state = self._state
        self._state = state_from(open_snapshot(data), state.bloom_seed, state.settings)
        self._listing = (-1, [])

    def digest(self) -> bytes:
        """16 bytes, equal on all replicas that applied the same entries. Costs time in the state's size."""
        return hashlib.blake2b(
            state_bytes(self._state), digest_size=DIGEST_BYTES, person=b"oncekeeper-state"
        ).digest()

    def check_invariants(self) -> None:
        """LedgerCorrupt if anything contradicts. Walks over everything: for tests and simulation."""
        check_invariants(self._state)

    # --- reads ------------------------------------------------------------------------------------------------

    @property
    def applied_index(self) -> int:
        return self._state.index

    @property
    def now_ms(self) -> int:
        return self._state.now_ms

    @property
    def settings(self) -> LedgerSettings:
        return self._state.settings

    @property
    def sessions(self) -> Mapping[int, Session]:
        """The live sessions, by number. A view: it changes with ``apply`` and is replaced by ``restore``."""
        return MappingProxyType(self._state.sessions)

    def session_of(self, node: str) -> Session | None:
        """The live session of a node."""
        number = self._state.session_of.get(node)
        return None if number is None else self._state.sessions[number]

    def live_nodes(self) -> tuple[str, ...]:
        """The nodes with a live session, by name."""
        return tuple(sorted(self._state.session_of))

    def classify(self, ids: Ids) -> tuple[Span, ...]:
        """What a Claim by a stranger would say, with no effect; NEW for what it would be granted."""
        return ledger_reads.classify(self._state, ids)

    def describe(self, task_id: TaskId) -> TaskState:
        """What the ledger knows of one id."""
        return ledger_reads.describe(self._state, task_id)

    def suspects(self, after: TaskId | None, limit: int) -> tuple[SuspectRun, ...]:
        """Up to ``limit`` ids in canonical order that come after ``after`` (None: from the start).

        The first page after a change sorts all suspects; the next ones are slices.
        """
        version, listing = self._listing
        if version != self._state.suspects_version:
            listing = ledger_reads.all_suspects(self._state)
            self._listing = (self._state.suspects_version, listing)
        return page(listing, after, limit)

    def suspicions(self, ids: Ids) -> list[tuple[int, Suspect | None]]:
        """(count, suspect or None), run-length over the order of the ids."""
        return ledger_reads.suspicions(self._state, ids)

    def suspects_of(self, node: str) -> tuple[SuspectRun, ...]:
        """The suspects that this node left, in canonical order; costs what it left."""
        return ledger_reads.suspects_of(self._state, node)

    def counts(self) -> Counts:
        return self._state.counts()

    def open_claims(self, session: int) -> Iterator[tuple[Ids, int, int]]:
        """(ids, fence, attempt) of what a session holds, fences ascending."""
        for ids, claim in ledger_suspects.open_claims(self._state, session):
            yield ids, claim.fence, claim.attempt

    @property
    def queues(self) -> Mapping[str, QueueSetting]:
        """Queues that were ever paused or resumed; all others run."""
        return MappingProxyType(self._state.queues)

    def paused(self, queue: str) -> bool:
        setting = self._state.queues.get(queue)
        return setting is not None and setting.paused

    def paused_queues(self) -> frozenset[str]:
        return frozenset(name for name, setting in self._state.queues.items() if setting.paused)

    @property
    def classes(self) -> Mapping[str, HandlerClass]:
        """Learned classes, by handler."""
        return MappingProxyType(self._state.classes)

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        return MappingProxyType(self._state.schedules)

    @property
    def firings(self) -> Mapping[tuple[str, int], Firing]:
        """Decided firings of which no word came yet that they are in the task log, by (schedule, time)."""
        return MappingProxyType(self._state.firings)
