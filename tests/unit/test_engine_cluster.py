"""Three engines on a simulated network (tests/support/raft_net.py)."""

from __future__ import annotations

import pytest

from raft.engine import Limits, MachineFailed
from raft.wire import AppendEntries, AppendReply, Message, PreVote, Vote, VoteRequest
from tests.support.raft_net import MemoryJournal, Net


def test_a_proposal_from_any_replica_is_applied_on_all_and_answered_at_its_proposer():
    net = Net()
    leader = net.elect()
    for number, name in enumerate(net.nodes):
        assert net.propose(name, b"from " + name.encode()) == number + 1
    net.settle()
    assert {tuple(node.machine.counts) for node in net.nodes.values()} == {
        (b"from n1", b"from n2", b"from n3")
    }
    assert net.leaders() == [leader]


def test_one_proposal_alone_costs_one_append_and_one_sync_a_replica_and_waits_for_no_timer():
    net = Net()
    leader = net.elect()
    for node in net.nodes.values():
        node.sent.clear()
        node.journal.syncs = 0
    at = net.clock.now
    net[leader].propose(b"x")
    net.settle()
    assert net.clock.now == at
    assert [node.journal.syncs for node in net.nodes.values()] == [1, 1, 1]
    full = [m for _, m in net[leader].sent if isinstance(m, AppendEntries) and m.entries]
    assert len(full) == 2  # one a follower
    assert all(node.machine.counts == {b"x": 1} for node in net.nodes.values())


def test_what_is_gathered_in_one_turn_goes_in_one_append_and_one_sync():
    net = Net()
    leader = net.elect()
    net[leader].sent.clear()
    net[leader].journal.syncs = 0
    for number in range(100):
        net[leader].propose(b"%d" % number)
    net.settle()
    full = [m for _, m in net[leader].sent if isinstance(m, AppendEntries) and m.entries]
    assert [len(m.entries) for m in full] == [100, 100]
    assert net[leader].journal.syncs == 1


def test_when_the_link_to_the_leader_breaks_another_leads_well_before_the_election_timeout():
    net = Net()
    leader = net.elect()
    at = net.clock.now
    net.crash(leader)
    net.run(2, lambda: net.leaders())
    assert net.clock.now - at < net.timings.election_ms_min / 1000
    assert net.leaders() != [leader]


def test_acknowledged_entries_survive_the_loss_of_any_leader_and_power_cuts_everywhere():
    for seed in range(20):
        net = Net(seed=seed)
        acknowledged = []
        for round_number in range(5):
            leader = net.elect()
            for number in range(3):
                payload = b"%d-%d" % (round_number, number)
                net.propose(leader, payload)
                acknowledged.append(payload)
            net[leader].propose(b"not acknowledged %d" % round_number)
            if round_number % 2:
                for name in net.voters:
                    net.crash(name)
                for name in net.voters:
                    net.restart(name)
            else:
                net.crash(leader)
                net.elect()
                net.restart(leader)
        net.elect()
        net.run(1)
        for node in net.nodes.values():
            assert all(node.machine.counts.get(payload) == 1 for payload in acknowledged), seed
            assert set(node.machine.counts.values()) == {1}


def test_a_follower_cut_from_the_leader_alone_changes_no_term_and_costs_no_leader():
    net = Net()
    leader = net.elect()
    follower = next(name for name in net.voters if name != leader)
    term = net[leader].engine.term
    net.disconnect(leader, follower)
    net.run(30)
    assert net.leaders() == [leader]
    assert {node.engine.term for node in net.nodes.values()} == {term}
    net.connect(leader, follower)
    assert net.propose(follower, b"back") == 1
    assert net[leader].engine.term == term


def test_an_isolated_follower_comes_back_without_an_election():
    net = Net()
    leader = net.elect()
    follower = next(name for name in net.voters if name != leader)
    term = net[leader].engine.term
    net.isolate(follower)
    net.run(60)
    net.join(follower)
    net.run(2)
    assert net.leaders() == [leader]
    assert net[follower].engine.term == term


