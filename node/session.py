"""Keeping a session of the ledger, and stopping work in time when that fails.

Join, heartbeat, and the lease that the heartbeats renew (node/lease.py). When the lease runs out, ``on_fenced``
is called: the node kills its workers and claims nothing, before the ledger can lapse its session. A heartbeat
that is confirmed later shows whether the session lived on; if it is gone, the node joins anew under its next
incarnation, and what it did under the last one becomes testimony.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from node.config import NodeConfig
from node.facade import OutcomeUnknown, Unavailable
from node.lease import Lease
from node.parts import Clock
from node.proposer import Proposer
from raft.commands import Gone, Heartbeat, Join, Joined, Leave, Rejected, Renewed
from raft.ledger_state import LedgerSettings

_log = logging.getLogger("oncekeeper.session")

LEAVE_MS = 2_000
LEAVE_LOOK_S = 0.05


def next_incarnation(directory: Path, at_least: int = 0) -> int:
    """One more than any before, durable before it is used. The epoch's seconds, should the disk be lost."""
    path = directory / "incarnation"
    try:
        last = int(path.read_text())
    except FileNotFoundError:
        last = 0
    value = max(last + 1, at_least, int(time.time()))
    fresh = path.with_suffix(".new")
    with open(fresh, "w") as file:
        file.write(str(value))
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return value


class SessionKeeper:
    def __init__(
        self,
        config: NodeConfig,
        proposer: Proposer,
        clock: Clock,
        next_incarnation: Callable[[int], int],
        *,
        on_joined: Callable[[int, int], None],
        on_lease: Callable[[int], None],
        on_fenced: Callable[[], None],
    ) -> None:
        """``on_joined(session, incarnation)``; ``on_lease(deadline_ms)`` whenever it moved on; ``on_fenced()``."""
        self._config = config
        self._proposer = proposer
        self._clock = clock
        self._next_incarnation = next_incarnation
        self._on_joined = on_joined
        self._on_lease = on_lease
        self._on_fenced = on_fenced
        self.lease = Lease(config.session_timeout_ms, config.fence_margin_ms)
        self.session = 0
        self.incarnation = 0
        self.fenced = True
        self._fence_timer: asyncio.TimerHandle | None = None
        self._stopping = False

    async def run(self, incarnation: int) -> None:
        """Keep a session until cancelled."""
        self.incarnation = incarnation
        while not self._stopping:
            if not self.session:
                await self._join()
            await asyncio.sleep(self._config.heartbeat_ms / 1000)
            await self._beat()

    async def leave(self) -> None:
        """Close the session, after the work has ended. If that cannot be done it lapses by itself."""
        self._stopping = True
        session, self.session = self.session, 0
        if self._fence_timer is not None:
            self._fence_timer.cancel()
        if not session:
            return
        asking = asyncio.ensure_future(self._proposer.propose((Leave(session),), timeout_ms=LEAVE_MS))
        # The others may be on their way out too: the last to go has nobody left to tell, and must not linger.
        while not asking.done() and self._proposer.reaches_majority:
            await asyncio.wait({asking}, timeout=LEAVE_LOOK_S)
        if not asking.done():
            asking.cancel()
            _log.warning("the session could not be closed, it will lapse: no majority of voters is linked")
            return
        try:
            asking.result()
        except (Unavailable, OutcomeUnknown) as error:
            _log.warning("the session could not be closed, it will lapse: %s", error)

    async def _join(self) -> None:
        config = self._config
        sent_ms = self._clock.lease_ms()
        # One step of the ledger's clock more: an Advance that comes after a heartbeat may count time that had
        # passed before it, and the session must not lapse before what the lease is measured by.
        timeout_ms = config.session_timeout_ms + LedgerSettings().advance_ms_max
        join = Join(config.node_id, self.incarnation, timeout_ms, config.consumes, str(config.http))
        effects = await self._proposer.propose((join,))
        match effects.answers[0]:
            case Joined(session, _):
                # The answer may be long in coming; the lease counts from the sending, as for a heartbeat.
                self.session = session
                self._confirmed(sent_ms)
            case Rejected(reason):
                _log.warning("the ledger refused incarnation %d: %s", self.incarnation, reason)
                self.incarnation = self._next_incarnation(self.incarnation + 1)
            case other:
                raise TypeError(f"a Join was answered by {other!r}")

    async def _beat(self) -> None:
        sent_ms = self._clock.lease_ms()
        try:
            effects = await self._proposer.propose(
                (Heartbeat(self.session),), timeout_ms=self._config.session_timeout_ms
            )
        except (Unavailable, OutcomeUnknown) as error:
            _log.warning("heartbeat: %s", error)
            return
        match effects.answers[0]:
            case Renewed():
                self._confirmed(sent_ms)
            case Gone():
                _log.warning("session %d lapsed: joining anew", self.session)
                self.session = 0
                self.lease.lost()
                self._fence()
                self.incarnation = self._next_incarnation(self.incarnation + 1)
            case other:
                raise TypeError(f"a Heartbeat was answered by {other!r}")

    def _confirmed(self, sent_ms: int) -> None:
        self.lease.confirmed(sent_ms)
        left_ms = self.lease.left_ms(self._clock.lease_ms())
        if left_ms <= 0:
            return  # confirmed too late: it holds no work any more
        self._on_lease(self.lease.deadline_ms)
        if self._fence_timer is not None:
            self._fence_timer.cancel()
        loop = asyncio.get_running_loop()
        self._fence_timer = loop.call_later(left_ms / 1000, self._lease_ended)
        if self.fenced:
            # The first confirmation of a session, or one after the lease had run out and the session had not.
            self.fenced = False
            self._on_joined(self.session, self.incarnation)

    def _lease_ended(self) -> None:
        left_ms = self.lease.left_ms(self._clock.lease_ms())
        if left_ms > 0:
            self._fence_timer = asyncio.get_running_loop().call_later(left_ms / 1000, self._lease_ended)
            return
        _log.error("no heartbeat was confirmed in time: stopping work before the session can lapse")
        self._fence()

    def _fence(self) -> None:
        if not self.fenced:
            self.fenced = True
            self._on_fenced()
