"""Three real nodes, steered by the commands that a user types."""

import os
import signal
import socket
import subprocess

import pytest

from node.cluster import is_held, open_cluster
from node.supervisor import child_environment
from tests.support.cli_shop import command, oncekeeper, until, write_app


@pytest.fixture
def folder(tmp_path):
    write_app(tmp_path)
    yield tmp_path
    if (tmp_path / "oncekeeper-data" / "cluster.json").exists():
        oncekeeper(tmp_path, "cluster", "down", "--timeout", "5")


def up(folder, *more):
    return oncekeeper(folder, "cluster", "up", "--app", "mini:app", "--detach", *more)


def test_from_nothing_to_a_result_and_down_again(folder):
    started = up(folder)
    assert [row["takes_work"] for row in started["nodes"]] == [True, True, True]
    assert sum(row["role"] == "leader" for row in oncekeeper(folder, "nodes")["nodes"]) == 1
    (task_id,) = oncekeeper(folder, "submit", "mini.add", "--body", '{"a": 1, "b": 2}')["ids"]
    assert oncekeeper(folder, "wait", "--idle", "--timeout", "30")["tasks"]["executed"] == 1
    assert oncekeeper(folder, "task", "show", task_id)["attempts"][-1]["result"] == 3
    story = oncekeeper(folder, "why", task_id)["story"]
    assert story[-1].startswith("It is executed, for good")
    assert oncekeeper(folder, "cluster", "down") == {
        "dir": str(folder / "oncekeeper-data"),
        "stopped": ["n1", "n2", "n3"],
        "killed": [],
    }
    assert open_cluster(folder / "oncekeeper-data").running() == {}
    oncekeeper(folder, "status", expect=3)


def test_an_existing_directory_is_resumed_with_all_it_knew(folder):
    up(folder)
    oncekeeper(folder, "submit", "mini.add", "--body", '{"a": 1, "b": 2}', "--count", "50")
    oncekeeper(folder, "wait", "--idle", "--timeout", "30")
    oncekeeper(folder, "cluster", "down")
    oncekeeper(folder, "cluster", "up", "--detach")
    assert oncekeeper(folder, "status")["tasks"]["executed"] == 50


def test_a_killed_node_comes_back_by_itself(folder):
    up(folder)
    cluster = open_cluster(folder / "oncekeeper-data")
    killed = cluster.running()["n2"]
    os.kill(killed, signal.SIGKILL)
    until(lambda: cluster.running().get("n2", killed) != killed, "n2 is another process")

    def takes_work_again():
        rows = {row["node"]: row for row in oncekeeper(folder, "nodes")["nodes"]}
        return rows["n2"]["up"] and rows["n2"]["pid"] != killed and rows["n2"]["takes_work"]

    until(takes_work_again, "n2 takes work")


def test_without_restart_a_killed_node_is_started_by_hand(folder):
    up(folder, "--no-restart")
    cluster = open_cluster(folder / "oncekeeper-data")
    os.kill(cluster.running()["n3"], signal.SIGKILL)
    until(lambda: not is_held(cluster.node_lock("n3")), "n3 is gone")
    rows = {row["node"]: row for row in oncekeeper(folder, "nodes")["nodes"]}
    assert (rows["n3"]["up"], len(rows)) == (False, 3)
    started = oncekeeper(folder, "cluster", "start", "n3")
    assert (started["node"], started["takes_work"]) == ("n3", True)
    assert "n3 is running already" in oncekeeper(folder, "cluster", "start", "n3", expect=1)["error"]
    assert oncekeeper(folder, "cluster", "down")["stopped"] == ["n1", "n2", "n3"]


def test_a_dead_letter_is_found_and_tried_again(folder):
    up(folder)
    (task_id,) = oncekeeper(folder, "submit", "mini.fail")["ids"]
    oncekeeper(folder, "wait", "--idle", "--timeout", "30")
    (found,) = oncekeeper(folder, "task", "list", "--state", "dead")["tasks"]
    assert (found["id"], found["handler"]) == (task_id, "mini.fail")
    assert oncekeeper(folder, "task", "retry", task_id)["outcome"] == "revived"
    oncekeeper(folder, "wait", "--idle", "--timeout", "30")
    until(lambda: len(oncekeeper(folder, "task", "show", task_id)["attempts"]) == 2, "it was tried again")


def test_a_paused_queue_is_consumed_again_after_resume(folder):
    up(folder)
    oncekeeper(folder, "queue", "pause", "default")
    oncekeeper(folder, "submit", "mini.add", "--body", '{"a": 1, "b": 2}')
    assert "1 waiting" in oncekeeper(folder, "wait", "--idle", "--timeout", "0.3", expect=1)["error"]
    oncekeeper(folder, "queue", "resume", "default")
    assert oncekeeper(folder, "wait", "--idle", "--timeout", "30")["tasks"]["executed"] == 1


def test_in_the_foreground_an_interrupt_drains_the_nodes(folder):
    process = subprocess.Popen(
        command("cluster", "up", "--app", "mini:app"),
        cwd=folder,
        env=child_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if "3 nodes run mini:app" in line:
                break
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert said.count("exited with 0") == 3
    assert open_cluster(folder / "oncekeeper-data").running() == {}


def test_a_directory_that_is_up_is_not_started_twice(folder):
    up(folder)
    again = oncekeeper(folder, "cluster", "up", "--app", "mini:app", "--detach", expect=1)
    assert "is up already" in again["error"]
    assert len(open_cluster(folder / "oncekeeper-data").running()) == 3


def test_a_taken_port_is_refused_before_any_node_is_started(folder):
    up(folder)
    oncekeeper(folder, "cluster", "down")
    cluster = open_cluster(folder / "oncekeeper-data")
    with socket.socket() as taker:
        taker.bind(("127.0.0.1", cluster.peers["n3"].raft.port))
        taker.listen()
        refused = oncekeeper(folder, "cluster", "up", "--detach", expect=1)
    assert f"port {cluster.peers['n3'].raft.port} (tcp), the raft port of n3, is taken" in refused["error"]
    assert "cluster.json" in refused["error"]
    assert cluster.running() == {}