def test_an_isolated_leader_confirms_nothing_and_steps_down():
    net = Net()
    old = net.elect()
    for other in net.voters:
        if other != old:
            net.disconnect(old, other)
    lost = net[old].propose(b"lost")
    net.run(2)
    assert net.leaders() != [old]
    assert lost not in net[old].results
    new = net.leaders()[0]
    net.propose(new, b"kept")
    net.join(old)
    net.run(2)
    assert lost not in net[old].results
    assert all(node.machine.counts == {b"kept": 1} for node in net.nodes.values())


def test_a_leader_that_hears_nobody_though_its_links_stand_steps_down_within_its_fallback_time():
    net = Net()
    leader = net.elect()
    net.alter = lambda source, target, message: [] if target == leader else [message]
    net.run(net.timings.fallback_ms / 1000 + 0.2)
    assert leader not in net.leaders()


def test_repeated_and_stale_messages_cut_nothing_that_is_committed():
    for seed in range(30):
        net = Net(seed=seed)
        history: list[tuple[str, str, Message]] = []

        def noise(
            source: str, target: str, message: Message, net: Net = net, history: list = history
        ) -> list[Message]:
            history.append((source, target, message))
            again = [
                m
                for s, t, m in net.random.sample(history, min(2, len(history)))
                if (s, t) == (source, target)
            ]
            # What is forwarded counts once: its repetition is the transport's to prevent.
            return [message, *(m for m in again if isinstance(m, AppendEntries | AppendReply))]

        net.alter = noise
        done = []
        for number in range(12):
            leader = net.elect()
            name = net.random.choice(net.voters)
            payload = b"%d" % number
            if name in net.down:
                continue
            net.propose(leader, payload)
            done.append(payload)
            if number % 4 == 3:
                net.crash(leader)
                net.elect()
                net.restart(leader)
        net.elect()
        net.run(1)
        for node in net.nodes.values():
            assert list(node.machine.counts.items()) == [(payload, 1) for payload in done], seed


def test_an_observer_learns_and_proposes_but_never_votes():
    net = Net(observers=1)
    leader = net.elect()
    assert net.propose("o1", b"from the observer") == 1
    assert net["o1"].machine.counts == {b"from the observer": 1}
    for name in net.voters:
        if name != leader:
            net.crash(name)
    net.run(5)
    assert net.leaders() == []  # the observer's answers are no majority
    assert not any(isinstance(m, Vote | PreVote) for _, m in net["o1"].sent)


def test_a_follower_far_behind_is_brought_up_by_a_snapshot_in_chunks(monkeypatch):
    monkeypatch.setattr("raft.engine_snapshot.SNAPSHOT_CHUNK_BYTES", 100)
    net = Net(limits=Limits(compact_entries=50, tail_entries=10))
    leader = net.elect()
    behind = next(name for name in net.voters if name != leader)
    net.crash(behind)
    for number in range(200):
        net.propose(leader, b"%d" % number)
    assert net[leader].engine.first_index > 100
    net.restart(behind)
    net.run(5, lambda: len(net[behind].machine.counts) == 200)
    assert net[behind].machine.counts == net[leader].machine.counts
    assert len(net[behind].restores) == 1
    net.propose(behind, b"and on")
    assert net[behind].machine.counts[b"and on"] == 1


def test_a_follower_slightly_behind_needs_entries_only():
    net = Net(limits=Limits(compact_entries=50, tail_entries=40))
    leader = net.elect()
    behind = next(name for name in net.voters if name != leader)
    net.isolate(behind)
    for number in range(30):
        net.propose(leader, b"%d" % number)
    net[leader].engine.compact()
    net.join(behind)
    net.run(2, lambda: len(net[behind].machine.counts) == 30)
    assert net[behind].restores == []


