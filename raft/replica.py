"""One replica as the node sees it: propose bytes, learn what became of them (raft/proposals.py), read its status.

The proposer's own replica applies the entry too, so a result is its own machine's answer, and nothing but entries
and refusals travels. Everything runs on the loop that called ``start``; the disk is synced inline, snapshots are
written beside the loop. An exception out of the engine stops the replica for good: see ``_fail``.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from raft.engine import Engine, Journal, Machine, SnapshotStore
from raft.proposals import Applied, Outcome, Proposals, Refused, Unknown
from raft.replica_config import PeerStatus, ReplicaConfig, ReplicaStatus
from raft.store import mark_initialised
from raft.store import open_store as open_real_store
from raft.transport import OBSERVER, VOTER, Transport
from raft.wire import ENTRY_BYTES_MAX, INDEX_MAX, PAYLOAD, TOKEN_END, Message

__all__ = [
    "Applied",
    "Outcome",
    "PeerStatus",
    "Refused",
    "Replica",
    "ReplicaConfig",
    "ReplicaStatus",
    "Unknown",
]

log = logging.getLogger(__name__)

PAYLOAD_BYTES_MAX: Final = ENTRY_BYTES_MAX - TOKEN_END


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
        mark_ready: Callable[[], None] | None = None,
        make_transport: Callable[..., Transport] = Transport,
        clock: Callable[[], float] = time.monotonic,
        draw: random.Random | None = None,
    ) -> None:
        """The last four are for simulations: a disk, links, a clock (the loop's own) and dice."""
        self.config = config
        self.machine = machine
        self.on_applied = on_applied
        self.on_status = on_status
        self.on_fatal = on_fatal
        self.on_restored = on_restored
        self.fatal: BaseException | None = None
        self._open_store = open_store or open_real_store
        self._make_transport = make_transport
        self._clock = clock
        self._draw = draw or random.Random(secrets.randbits(128))
        self._engine: Engine | None = None
        self._transport: Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._seen: tuple[object, ...] = ()
        self._mark_ready = mark_ready or (
            None if open_store else partial(mark_initialised, config.data_dir, unborn=config.unborn)
        )
        self._background: set[asyncio.Future[Any]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._proposals: Proposals | None = None

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the store, replay, listen. Raises what is wrong with either; then nothing runs."""
        config = self.config
        self._loop = asyncio.get_running_loop()
        transport = self._make_transport(
            node_id=config.node_id,
            role=config.role,
            cluster_id=config.cluster_id,
            secret=config.secret,
            listen=config.listen,
            peers=config.peers,
            observers=config.observers,
            receiver=self,
            timings=config.links,
            server_ssl=config.server_ssl,
            client_ssl=config.client_ssl,
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
                clock=self._clock,
                random=self._draw,
                timings=config.timings,
                limits=config.limits,
            )
            self._proposals = Proposals(
                self._loop,
                self.wake,
                self._engine.term_applied,
                config.pending_max,
                config.pending_bytes_max,
                self._draw.randrange(INDEX_MAX) + 1,
            )
            self._transport = transport
            await transport.start()
        except BaseException:
            await transport.stop()
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
        if self._timer is not None:
            self._timer.cancel()
        try:
            engine.stop()
        except Exception as error:  # noqa: BLE001  # stopping goes on
            # The journal refuses after a failure; what was acknowledged is synced already.
            log.warning("journal not closed cleanly: %s", error)
        if self._proposals is not None:
            self._proposals.close(reason)
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

    # --- proposing ----------------------------------------------------------------------------------------------

    def submit(self, payload: bytes, *, timeout_ms: int = 5000) -> asyncio.Future[Outcome]:
        """Propose without waiting. The future is never an exception; cancelling it abandons only the answer."""
        if len(payload) > PAYLOAD_BYTES_MAX:
            return _refusal(f"payload of {len(payload)} bytes is above payload_bytes_max={PAYLOAD_BYTES_MAX}")
        if self._proposals is None:
            return _refusal("the replica is not running")
        return self._proposals.propose(PAYLOAD, payload, timeout_ms)

    async def propose(self, payload: bytes, *, timeout_ms: int = 5000) -> Outcome:
        return await self.submit(payload, timeout_ms=timeout_ms)

    async def barrier(self, timeout_ms: int = 5000) -> bool:
        """True: everything acknowledged anywhere before this call is applied here. Callers share one entry."""
        if self._proposals is None:
            return False
        waiting = self._proposals.barrier()
        done, _ = await asyncio.wait([waiting], timeout=timeout_ms / 1000)
        return bool(done) and isinstance(waiting.result(), Applied)

    # --- what the engine calls (raft.engine.Host) ---------------------------------------------------------------

    def wake(self) -> None:
        if not self._woken and self._loop is not None:
            self._woken = True
            self._loop.call_soon(self._step)

    def take(self, term: int, bytes_max: int) -> list[bytes]:
        return [] if self._proposals is None else self._proposals.take(term, bytes_max)

    def refused(self, tokens: list[bytes]) -> None:
        if self._proposals is not None:
            self._proposals.refused(tokens)

    def applied(self, index: int, term: int, command: bytes, result: object) -> None:
        if self._proposals is not None:
            self._proposals.applied(index, term, command, result)
        if self.on_applied is not None and command[0] == PAYLOAD:
            self.on_applied(index, command[TOKEN_END:], result)

    def restored(self, index: int, term: int) -> None:
        if self._proposals is not None:
            self._proposals.restored(index, term)
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
            except Exception as failure:  # noqa: BLE001  # the disk, installing a snapshot: the replica stops
                self._fail(failure)

        running.add_done_callback(finish)

    # --- what the transport calls (raft.transport.Receiver) -----------------------------------------------------

    def link_up(self, peer: str, observer: bool) -> None:
        if self._engine is None:
            return
        if self._proposals is not None:
            self._proposals.new_link()
        self._guarded(lambda engine: engine.connected(peer, observer))

    def link_down(self, peer: str) -> None:
        self._guarded(lambda engine: engine.disconnected(peer))

    def message(self, peer: str, message: Message) -> None:
        engine = self._engine
        if engine is None or engine.stopped:
            return
        try:
            engine.receive(peer, message)
        except Exception as error:  # noqa: BLE001  # an invariant or the disk: the replica stops
            self._fail(error)

    def writable(self, peer: str) -> None:
        self.wake()

    def _guarded(self, act: Callable[[Engine], None]) -> None:
        if self._engine is None or self._engine.stopped:
            return
        try:
            act(self._engine)
        except Exception as error:  # noqa: BLE001  # as in message()
            self._fail(error)

    # --- the clockwork ------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._woken = False
        engine, loop = self._engine, self._loop
        if engine is None or engine.stopped or loop is None:
            return
        try:
            engine.step()
        except Exception as error:  # noqa: BLE001  # as in message()
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
            self._timer = loop.call_later(max(0.0, at - self._clock()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        engine, loop = self._engine, self._loop
        if engine is None or engine.stopped or loop is None:
            return
        at = engine.deadline()
        if at <= self._clock():
            self._step()
        elif at != float("inf"):
            self._arm(at, loop)

    def _report(self) -> None:
        engine, transport = self._engine, self._transport
        if engine is None or transport is None:
            return
        if engine.ready and self._mark_ready is not None:
            self._mark_ready()
            self._mark_ready = None
        if self.on_status is None:
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

    # --- reading ------------------------------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        return self._engine is not None and not self._engine.stopped and self._engine.is_leader

    def status(self) -> ReplicaStatus:
        engine, transport = self._engine, self._transport
        fatal = None if self.fatal is None else str(self.fatal)
        pending = 0 if self._proposals is None else len(self._proposals)
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
                pending,
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
            pending=pending,
            strangers=transport.strangers,
            fatal=fatal,
            peers=tuple(
                PeerStatus(peer.name, peer.role, peer.connected, engine.match_index(peer.name), peer.counters)
                for peer in transport.peers.values()
            ),
            refused=dict(transport.refused),
        )


def _refusal(reason: str) -> asyncio.Future[Outcome]:
    future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    future.set_result(Refused(reason))
    return future
