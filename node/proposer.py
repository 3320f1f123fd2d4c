"""Proposing to the ledger under a token, so that asking again never does anything twice.

A proposal whose answer did not come is *unknown*: it may be in the journal of a majority, or nowhere. The token
(proposer, sequence) makes asking again safe: the ledger answers a repeated token with its first answers. So
``propose`` goes on asking until it knows, or until its caller's time is up.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import assert_never

from node.facade import OutcomeUnknown, Unavailable
from node.parts import ReplicaPart
from raft.codec import encode_proposal
from raft.commands import Command, Effects, Proposal
from raft.proposals import Applied, Refused, Unknown
from raft.transport import OBSERVER, VOTER

ASK_MS = 1_000  # how long one asking waits for its answer
PAUSE_MS = 30  # before asking again: about the time in which a follower hears of a new leader


class Proposer:
    def __init__(self, replica: ReplicaPart, name: int) -> None:
        """``name``: 64 random bits, new at each start: the ledger takes an old name's sequences for repeats."""
        self._replica = replica
        self._name = name
        self._sequences = itertools.count(1)

    @property
    def reaches_majority(self) -> bool:
        """Whether links stand to enough voters for anything to be decided now."""
        status = self._replica.status()
        voters = [peer.connected for peer in status.peers if peer.role == VOTER]
        if status.role != OBSERVER:
            voters.append(True)
        return 2 * sum(voters) > len(voters)

    async def propose(self, commands: tuple[Command, ...], timeout_ms: int | None = None) -> Effects:
        """Ask until it is known. Raises Unavailable (surely not applied) or OutcomeUnknown at ``timeout_ms``."""
        loop = asyncio.get_running_loop()
        payload = encode_proposal(Proposal(self._name, next(self._sequences), commands))
        deadline = None if timeout_ms is None else loop.time() + timeout_ms / 1000
        maybe_applied = False
        while True:
            left_ms = ASK_MS if deadline is None else min(ASK_MS, int((deadline - loop.time()) * 1000))
            if left_ms <= 0:
                if maybe_applied:
                    raise OutcomeUnknown(
                        f"no answer of the ledger within {timeout_ms} ms: it may have been taken"
                    )
                raise Unavailable(f"the ledger could not be asked within {timeout_ms} ms: no leader is known")
            outcome = await self._replica.propose(payload, timeout_ms=left_ms)
            match outcome:
                case Applied():
                    assert isinstance(outcome.result, Effects)
                    return outcome.result
                case Refused():
                    pass  # surely not in any journal: ask again when there may be a leader
                case Unknown():
                    maybe_applied = True
                case _:
                    assert_never(outcome)
            await asyncio.sleep(PAUSE_MS / 1000)