def test_a_restarted_replica_resumes_from_its_snapshot_and_the_entries_behind_it():
    net = Net(limits=Limits(compact_entries=50, tail_entries=5))
    leader = net.elect()
    for number in range(120):
        net.propose(leader, b"%d" % number)
    net.settle()
    follower = next(name for name in net.voters if name != leader)
    snapshot = net[follower].snapshots.current
    assert snapshot is not None
    net.crash(follower)
    net[follower].start()
    assert net[follower].machine.applied > 0
    assert net[follower].engine.applied_index == snapshot.index
    assert net[follower].engine.last_index >= 120


def test_a_machine_that_raises_stops_the_replica_and_is_asked_once():
    net = Net()
    leader = net.elect()
    net[leader].machine.fail_on = b"poison"
    net[leader].propose(b"poison")
    with pytest.raises(MachineFailed, match="told to fail"):
        net.settle()
    net[leader].engine.stop()
    assert net[leader].journal.closed
    at = net[leader].engine.applied_index
    net[leader].engine.step()
    assert net[leader].engine.applied_index == at


def test_a_vote_is_remembered_over_a_power_cut():
    net = Net()
    node = net["n1"]
    for other in ("n2", "n3"):
        net.connect("n1", other)
    node.engine.receive("n2", VoteRequest(5, 1, 0))
    assert node.sent == [("n2", Vote(5))]
    net.crash("n1")
    net.restart("n1")
    node.engine.receive("n3", VoteRequest(5, 1, 0))
    node.step()
    assert node.sent == []
    node.engine.receive("n3", VoteRequest(6, 1, 0))
    assert node.sent == [("n3", Vote(6))]


def test_a_voter_that_lost_its_journal_does_not_vote_before_it_has_caught_up():
    net = Net()
    leader = net.elect()
    net.propose(leader, b"kept")
    loser = next(name for name in net.voters if name != leader)
    net.crash(loser)
    net[loser].journal = MemoryJournal()
    net[loser].journal.rejoining = True
    net.crash(leader)
    net.restart(loser)
    net.run(10)
    assert net.leaders() == []  # the third alone is no majority
    assert net[loser].engine.term == 0
    net.restart(leader)
    net.run(5, lambda: net[loser].machine.counts == {b"kept": 1})
    net.settle()
    assert not net[loser].journal.rejoining
    net.crash(net.leaders()[0])
    net.run(5, lambda: net.leaders())


def test_a_full_send_window_holds_appends_back_and_loses_none():
    net = Net()
    leader = net.elect()
    followers = [name for name in net.voters if name != leader]
    net.full.add(followers[0])
    for number in range(20):
        net.propose(leader, b"%d" % number)
    assert net[followers[0]].machine.counts == {}
    net.full.clear()
    net[leader].wake()
    net.run(1, lambda: len(net[followers[0]].machine.counts) == 20)


def test_a_single_voter_leads_alone_and_counts_only_what_it_synced():
    net = Net(voters=1)
    net.run(1, lambda: net.leaders())
    assert net.propose("n1", b"x") == 1
    assert not net["n1"].journal.dirty


def test_a_process_that_was_stopped_reads_before_it_stands():
    net = Net()
    leader = net.elect()
    term = net[leader].engine.term
    sleeper = next(name for name in net.voters if name != leader)
    node = net[sleeper]
    # The others live on for 10 s while the sleeper's messages pile up; then it wakes with its deadline past.
    piled: list[tuple[str, Message]] = []

    def pile(source: str, target: str, message: Message) -> list[Message]:
        if target == sleeper:
            piled.append((source, message))
            return []
        return [message]

    net.alter = pile
    net.down.add(sleeper)
    net.run(10)
    net.down.discard(sleeper)
    net.alter = lambda source, target, message: [message]
    node.sent.clear()
    node.step()
    assert node.sent == []
    for source, message in piled[-3:]:
        node.engine.receive(source, message)
    net.run(5)
    assert net.leaders() == [leader]
    assert {n.engine.term for n in net.nodes.values()} == {term}
