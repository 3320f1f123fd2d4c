"""One replica as the node sees it: propose bytes, learn what became of them.

Outcomes are ``Applied``, ``Refused`` (surely not in the log, now or ever) and ``Unknown`` (sent; nothing more can be said in
time). The proposer's own replica applies the entry too, so the result is its machine's answer, and nothing but
entries and refusals travels.

How a lost proposal becomes certain. A proposal is sent under a *key*: the term, and the generation of links. Log order
follows keys: a leader takes proposals of its own term only, a link delivers in order, and a new link drops what the old
one had not delivered. So when an entry of a later term, or one of our own with a later key, is applied before the
proposal was, that proposal can never be: it is sent again under a new key, within its time, without risk of a
second effect. What a leader's snapshot skipped over is ``Unknown``.

Everything runs on the loop that called ``start``; the disk is synced inline, snapshots are written beside the loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from raft.engine import Engine, Journal, Limits, Machine, SnapshotStore, Timings
from raft.journal import Journal as FileJournal
from raft.snapshots import SnapshotStore as FileSnapshots
from raft.snapshots import check_alignment
from raft.transport import OBSERVER, VOTER, Address, LinkTimings, PeerCounters, Transport
from raft.wire import ENTRY_BYTES_MAX, INDEX_MAX, NO_OP, PAYLOAD, TOKEN_END, Message, command, token_numbers

log = logging.getLogger(__name__)

PAYLOAD_BYTES_MAX: Final = ENTRY_BYTES_MAX - TOKEN_END
DEADLINE_STEP_S: Final = 0.02
BARRIER_MS_MAX: Final = 10_000
TAKE_BYTES_MAX: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Applied:
    index: int
    result: Any
    """What ``machine.apply`` returned on this replica."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Not in the log, and never will be."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """It may or may not have been applied, or may yet be."""

    reason: str


Outcome = Applied | Refused | Unknown


@dataclass(frozen=True)
class ReplicaConfig:
    node_id: str
    cluster_id: str
    secret: bytes
    listen: Address
    peers: Mapping[str, Address]
    """The voters but for this node, and where each is dialled."""
    data_dir: Path
    role: str = VOTER
    observers: tuple[str, ...] = ()
    """Ids of the observers that may connect."""
    timings: Timings = field(default_factory=Timings)
    links: LinkTimings = field(default_factory=LinkTimings)
    limits: Limits = field(default_factory=Limits)
    pending_max: int = 100_000
    pending_bytes_max: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        if self.role not in (VOTER, OBSERVER):
            raise ValueError(f"role={self.role!r} must be {VOTER!r} or {OBSERVER!r}")
        if self.node_id in self.peers:
            raise ValueError(f"peers must not name the node itself: {self.node_id!r}")
        if self.role == OBSERVER and not self.peers:
            raise ValueError("peers is empty: an observer needs voters to learn from")
        both = set(self.observers) & {self.node_id, *self.peers}
        if both and self.role == VOTER:
            raise ValueError(f"observers={sorted(both)} are voters too: a node is one of both")
        for name in (self.node_id, *self.peers, *self.observers):
            if not 1 <= len(name.encode()) <= 64:
                raise ValueError(f"node id {name!r} must have 1 to 64 bytes")
        if len(self.secret) < 16:
            raise ValueError(f"secret has {len(self.secret)} bytes; at least 16 are needed")
        if self.links.idle_ms < self.timings.election_ms_max:
            raise ValueError(
                f"links.idle_ms={self.links.idle_ms} must not be below election_ms_max="
                f"{self.timings.election_ms_max}: a slow leader is not a lost link"
            )


@dataclass(frozen=True)
class PeerStatus:
    name: str
    role: str
    connected: bool
    match_index: int
    """Known to a leader only; else 0."""
    counters: PeerCounters


