"""A voter that lost its journal: what it has forgotten must not be taken back by whoever it meets first."""

from __future__ import annotations

import pytest

from tests.support.raft_net import MemoryJournal, Net


def deposed(net: Net) -> tuple[str, str, str]:
    """A leader that does not know yet that the two others have another, and have committed without it."""
    old = net.elect()
    net.propose(old, b"first")
    net.isolate(old)
    net.run(0.8, lambda: len(net.leaders()) == 2)
    new = next(name for name in net.leaders() if name != old)
    third = next(name for name in net.voters if name not in (old, new))
    net.propose(new, b"acknowledged")
    assert net[old].engine.is_leader
    return old, new, third


def lose_journal(net: Net, name: str) -> None:
    net.crash(name)
    net[name].journal = MemoryJournal()
    net[name].journal.rejoining = True


@pytest.mark.parametrize("seed", range(10))
def test_a_deposed_leader_finds_no_majority_in_a_voter_that_forgot_who_deposed_it(seed: int):
    net = Net(seed=seed)
    old, new, third = deposed(net)
    lose_journal(net, third)
    net.crash(new)
    net[old].propose(b"never")
    net.restart(third)
    net.connect(old, third)
    net.run(5)
    assert net[old].machine.counts == {b"first": 1}
    assert net[third].journal.rejoining
    net.restart(new)
    net.run(10, lambda: net[third].machine.counts.get(b"acknowledged") == 1)
    net.run(10, lambda: net[old].machine.counts.get(b"acknowledged") == 1)
    net.run(10, lambda: not net[third].journal.rejoining)


def test_it_votes_again_when_a_majority_without_it_has_taken_what_it_asked_for():
    net = Net()
    leader = net.elect()
    net.propose(leader, b"kept")
    loser, other = (name for name in net.voters if name != leader)
    lose_journal(net, loser)
    net.restart(loser)
    net.run(5, lambda: net[loser].machine.counts == {b"kept": 1})
    net.run(5, lambda: not net[loser].journal.rejoining)
    net.crash(leader)
    net.run(5, lambda: net.leaders())
    net.propose(net.leaders()[0], b"more")
    assert net[loser].machine.counts == net[other].machine.counts == {b"kept": 1, b"more": 1}


def test_what_it_acknowledges_while_it_learns_commits_nothing():
    net = Net()
    leader = net.elect()
    net.propose(leader, b"kept")
    loser, other = (name for name in net.voters if name != leader)
    lose_journal(net, loser)
    net.crash(other)
    net.restart(loser)
    net[leader].propose(b"not yet")
    net.run(0.7)
    assert net[leader].machine.counts == {b"kept": 1}
    net.restart(other)
    net.run(10, lambda: net[other].machine.counts.get(b"kept") == 1)
    net.run(10, lambda: not net[loser].journal.rejoining)


def test_of_two_voters_the_other_one_knows_it_all():
    net = Net(2)
    leader = net.elect()
    net.propose(leader, b"kept")
    loser = next(name for name in net.voters if name != leader)
    lose_journal(net, loser)
    net.restart(loser)
    net.run(5, lambda: net[loser].machine.counts == {b"kept": 1})
    net.run(5, lambda: not net[loser].journal.rejoining)
    net.propose(net.leaders()[0], b"more")
