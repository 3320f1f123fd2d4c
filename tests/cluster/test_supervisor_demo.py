"""The demo, and what an interrupted one leaves behind: nothing that runs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from node.cluster import exists, open_cluster
from node.supervisor import child_environment
from tests.support.ctrl_c import listen_to_ctrl_c

DEMO = [sys.executable, "-c", "from node.cli import main; main()", "demo"]


def start(*arguments, **options):
    return subprocess.Popen(
        [*DEMO, *arguments], env=child_environment(), preexec_fn=listen_to_ctrl_c, **options
    )


def until(condition, what, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_every_order_takes_effect_once_while_leader_and_workers_are_killed(tmp_path):
    demo = start("--orders", "1000", "--json", "--dir", str(tmp_path / "demo"), stdout=subprocess.PIPE)
    out, _ = demo.communicate(timeout=200)
    found = json.loads(out)
    assert list(found) == ["submitted", "effects", "lost", "twice", "suspects", "failover_ms", "wall_s"]
    assert (found["submitted"], found["effects"], found["lost"], found["twice"]) == (1000, 1000, 0, 0)
    assert found["suspects"] >= 3
    assert found["failover_ms"] > 0
    assert demo.returncode == 0
    assert open_cluster(tmp_path / "demo" / "cluster").running() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_nothing_running(tmp_path, number):
    home = tmp_path / "demo"
    demo = start("--orders", "100000", "--json", "--dir", str(home), stdout=subprocess.DEVNULL)
    try:
        until(lambda: exists(home / "cluster"), "the cluster is made")
        cluster = open_cluster(home / "cluster")
        until(lambda: len(cluster.running()) == 3, "three nodes run")
        pids = list(cluster.running().values())
        demo.send_signal(number)
        demo.wait(60)
        # After SIGKILL the supervisor is told by the kernel, and drains the nodes by itself.
        until(lambda: not cluster.running(), f"the nodes {pids} have stopped")
        assert demo.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    finally:
        demo.kill()
        demo.wait()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