@dataclass(frozen=True)
class ReplicaStatus:
    node_id: str
    role: str
    """leader, follower, candidate, observer, or stopped."""
    term: int
    leader: str | None
    applied_index: int
    commit_index: int
    last_index: int
    snapshot_index: int
    has_quorum: bool
    ready: bool
    """Has caught up, since the start, with what a leader of the present term had committed."""
    pending: int
    strangers: int
    fatal: str | None
    peers: tuple[PeerStatus, ...]


class _Pending:
    __slots__ = ("command", "future", "key", "sequence")

    def __init__(self, sequence: int, command_bytes: bytes, future: asyncio.Future[Outcome] | None) -> None:
        self.sequence = sequence
        self.command = command_bytes
        self.future = future
        self.key: tuple[int, int] | None = None  # None: not sent


class Replica:
    """See the module. ``on_applied(index, payload, result)`` sees every entry in order, once per process life."""

    def __init__(
        self,
        config: ReplicaConfig,
        machine: Machine,
        *,
        on_applied: Callable[[int, bytes, Any], None] | None = None,
        on_status: Callable[[ReplicaStatus], None] | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
        on_restored: Callable[[int], None] | None = None,
        open_store: Callable[[ReplicaConfig], tuple[Journal, SnapshotStore]] | None = None,
    ) -> None:
        self.config = config
        self.machine = machine
        self.on_applied = on_applied
        self.on_status = on_status
        self.on_fatal = on_fatal
        self.on_restored = on_restored
        self.fatal: BaseException | None = None
        self._open_store = open_store or _open_store
        self._engine: Engine | None = None
        self._transport: Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._seen: tuple[object, ...] = ()
        self._background: set[asyncio.Future[Any]] = set()
        self._closing: asyncio.Task[None] | None = None
        # A new origin at each start: an entry of an earlier life must not answer a proposal of this one.
        self._origin = secrets.randbelow(INDEX_MAX) + 1
        self._sequence = 0
        self._queue: deque[_Pending] = deque()
        self._pending: dict[int, _Pending] = {}
        self._pending_bytes = 0
        self._in_flight: dict[tuple[int, int], int] = {}
        self._generation = 0
        self._applied_term = 0
        self._barrier: _Pending | None = None
        self._deadlines: dict[int, list[_Pending]] = {}
        self._deadline_timer: asyncio.TimerHandle | None = None

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the store, replay, listen. Raises what is wrong with either; then nothing runs."""
        config = self.config
        self._loop = asyncio.get_running_loop()
        transport = Transport(
            node_id=config.node_id,
            role=config.role,
            cluster_id=config.cluster_id,
            secret=config.secret,
            listen=config.listen,
            peers=config.peers,
            observers=config.observers,
            receiver=self,
            timings=config.links,
        )
        journal, snapshots = self._open_store(config)
        try:
            self._engine = Engine(
                node_id=config.node_id,
                voters=[*config.peers, *([config.node_id] if config.role == VOTER else [])],
                observer=config.role == OBSERVER,
                machine=self.machine,
                journal=journal,
                snapshots=snapshots,
                links=transport,
                host=self,
                clock=time.monotonic,
                random=random.Random(),
                timings=config.timings,
                limits=config.limits,
            )
            self._applied_term = self._engine.term_applied
            self._transport = transport
            await transport.start()
        except BaseException:
            journal._destroy()
            self._engine = None
            raise
        self.wake()

    async def stop(self) -> None:
        """Close links and store. What is unsent is refused, what is sent is unknown."""
        self._shut("the replica was stopped")
        if self._closing is not None:
            await self._closing
        if self._background:
            await asyncio.wait(self._background)

    def _shut(self, reason: str) -> None:
        engine, transport = self._engine, self._transport
        if engine is None or engine.stopped:
            return
        for timer in (self._timer, self._deadline_timer):
            if timer is not None:
                timer.cancel()
        try:
            engine.stop()
        except Exception as error:
            # The journal refuses after a failure; what was acknowledged is synced already.
            log.warning("journal not closed cleanly: %s", error)
        for pending in list(self._pending.values()):
            self._resolve(pending, Refused(reason) if pending.key is None else Unknown(reason))
        self._queue.clear()
        if transport is not None and self._loop is not None:
            self._closing = self._loop.create_task(transport.stop())
        self._report()

    def _fail(self, error: BaseException) -> None:
        """The engine raised: this replica must not say another word."""
        if self.fatal is not None or (self._engine is not None and self._engine.stopped):
            return
        self.fatal = error
        log.critical("replica %s stops: %s", self.config.node_id, error, exc_info=error)
        self._shut(f"the replica failed: {error}")
        if self.on_fatal is not None:
            self.on_fatal(error)

    # --- proposing --------------------------------------------------------------------------------------------------

    def submit(self, payload: bytes, *, timeout_ms: int = 5000) -> asyncio.Future[Outcome]:
        """Propose without waiting. The future is never an exception; cancelling it abandons only the answer."""
        if len(payload) > PAYLOAD_BYTES_MAX:
            reason = f"payload of {len(payload)} bytes is above payload_bytes_max={PAYLOAD_BYTES_MAX}"
            return self._refusal(reason)
        return self._propose(PAYLOAD, payload, timeout_ms)

    async def propose(self, payload: bytes, *, timeout_ms: int = 5000) -> Outcome:
        return await self.submit(payload, timeout_ms=timeout_ms)

    async def barrier(self, timeout_ms: int = 5000) -> bool:
        """True: everything acknowledged anywhere before this call is applied here. Callers share one entry."""
        shared = self._barrier
        if shared is None or shared.key is not None or shared.future is None or shared.future.done():
            future = self._propose(NO_OP, b"", BARRIER_MS_MAX)
            if future.done():
                return False
            shared = self._barrier = self._pending[self._sequence]
        waiting = shared.future
        if waiting is None:
            return False
        done, _ = await asyncio.wait([waiting], timeout=timeout_ms / 1000)
        return bool(done) and not waiting.cancelled() and isinstance(waiting.result(), Applied)

    def _refusal(self, reason: str) -> asyncio.Future[Outcome]:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        future.set_result(Refused(reason))
        return future

    def _propose(self, kind: int, payload: bytes, timeout_ms: int) -> asyncio.Future[Outcome]:
        engine, loop = self._engine, self._loop
        if engine is None or engine.stopped or loop is None:
            return self._refusal("the replica is not running")
        if (
            len(self._pending) >= self.config.pending_max
            or self._pending_bytes > self.config.pending_bytes_max
        ):
            return self._refusal(f"{len(self._pending)} proposals are pending: slow down")
        self._sequence += 1
        future: asyncio.Future[Outcome] = loop.create_future()
        pending = _Pending(self._sequence, command(kind, self._origin, self._sequence, payload), future)
        self._pending[self._sequence] = pending
        self._pending_bytes += len(pending.command)
        self._queue.append(pending)
        self._expect_by(pending, loop.time() + timeout_ms / 1000)
        if not self._woken:
            self.wake()
        return future

    def _expect_by(self, pending: _Pending, at: float) -> None:
        """Deadlines in steps of 20 ms: one timer for all, and none a proposal."""
        step = int(at / DEADLINE_STEP_S) + 1
        waiting = self._deadlines.get(step)
        if waiting is not None:
            waiting.append(pending)
            return
        self._deadlines[step] = [pending]
        loop = self._loop
        if loop is None:
            return
        if self._deadline_timer is None or self._deadline_timer.when() > step * DEADLINE_STEP_S:
            if self._deadline_timer is not None:
                self._deadline_timer.cancel()
            self._deadline_timer = loop.call_at(step * DEADLINE_STEP_S, self._expire)

    def _expire(self) -> None:
        loop = self._loop
        if loop is None:
            return
        self._deadline_timer = None
        now = loop.time()
        for step in sorted(step for step in self._deadlines if step * DEADLINE_STEP_S <= now + 0.001):
            for pending in self._deadlines.pop(step):
                if pending.sequence in self._pending:
                    late: Outcome = Unknown("no answer in time")
                    if pending.key is None:
                        late = Refused("no leader was reached in time")
                    self._resolve(pending, late)
        if self._deadlines:
            self._deadline_timer = loop.call_at(min(self._deadlines) * DEADLINE_STEP_S, self._expire)

    def _resolve(self, pending: _Pending, outcome: Outcome) -> None:
        if self._pending.pop(pending.sequence, None) is None:
            return
        self._pending_bytes -= len(pending.command)
        self._unsend(pending)
        pending.command = b""
        future = pending.future
        if future is not None and not future.done():
            future.set_result(outcome)

    def _unsend(self, pending: _Pending) -> None:
        key, pending.key = pending.key, None
        if key is not None:
            left = self._in_flight[key] - 1
            if left:
                self._in_flight[key] = left
            else:
                del self._in_flight[key]

    def _send_again(self, lost: list[_Pending]) -> None:
        """These surely are not in the log: first in the queue, in their old order."""
        for pending in lost:
            self._unsend(pending)
        self._queue.extendleft(sorted(lost, key=lambda pending: pending.sequence, reverse=True))

    def _lost_before(self, key: tuple[int, int]) -> None:
        self._send_again([p for p in self._pending.values() if p.key is not None and p.key < key])

    # --- what the engine calls (raft.engine.Host) ---------------------------------------------------------------------

    def wake(self) -> None:
        if not self._woken and self._loop is not None:
            self._woken = True
            self._loop.call_soon(self._step)

    def take(self, term: int, bytes_max: int) -> list[bytes]:
        queue = self._queue
        if not queue:
            return []
        key = (term, self._generation)
        commands: list[bytes] = []
        room = min(bytes_max, TAKE_BYTES_MAX)
        while queue and room > 0:
            pending = queue.popleft()
            if pending.sequence not in self._pending:
                continue  # its time ran out while it waited
            pending.key = key
            commands.append(pending.command)
            room -= len(pending.command)
        if commands:
            self._in_flight[key] = self._in_flight.get(key, 0) + len(commands)
        if queue:
            self.wake()
        return commands

    def refused(self, tokens: list[bytes]) -> None:
        lost = []
        for token in tokens:
            origin, sequence = token_numbers(b"\0" + token)
            pending = self._pending.get(sequence) if origin == self._origin else None
            if pending is not None and pending.key is not None:
                lost.append(pending)
        self._send_again(lost)

    def applied(self, index: int, term: int, command: bytes, result: object) -> None:
        if term > self._applied_term:
            self._applied_term = term
            self._lost_before((term, 0))
        origin, sequence = token_numbers(command)
        if origin == self._origin:
            pending = self._pending.get(sequence)
            if pending is not None:
                key = pending.key
                self._resolve(pending, Applied(index, result))
                if key is not None and len(self._in_flight) > 0 and min(self._in_flight) < key:
                    self._lost_before(key)
        if self.on_applied is not None and command[0] == PAYLOAD:
            self.on_applied(index, command[TOKEN_END:], result)

    def restored(self, index: int, term: int) -> None:
        self._applied_term = max(self._applied_term, term)
        for pending in [p for p in self._pending.values() if p.key is not None]:
            self._resolve(pending, Unknown(f"a snapshot up to index {index} may hold it"))
        if self.on_restored is not None:
            self.on_restored(index)

    def background(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        loop = self._loop
        if loop is None:
            return
        running = loop.run_in_executor(None, work)
        self._background.add(running)

        def finish(future: asyncio.Future[Any]) -> None:
            self._background.discard(future)
            error = future.exception()
            try:
                done(None if error else future.result(), error)
            except Exception as failure:  # from installing a snapshot: the replica stops
                self._fail(failure)

        running.add_done_callback(finish)

    # --- what the transport calls (raft.transport.Receiver) -----------------------------------------------------------

    def link_up(self, peer: str, observer: bool) -> None:
        if self._engine is None:
            return
        self._generation += 1
        if self._in_flight:
            # An own entry under the new generation will show which of the older ones were lost with their link.
            self._propose(NO_OP, b"", BARRIER_MS_MAX)
        self._guarded(lambda engine: engine.connected(peer, observer))

    def link_down(self, peer: str) -> None:
        self._guarded(lambda engine: engine.disconnected(peer))

    def message(self, peer: str, message: Message) -> None:
        engine = self._engine
        if engine is None or engine.stopped:
            return
        try:
            engine.receive(peer, message)
        except Exception as error:  # the engine's invariants or the disk: the replica stops
            self._fail(error)

    def writable(self, peer: str) -> None:
        self.wake()

    def _guarded(self, act: Callable[[Engine], None]) -> None:
        if self._engine is None or self._engine.stopped:
            return
        try:
            act(self._engine)
        except Exception as error:  # as in message()
            self._fail(error)

    # --- the clockwork ------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._woken = False
        engine, loop = self._engine, self._loop
        if engine is None or engine.stopped or loop is None:
            return
        try:
            engine.step()
        except Exception as error:  # as in message()
            self._fail(error)
            return
        self._arm(engine.deadline(), loop)
        self._report()

    def _arm(self, at: float, loop: asyncio.AbstractEventLoop) -> None:
        # A timer that fires early only arms again: cheaper than to cancel one at every step.
        if at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = loop.call_later(max(0.0, at - time.monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        engine, loop = self._engine, self._loop
        if engine is None or engine.stopped or loop is None:
            return
        at = engine.deadline()
        if at <= time.monotonic():
            self._step()
        elif at != float("inf"):
            self._arm(at, loop)

    def _report(self) -> None:
        engine, transport = self._engine, self._transport
        if self.on_status is None or engine is None or transport is None:
            return
        linked = tuple(name for name, peer in transport.peers.items() if peer.connected)
        seen = (
            engine.role,
            engine.term,
            engine.leader_id,
            engine.has_quorum,
            engine.ready,
            engine.stopped,
            linked,
        )
        if seen != self._seen:
            self._seen = seen
            self.on_status(self.status())

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        return self._engine is not None and not self._engine.stopped and self._engine.is_leader

    def status(self) -> ReplicaStatus:
        engine, transport = self._engine, self._transport
        fatal = None if self.fatal is None else str(self.fatal)
        if engine is None or transport is None or engine.stopped:
            return ReplicaStatus(
                self.config.node_id,
                "stopped",
                0,
                None,
                0,
                0,
                0,
                0,
                False,
                False,
                len(self._pending),
                0,
                fatal,
                (),
            )
        return ReplicaStatus(
            node_id=self.config.node_id,
            role=engine.role,
            term=engine.term,
            leader=engine.leader_id,
            applied_index=engine.applied_index,
            commit_index=engine.commit_index,
            last_index=engine.last_index,
            snapshot_index=engine.snapshot_index,
            has_quorum=engine.has_quorum,
            ready=engine.ready,
            pending=len(self._pending),
            strangers=transport.strangers,
            fatal=fatal,
            peers=tuple(
                PeerStatus(peer.name, peer.role, peer.connected, engine.match_index(peer.name), peer.counters)
                for peer in transport.peers.values()
            ),
        )


def _open_store(config: ReplicaConfig) -> tuple[Journal, SnapshotStore]:
    """The durable store. Raises what journal and snapshots raise when they are damaged, foreign or do not meet."""
    snapshots = FileSnapshots(config.data_dir / "snapshots", cluster_id=config.cluster_id)
    journal = FileJournal.open(config.data_dir / "journal", cluster_id=config.cluster_id)
    try:
        check_alignment(journal, snapshots.header())
    except BaseException:
        journal.close()
        raise
    return journal, snapshots
