"""One claim a row of the defect table, each beside the scenario that shows the defect in PySyncObj 0.3.17.

The tests named ``test_stock_...`` pin the defect: were they to fail, the library would have changed, and the
override that answers it would be needless or wrong. Rows 3, 12 and 13 need sockets: see
tests/cluster/test_defects_links.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import os
import pickle
from pathlib import Path
from typing import Any

import google_crc32c
import pysyncobj.journal
import pysyncobj.syncobj as library
import pytest
from pysyncobj import SyncObj, SyncObjConf, replicated
from pysyncobj.node import Node

from raft.engine import EngineCorrupt, Limits, MachineFailed, MembershipFixed
from raft.engine_library import UnfitLibrary, check_library
from raft.proposals import Applied, Proposals, Refused, Unknown
from raft.snapshots import Snapshot
from raft.wire import (
    ENTRY_BYTES_MAX,
    NO_OP,
    PAYLOAD,
    AppendEntries,
    AppendReply,
    ProposeRefused,
    SnapshotChunk,
    Stale,
    Vote,
    VoteRequest,
    command,
)
from tests.support.raft_net import MemoryJournal, Net
from tests.support.raft_stock import B, C, Stock, Wire


def entry(payload: bytes) -> bytes:
    return command(PAYLOAD, 7, 1, payload)


def lone(net: Net, name: str) -> Any:
    """The node, linked to all others, whose messages the test writes by hand."""
    node = net[name]
    for other in net.voters:
        if other != name:
            net.links.add(frozenset((name, other)))
            node.engine.connected(other)
    node.step()
    net.flying.clear()
    return node


def replies(node: Any) -> list[Any]:
    messages = [message for _, message in node.sent]
    node.sent.clear()
    return messages


# --- row 1: a snapshot message advances the commit index without a match ----------------------------------------


def test_stock_1_a_snapshot_message_makes_a_deposed_leader_confirm_what_was_never_committed(monkeypatch):
    stock = Stock(monkeypatch, Counter)
    stock.lead()
    said: list[tuple[Any, int]] = []
    stock.obj.add("lost", callback=lambda result, error: said.append((result, error)))
    stock.obj.doTick()  # appended here, acknowledged by nobody
    stock.receive(B, type="append_entries", term=9, commit_index=50, serialized=(b"part", True, False))
    stock.obj.doTick()
    assert said == [(1, 0)]  # applied, SUCCESS: false


def test_1_a_snapshot_message_commits_nothing():
    net = Net()
    leader = net.elect()
    node = net[leader]
    other = next(name for name in net.voters if name != leader)
    for name in net.voters:
        if name != leader:
            net.disconnect(leader, name)
    lost = node.propose(b"lost")
    node.step()
    committed = node.engine.commit_index
    assert node.engine.last_index > committed
    net.connect(leader, other)
    node.engine.receive(other, SnapshotChunk(9, 50, 40, 8, 1000, 0, 0, b"part"))
    node.step()
    assert node.engine.commit_index == committed
    assert lost not in node.results
    assert b"lost" not in node.machine.counts


def test_1_an_installed_snapshot_commits_up_to_its_own_index_and_no_further():
    net = Net()
    node = lone(net, "n1")
    state = node.machine.snapshot()
    chunk = SnapshotChunk(3, 90, 40, 2, len(state), google_crc32c.value(state), 0, state)
    node.engine.receive("n2", chunk)
    node.finish_background()
    node.step()
    assert (node.engine.commit_index, node.engine.applied_index, node.engine.last_index) == (40, 40, 40)
    assert node.restores == [40]


# --- row 2: the journal is thrown away at a restart when its head is not the snapshot's -------------------------


class Counter(SyncObj):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.added: list[str] = []

    @replicated
    def add(self, name: str) -> int:
        self.added.append(name)
        return len(self.added)


def test_stock_2_a_restart_throws_away_every_entry_behind_a_snapshot_that_the_journal_was_not_cut_for(
    tmp_path: Path,
):
    # As after kill -9 between the snapshot's rename and the journal's compaction.
    journal, dump = str(tmp_path / "journal"), str(tmp_path / "dump")
    entries = [(b"\1", index, 0) for index in range(1, 21)]
    store = pysyncobj.journal.FileJournal(journal)
    for one in entries:
        store.add(*one)
    store._destroy()
    with gzip.open(dump, "wb") as file:
        pickle.dump(({}, entries[10], entries[9], {Node("a:1")}), file)
    conf = SyncObjConf(autoTick=False, journalFile=journal, fullDumpFile=dump)
    node = SyncObj(Node("a:1"), [Node("b:1"), Node("c:1")], conf, transport=Wire())
    node.doTick()
    assert node._SyncObj__raftLog[-1][1] == 11  # entries 12 to 20, acknowledged to a leader, are gone
    node.destroy()


def test_2_a_restart_keeps_every_entry_behind_the_snapshot():
    net = Net(voters=1)
    node = net["n1"]
    node.journal = MemoryJournal()
    for index in range(1, 21):
        node.journal.add(entry(b"%d" % index) if index > 1 else b"\1", index, 0)
    machine = node.machine
    machine.applied = 10
    node.snapshots.current = Snapshot(11, 0, machine.snapshot())
    node.start()
    assert (node.engine.applied_index, node.engine.last_index) == (11, 20)
    net.run(2, lambda: node.machine.applied == 19)


def test_2_a_journal_that_a_newer_snapshot_superseded_is_begun_anew_behind_it():
    net = Net(voters=1)
    node = net["n1"]
    node.snapshots.current = Snapshot(40, 3, node.machine.snapshot())
    node.start()
    assert (node.engine.applied_index, node.engine.last_index, node.engine.last_term) == (40, 40, 3)


def test_2_a_journal_whose_snapshot_is_lost_is_refused():
    net = Net(voters=1)
    node = net["n1"]
    node.journal = MemoryJournal()
    node.journal.add(b"\1", 30, 2)
    with pytest.raises(EngineCorrupt, match="begins at index 30, but the snapshot ends at 1"):
        node.start()


# --- row 4: nothing is synced before it is acknowledged or counted ----------------------------------------------


def test_stock_4_a_follower_acknowledges_what_is_not_synced(monkeypatch, tmp_path: Path):
    syncs: list[int] = []
    monkeypatch.setattr(os, "fsync", syncs.append)
    monkeypatch.setattr(os, "fdatasync", syncs.append)
    stock = Stock(monkeypatch, journalFile=str(tmp_path / "journal"))
    stock.append(B, 1, (1, 0), [(b"\1", 2, 1)], 1)
    assert stock.wire.take()[-1]["success"] is True
    assert syncs == []


def test_4_a_follower_acknowledges_only_what_is_synced():
    node = lone(Net(), "n1")
    node.engine.receive("n2", AppendEntries(1, 1, 1, 0, [(1, entry(b"x"))], False))
    assert node.journal.dirty
    assert replies(node) == []
    seen: list[bool] = []
    send = node.engine.links.send
    node.engine.links.send = lambda peer, message: seen.append(node.journal.dirty) or send(peer, message)
    node.step()
    assert replies(node) == [AppendReply(1, 2, 0)]
    assert seen == [False]


def test_4_a_leader_counts_its_own_entry_only_when_it_is_synced():
    net = Net()
    leader = net.elect()
    node = net[leader]
    committed_while_dirty = []
    set_commit = node.journal.setRaftCommitIndex

    def watch(index: int) -> None:
        synced = node.journal.synced[-1][1] if node.journal.synced else 0
        committed_while_dirty.append(index > synced)
        set_commit(index)

    node.journal.setRaftCommitIndex = watch
    for number in range(50):
        net.propose(net.voters[number % 3], b"%d" % number)
    assert committed_while_dirty
    assert not any(committed_while_dirty)


# --- row 5: late appends cut the log; answers carry no term; an old term is met with silence --------------------


def test_stock_5_a_late_append_cuts_entries_that_are_acknowledged_and_applied(monkeypatch):
    stock = Stock(monkeypatch)
    entries = [(b"\1", index, 1) for index in range(2, 12)]
    stock.append(B, 1, (1, 0), entries, 1)
    stock.append(B, 1, (11, 1), [], 11)
    stock.obj.doTick()
    assert stock.obj.raftLastApplied == 11
    stock.append(B, 1, (1, 0), entries[:2], 11)
    assert stock.last_index == 3


def test_5_a_late_append_cuts_nothing():
    node = lone(Net(), "n1")
    entries = [(1, entry(b"%d" % index)) for index in range(2, 12)]
    node.engine.receive("n2", AppendEntries(1, 1, 1, 0, entries, False))
    node.engine.receive("n2", AppendEntries(1, 11, 11, 1, [], True))
    node.step()
    node.engine.receive("n2", AppendEntries(1, 11, 1, 0, entries[:2], False))
    node.step()
    assert (node.engine.last_index, node.engine.applied_index) == (11, 11)


def test_5_a_real_conflict_cuts_from_the_conflict_on():
    node = lone(Net(), "n1")
    node.engine.receive("n2", AppendEntries(1, 1, 1, 0, [(1, entry(b"%d" % n)) for n in range(5)], False))
    node.step()
    node.engine.receive("n3", AppendEntries(2, 1, 3, 1, [(2, entry(b"new"))], False))
    node.step()
    assert [(i, t) for _, i, t in node.journal.entries] == [(1, 0), (2, 1), (3, 1), (4, 2)]


def test_5_a_conflict_below_the_commit_index_stops_the_replica():
    node = lone(Net(), "n1")
    node.engine.receive("n2", AppendEntries(1, 3, 1, 0, [(1, entry(b"a")), (1, entry(b"b"))], False))
    node.step()
    with pytest.raises(EngineCorrupt, match="committed"):
        node.engine.receive("n3", AppendEntries(2, 3, 1, 0, [(2, entry(b"other"))], False))


def test_stock_5_an_answer_to_an_earlier_leadership_counts_for_a_later_one(monkeypatch):
    stock = Stock(monkeypatch, Counter)
    stock.lead()
    stock.obj.add("x")
    stock.obj.doTick()
    at = stock.obj.raftCommitIndex
    # Sent when the follower's entry at this index was another term's.
    stock.receive(B, type="next_node_idx", reset=False, next_node_idx=stock.last_index + 1, success=True)
    stock.obj.doTick()
    assert stock.obj.raftCommitIndex > at
    follower = Stock(monkeypatch)
    follower.append(B, 1, (1, 0), [], 1)
    assert "term" not in follower.wire.take()[-1]


def test_5_an_answer_of_another_term_does_not_count():
    net = Net()
    leader = net.elect()
    node = net[leader]
    other = next(name for name in net.voters if name != leader)
    net.alter = lambda source, target, message: []
    node.propose(b"x")
    node.step()
    at = node.engine.commit_index
    node.engine.receive(other, AppendReply(node.engine.term - 1, node.engine.last_index, 0))
    node.step()
    assert node.engine.commit_index == at


def test_stock_5_an_append_of_an_old_term_is_met_with_silence(monkeypatch):
    stock = Stock(monkeypatch)
    stock.append(B, 5, (1, 0), [], 1)
    stock.wire.take()
    stock.append(C, 4, (1, 0), [], 1)
    stock.obj.doTick()
    assert stock.wire.take() == []


def test_5_a_deposed_leader_is_told_at_once():
    net = Net()
    node = lone(net, "n1")
    node.engine.receive("n2", AppendEntries(5, 1, 1, 0, [], True))
    node.step()
    replies(node)
    node.engine.receive("n3", AppendEntries(4, 1, 1, 0, [], True))
    assert replies(node) == [Stale(5)]
    leader = lone(Net(), "n1")
    leader.engine.receive("n2", Stale(7))
    assert (leader.engine.term, leader.engine.role) == (7, "follower")


# --- row 6: a re-sent snapshot rewinds --------------------------------------------------------------------------


def stock_dump(index: int) -> bytes:
    with io.BytesIO() as file:
        with gzip.GzipFile(fileobj=file, mode="wb") as packed:
            pickle.dump(({}, (b"\1", index, 1), (b"\1", index - 1, 1), set()), packed)
        return file.getvalue()


def test_stock_6_a_resent_snapshot_rewinds_a_follower(monkeypatch):
    stock = Stock(monkeypatch)
    stock.append(B, 1, (1, 0), [(b"\1", index, 1) for index in range(2, 31)], 30)
    stock.obj.doTick()
    assert stock.obj.raftLastApplied == 30
    stock.receive(B, type="append_entries", term=1, commit_index=30, serialized=(stock_dump(10), True, True))
    assert stock.obj.raftLastApplied == 10


def test_6_a_resent_snapshot_is_acknowledged_and_ignored():
    node = lone(Net(), "n1")
    entries = [(1, entry(b"%d" % index)) for index in range(2, 31)]
    node.engine.receive("n2", AppendEntries(1, 30, 1, 0, entries, False))
    node.step()
    replies(node)
    before = dict(node.machine.counts)
    node.engine.receive("n2", SnapshotChunk(1, 30, 10, 1, 4, 0, 0, b"old!"))
    node.step()
    assert (node.engine.applied_index, node.machine.counts, node.restores) == (30, before, [])
    assert replies(node) == [AppendReply(1, 10, 0)]


def test_6_entries_that_overtake_a_snapshot_being_stored_win():
    node = lone(Net(), "n1")
    state = b"\x92\x00\x90"
    node.engine.receive("n2", SnapshotChunk(1, 5, 5, 1, len(state), google_crc32c.value(state), 0, state))
    node.engine.receive("n2", AppendEntries(1, 7, 1, 0, [(1, entry(b"%d" % n)) for n in range(6)], False))
    node.step()
    assert node.engine.applied_index == 7
    node.finish_background()
    node.step()
    assert (node.engine.applied_index, node.machine.applied, node.restores) == (7, 6, [])


# --- row 7: a command that raises, a callback that raises -------------------------------------------------------


class Fragile(SyncObj):
    calls = 0

    @replicated
    def boom(self) -> None:
        Fragile.calls += 1
        raise ValueError("boom")

    @replicated
    def count(self) -> int:
        Fragile.calls += 1
        return Fragile.calls


def test_stock_7_a_command_that_raises_is_applied_again_and_again(monkeypatch):
    Fragile.calls = 0
    stock = Stock(monkeypatch, Fragile, ())
    stock.lead()
    stock.obj.boom()
    for _ in range(5):
        with contextlib.suppress(ValueError):  # the library's thread logs it and ticks again
            stock.obj.doTick()
    assert Fragile.calls > 1


def test_stock_7_a_callback_that_raises_applies_its_command_twice(monkeypatch):
    Fragile.calls = 0
    stock = Stock(monkeypatch, Fragile, ())
    stock.lead()
    stock.obj.count(callback=lambda result, error: 1 / 0)
    for _ in range(4):
        with contextlib.suppress(ZeroDivisionError):
            stock.obj.doTick()
    assert Fragile.calls == 2


def test_7_a_command_that_raises_is_applied_once_and_stops_the_replica_with_its_reason():
    net = Net(voters=1)
    net.run(1, lambda: net.leaders())
    node = net["n1"]
    calls = []
    node.machine.apply = lambda index, payload: calls.append(index) or 1 / 0
    node.propose(b"boom")
    with pytest.raises(MachineFailed, match=r"entry at index 3: ZeroDivisionError"):
        net.settle()
    assert len(calls) == 1


# --- row 8: an observer's messages ------------------------------------------------------------------------------


def test_stock_8_an_observer_deposes_the_leader(monkeypatch):
    stock = Stock(monkeypatch)
    stock.lead()
    stranger = Node("observer")
    stock.wire._onReadonlyNodeConnected(stranger)
    stock.wire._onMessageReceived(
        stranger,
        {
            "type": "append_entries",
            "term": 10**6,
            "commit_index": 1,
            "entries": [],
            "prevLogIdx": 1,
            "prevLogTerm": 0,
        },
    )
    assert stock.obj.raftCurrentTerm == 10**6
    assert not stock.obj._isLeader()


@pytest.mark.parametrize(
    "message",
    [
        AppendEntries(10**6, 1, 1, 0, [], True),
        SnapshotChunk(10**6, 1, 10**6, 1, 1, 0, 0, b"x"),
        VoteRequest(10**6, 10**6, 10**6),
        Vote(10**6),
        Stale(10**6),
        AppendReply(10**6, 10**6, 0),
        AppendReply(1, 10**6, 0),
        ProposeRefused(10**6, [bytes(16)]),
    ],
)
def test_8_nothing_that_an_observer_sends_changes_term_leader_or_commit_index(message: Any):
    net = Net(observers=1)
    leader = net.elect()
    engine = net[leader].engine
    before = (engine.term, engine.leader_id, engine.commit_index, engine.last_index)
    engine.receive("o1", message)
    net[leader].step()
    assert (engine.term, engine.leader_id, engine.commit_index, engine.last_index) == before


# --- row 9: no pre-vote; a leader stays in office for 30 s ------------------------------------------------------


def test_stock_9_a_node_cut_from_its_leader_spends_a_term_at_each_timeout(monkeypatch):
    stock = Stock(monkeypatch)
    for _ in range(10):
        stock.clock.now += 2
        stock.obj.doTick()
    assert stock.obj.raftCurrentTerm >= 10


def test_9_a_node_cut_from_its_leader_spends_no_term():
    net = Net()
    node = lone(net, "n1")
    net.alter = lambda source, target, message: []
    net.down |= {"n2", "n3"}
    net.run(20)
    assert node.engine.term == 0


def test_stock_9_a_leader_without_answers_stays_in_office(monkeypatch):
    stock = Stock(monkeypatch)
    stock.lead()
    stock.clock.now += 20
    stock.obj.doTick()
    assert stock.obj._isLeader()


def test_9_a_leader_without_answers_steps_down_after_a_second():
    net = Net()
    leader = net.elect()
    net.alter = lambda source, target, message: []
    net.down |= {name for name in net.voters if name != leader}
    net.run(1.2)
    assert net.leaders() == []


def test_9_a_repeated_vote_counts_once():
    net = Net(voters=5)
    node = lone(net, "n1")
    node.engine._prevoted = True
    node.step()
    assert node.engine.role == "candidate"
    node.engine.receive("n2", Vote(1))
    node.engine.receive("n2", Vote(1))
    assert node.engine.role == "candidate"
    node.engine.receive("n3", Vote(1))
    assert node.engine.role == "leader"


# --- row 10: membership -----------------------------------------------------------------------------------------


def test_stock_10_a_second_change_of_members_is_taken_while_the_first_is_open(monkeypatch):
    stock = Stock(monkeypatch, dynamicMembershipChange=True)
    stock.lead()
    stock.obj.addNodeToCluster(Node("d:1"))
    stock.obj.addNodeToCluster(Node("e:1"))
    stock.obj.doTick()
    assert {node.id for node in stock.obj.otherNodes} == {B, C, "d:1", "e:1"}


def test_10_a_change_of_members_is_refused_with_the_reason():
    net = Net()
    leader = net.elect()
    for change in (net[leader].engine.addNodeToCluster, net[leader].engine.removeNodeFromCluster):
        with pytest.raises(MembershipFixed, match="two overlapping changes could make two majorities"):
            change("n4")


# --- row 11: outcomes -------------------------------------------------------------------------------------------


def test_stock_11_a_callback_may_never_come(monkeypatch):
    stock = Stock(monkeypatch, Counter)
    stock.append(B, 1, (1, 0), [], 1)
    said: list[Any] = []
    stock.obj.add("x", callback=lambda result, error: said.append(error))
    stock.obj.doTick()  # forwarded, and lost with the connection
    for _ in range(1000):
        stock.clock.now += 0.1
        stock.append(B, 1, (1, 0), [], 1)
        stock.obj.doTick()
    assert said == []


async def proposals(**limits: int) -> Proposals:
    return Proposals(
        asyncio.get_running_loop(),
        lambda: None,
        0,
        limits.get("pending_max", 100),
        limits.get("bytes", 10**6),
    )


def test_11_what_was_sent_is_unknown_at_its_deadline_and_what_was_not_is_refused():
    async def scenario() -> None:
        mine = await proposals()
        sent = mine.propose(PAYLOAD, b"sent", 30)
        assert len(mine.take(1, 10**6)) == 1
        unsent = mine.propose(PAYLOAD, b"unsent", 30)
        assert await sent == Unknown("no answer in time")
        assert await unsent == Refused("no leader was reached in time")
        assert mine.take(1, 10**6) == []  # refused means that it never will be sent

    asyncio.run(scenario())


def test_11_a_proposal_that_a_later_term_overtook_is_sent_again_and_applied_once():
    async def scenario() -> None:
        mine = await proposals()
        outcome = mine.propose(PAYLOAD, b"x", 1000)
        (first,) = mine.take(1, 10**6)
        assert mine.take(1, 10**6) == []
        mine.applied(5, 2, command(NO_OP, 0, 0), None)
        assert mine.take(2, 10**6) == [first]
        mine.applied(6, 2, first, "result")
        assert await outcome == Applied(6, "result")

    asyncio.run(scenario())


def test_11_a_proposal_lost_with_its_link_is_sent_again_once_a_later_one_shows_it():
    async def scenario() -> None:
        mine = await proposals()
        outcome = mine.propose(PAYLOAD, b"x", 1000)
        (lost,) = mine.take(1, 10**6)
        mine.new_link()
        (probe,) = mine.take(1, 10**6)
        assert mine.take(1, 10**6) == []
        mine.applied(5, 1, probe, None)
        assert mine.take(1, 10**6) == [lost]
        mine.applied(6, 1, lost, "result")
        assert await outcome == Applied(6, "result")

    asyncio.run(scenario())


def test_11_a_refused_proposal_is_sent_again_and_one_behind_a_snapshot_is_unknown():
    async def scenario() -> None:
        mine = await proposals()
        outcome = mine.propose(PAYLOAD, b"x", 1000)
        (first,) = mine.take(1, 10**6)
        mine.refused([first[1:17]])
        assert mine.take(2, 10**6) == [first]
        mine.restored(90, 2)
        assert await outcome == Unknown("a snapshot up to index 90 may hold it")

    asyncio.run(scenario())


def test_11_too_many_pending_proposals_are_refused():
    async def scenario() -> None:
        mine = await proposals(pending_max=2)
        first, second, third = (mine.propose(PAYLOAD, b"x", 1000) for _ in range(3))
        assert await third == Refused("2 proposals are pending: slow down")
        mine.close("stopped")
        assert [await first, await second] == [Refused("stopped"), Refused("stopped")]

    asyncio.run(scenario())


# --- row 12: a command above the batch size is cut wrongly ------------------------------------------------------


def test_stock_12_a_command_above_the_batch_size_arrives_garbled(monkeypatch):
    stock = Stock(monkeypatch, appendEntriesBatchSizeBytes=100)
    stock.lead()
    stock.obj._SyncObj__raftLog.add(b"\0" + bytes(299), stock.last_index + 1, stock.obj.raftCurrentTerm)
    stock.obj._SyncObj__sendAppendEntries()
    pieces = [message for target, message in stock.wire.sent if target == B and "transmission" in message]
    follower = Stock(monkeypatch)

    def receive() -> None:
        for piece in pieces:
            follower.receive(B, **piece)

    assert pieces
    with pytest.raises((EOFError, pickle.UnpicklingError)):
        receive()


def test_12_the_largest_command_arrives_whole():
    net = Net()
    leader = net.elect()
    payload = os.urandom(ENTRY_BYTES_MAX - 17)
    net.propose(leader, payload)
    assert all(payload in node.machine.counts for node in net.nodes.values())


# --- row 14: what a snapshot holds, and who may install it ------------------------------------------------------


def test_stock_14_whatever_attribute_was_set_enters_the_snapshot(monkeypatch, tmp_path: Path):
    stock = Stock(monkeypatch, Counter, (), fullDumpFile=str(tmp_path / "dump"), useFork=False)
    stock.obj.scratch = "a cache, a handle, a secret"
    stock.lead()
    stock.obj.add("x")
    stock.obj.doTick()
    stock.obj.doTick()
    stock.obj.forceLogCompaction()
    stock.obj.doTick()
    with gzip.open(tmp_path / "dump") as file:
        assert pickle.load(file)[0]["scratch"] == "a cache, a handle, a secret"  # noqa: S301  # the point


def test_14_a_snapshot_is_the_machines_own_bytes_and_the_living_process_installs_it():
    net = Net(limits=Limits(compact_entries=10, tail_entries=2))
    leader = net.elect()
    node = net[leader]
    node.defer_background = True
    node.scratch = node.engine.scratch = "not in it"
    for number in range(9):
        net.propose(leader, b"%d" % number)
    net.run(0.2)
    assert len(node.deferred) == 1
    state = node.machine.snapshot()
    install = node.deferred[0][0]()
    assert node.snapshots.current is None  # written, and the process dies: the old one stands
    assert node.engine.first_index == 1  # and the journal still holds everything
    install()
    assert node.snapshots.current is not None
    assert node.snapshots.current.state == state


def test_14_a_snapshot_that_cannot_be_written_costs_nothing_and_is_tried_again():
    net = Net(limits=Limits(compact_entries=10, tail_entries=2))
    leader = net.elect()
    node = net[leader]
    node.defer_background = True
    for number in range(10):
        net.propose(leader, b"%d" % number)
    net.settle()
    node.deferred.pop()[1](None, OSError(28, "No space left on device"))
    node.defer_background = False
    for number in range(10):
        net.propose(leader, b"more %d" % number)
    assert node.engine.first_index == 1
    net.run(11)
    net.propose(leader, b"later")
    net.settle()
    assert node.snapshots.current is not None


# --- the hold on the library ------------------------------------------------------------------------------------


def test_another_version_of_the_library_is_refused():
    with pytest.raises(UnfitLibrary, match=r"pysyncobj 0\.3\.18 is installed.*install pysyncobj==0\.3\.17"):
        check_library(version="0.3.18")


def test_a_library_without_an_overridden_name_is_refused():
    class Altered:
        pass

    with pytest.raises(UnfitLibrary, match=r"lacks .*_SyncObj__applyLogEntries"):
        check_library(Altered)


def test_the_library_sees_the_real_clock_outside_the_engine():
    net = Net()
    net.elect()
    assert library.monotonicTime is not net.clock
    assert library.monotonicTime() != net.clock()
