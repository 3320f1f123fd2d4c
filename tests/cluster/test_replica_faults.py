"""Three replicas as processes, struck. What was acknowledged is there, on all, once."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.raft_cluster import Cluster, eventually
from tests.support.raft_proxy import Mode, Proxies


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[tuple[Cluster, Proxies]]:
    cluster = Cluster(tmp_path)
    proxies = Proxies(cluster)
    with cluster:
        yield cluster, proxies
    proxies.close()


def assert_all_once(cluster: Cluster, acked: list[str]) -> None:
    counts = cluster.settled()
    assert [payload for payload in acked if payload not in counts] == []
    assert {payload: count for payload, count in counts.items() if count != 1} == {}


def all_acked(cluster: Cluster) -> list[str]:
    return [payload for node in cluster.nodes.values() for payload in node.acked]


def test_the_leader_is_killed_again_and_again_under_load(cluster: Cluster):
    for number in range(4):
        leader = cluster.leader()
        for node in cluster.alive:
            node.begin("load", prefix=f"{node.name}-{number}-", seconds=1.2, depth=20)
        before = len(all_acked(cluster))
        eventually("load is acknowledged", lambda before=before: len(all_acked(cluster)) > before + 200)
        cluster.kill(leader)
        at_kill = len(all_acked(cluster))
        eventually("the others go on", lambda at_kill=at_kill: len(all_acked(cluster)) > at_kill + 50)
        cluster.start(leader)
    assert_all_once(cluster, all_acked(cluster))


def test_all_are_killed_at_once_under_load_with_snapshots_being_taken(tmp_path: Path):
    limits = {"compact_entries": 300, "tail_entries": 50}
    with Cluster(tmp_path, limits=limits) as cluster:
        for number in range(3):
            cluster.leader()
            for node in cluster.alive:
                node.begin("load", prefix=f"{node.name}-{number}-", seconds=3, depth=20)
            before = len(all_acked(cluster))
            eventually("load is acknowledged", lambda before=before: len(all_acked(cluster)) > before + 1000)
            for name in cluster.settings:
                cluster.nodes[name].signal(signal.SIGKILL)
            for name in cluster.settings:
                cluster.kill(name)
            for name in cluster.settings:
                cluster.begin_start(name)
            for node in cluster.nodes.values():
                node.wait_up()
        assert_all_once(cluster, all_acked(cluster))
        assert all(node.ask("status")["snapshot"] > 1000 for node in cluster.alive)


def test_a_killed_follower_catches_up_by_a_snapshot_and_proposes(tmp_path: Path):
    with Cluster(tmp_path, limits={"compact_entries": 300, "tail_entries": 50}) as cluster:
        follower = cluster.follower()
        cluster.kill(follower)
        leader = cluster.nodes[cluster.leader()]
        leader.ask("load", prefix="x", seconds=1, depth=50)
        eventually("the journal was cut", lambda: leader.ask("status")["snapshot"] > 600)
        cluster.start(follower)
        eventually("it is ready", lambda: cluster.nodes[follower].ask("status")["ready"])
        assert cluster.nodes[follower].ask("propose", payload="back")[0] == "Applied"
        assert_all_once(cluster, [*leader.acked, "back"])


@pytest.mark.parametrize("mode", [Mode.CUT, Mode.HOLE])
def test_an_isolated_leader_confirms_nothing_and_its_proposals_survive_healing_once(
    proxied: tuple[Cluster, Proxies], mode: Mode
):
    cluster, proxies = proxied
    old = cluster.leader()
    others = [node for node in cluster.nodes.values() if node.name != old]
    assert cluster.nodes[old].ask("propose", payload="before")[0] == "Applied"
    proxies.isolate(old, mode)
    isolated = cluster.nodes[old].begin("propose", payload="isolated", timeout_ms=700)
    outcome = isolated.get(timeout=10)
    assert outcome[0] in ("Unknown", "Refused")
    eventually("the majority has a leader", lambda: others[0].ask("status")["leader"] not in (None, old))
    assert others[0].ask("propose", payload="majority")[0] == "Applied"
    eventually("the old leader steps down", lambda: cluster.nodes[old].ask("status")["role"] != "leader")
    assert cluster.nodes[old].ask("barrier", timeout_ms=100) is False
    # Proposed while alone, answered after healing: sent again, and applied once.
    waiting = cluster.nodes[old].begin("propose", payload="patient", timeout_ms=10_000)
    proxies.isolate(old, Mode.PASS)
    assert waiting.get(timeout=15)[0] == "Applied"
    assert_all_once(cluster, ["before", "majority", "patient"])


def test_a_cut_between_leader_and_one_follower_changes_no_term(proxied: tuple[Cluster, Proxies]):
    cluster, proxies = proxied
    leader = cluster.leader()
    follower = cluster.follower()
    term = cluster.nodes[leader].ask("status")["term"]
    proxies.set(leader, follower, Mode.CUT)
    eventually("it lost its leader", lambda: cluster.nodes[follower].ask("status")["leader"] is None)
    time.sleep(1.5)  # more than two election timeouts, in which nothing must happen
    assert cluster.nodes[leader].ask("propose", payload="x")[0] == "Applied"
    assert {node.ask("status")["term"] for node in cluster.alive} == {term}
    proxies.set(leader, follower, Mode.PASS)
    assert cluster.nodes[follower].ask("propose", payload="y", timeout_ms=8000)[0] == "Applied"
    assert cluster.leader() == leader
    assert_all_once(cluster, ["x", "y"])


def test_links_that_flap_under_load_lose_and_double_nothing(proxied: tuple[Cluster, Proxies]):
    cluster, proxies = proxied
    leader = cluster.leader()
    followers = [name for name in cluster.settings if name != leader]
    for node in cluster.alive:
        node.begin("load", prefix=node.name + "-", seconds=2.5, depth=20)
    for number in range(12):
        name = followers[number % 2]
        proxies.set(leader, name, Mode.CUT)
        time.sleep(0.05)  # a fault's length, not a wait
        proxies.set(leader, name, Mode.PASS)
        time.sleep(0.1)
    eventually("load is acknowledged by all", lambda: all(len(node.acked) > 100 for node in cluster.alive))
    time.sleep(0.5)
    assert_all_once(cluster, all_acked(cluster))
    assert cluster.nodes[leader].ask("status")["fatal"] is None


def test_a_leader_stopped_and_continued_is_not_believed(cluster: Cluster):
    old = cluster.leader()
    others = [node for node in cluster.nodes.values() if node.name != old]
    cluster.nodes[old].signal(signal.SIGSTOP)
    assert others[0].ask("propose", payload="while it slept", timeout_ms=8000)[0] == "Applied"
    cluster.nodes[old].signal(signal.SIGCONT)
    assert cluster.nodes[old].ask("propose", payload="after it woke", timeout_ms=8000)[0] == "Applied"
    assert_all_once(cluster, ["while it slept", "after it woke"])


def test_an_observer_learns_and_proposes(tmp_path: Path):
    with Cluster(tmp_path, observers=1) as cluster:
        cluster.leader()
        assert cluster.nodes["o1"].ask("propose", payload="x")[0] == "Applied"
        assert cluster.nodes["o1"].ask("status")["role"] == "observer"
        assert_all_once(cluster, ["x"])


def test_strangers_disturb_no_running_cluster(cluster: Cluster):
    leader = cluster.leader()
    term = cluster.nodes[leader].ask("status")["term"]
    for data in (b"\x80\x04garbage", b"\x7f\xff\xff\xff\x01" + bytes(1 << 20), bytes(64)):
        for port in cluster.ports.values():
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                try:
                    stranger.sendall(data)
                    assert stranger.recv(1) == b""
                except (ConnectionResetError, BrokenPipeError):
                    pass  # closed with our bytes unread
    assert cluster.nodes[leader].ask("propose", payload="x")[0] == "Applied"
    assert all(node.ask("status")["strangers"] == 3 for node in cluster.alive)
    assert {node.ask("status")["term"] for node in cluster.alive} == {term}
