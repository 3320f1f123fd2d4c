"""Leaving the cluster: the session is closed where anybody can be told, and nobody waits for nobody."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from node.config import NodeConfig
from node.parts import Clock, ReplicaPart
from node.proposer import Proposer
from node.session import SessionKeeper
from raft.codec import decode_proposal
from raft.commands import Effects, Leave
from raft.proposals import Applied, Outcome


class Replica:
    """A replica whose links are told to it; what it is asked to propose it applies as long as a majority stands."""

    def __init__(self, *linked: bool, role: str = "follower") -> None:
        self.linked = list(linked)
        self.role = role
        self.asked: list[Any] = []
        self.answers = True

    def status(self) -> Any:
        peers = [SimpleNamespace(role="voter", connected=linked) for linked in self.linked]
        return SimpleNamespace(
            role=self.role, peers=(*peers, SimpleNamespace(role="observer", connected=True))
        )

    async def propose(self, payload: bytes, *, timeout_ms: int) -> Outcome:
        proposal = decode_proposal(payload)
        self.asked += proposal.commands
        if not self.answers:
            self.linked = [False] * len(self.linked)  # the others went meanwhile
            await asyncio.Event().wait()
        return Applied(1, Effects(1, proposal, (), ()))


def keeper(replica: Replica) -> SessionKeeper:
    config = cast(NodeConfig, SimpleNamespace(session_timeout_ms=4000, fence_margin_ms=1000))
    nothing = cast(Clock, None)
    session = SessionKeeper(
        config,
        Proposer(cast(ReplicaPart, replica), 1),
        nothing,
        lambda _: 1,
        on_joined=lambda _session, _incarnation: None,
        on_lease=lambda _: None,
        on_fenced=lambda: None,
    )
    session.session = 7
    return session


def test_a_session_is_closed_where_a_majority_is_linked() -> None:
    replica = Replica(True, False)
    asyncio.run(keeper(replica).leave())
    assert replica.asked == [Leave(7)]


def test_an_observer_leaves_through_a_majority_of_voters() -> None:
    assert Proposer(cast(ReplicaPart, Replica(True, True, False, role="observer")), 1).reaches_majority
    assert not Proposer(cast(ReplicaPart, Replica(True, False, role="observer")), 1).reaches_majority


@pytest.mark.parametrize(
    "linked", [(False, False), (True, False)], ids=["already alone", "left alone meanwhile"]
)
def test_the_last_node_to_go_does_not_wait_for_anybody(linked: tuple[bool, ...]) -> None:
    replica = Replica(*linked)
    replica.answers = False

    async def leave() -> None:
        async with asyncio.timeout(60):  # the replica never answers: only a look at the links can end this
            await keeper(replica).leave()

    asyncio.run(leave())
    assert replica.linked == [False, False]
