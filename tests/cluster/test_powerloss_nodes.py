"""Power fails on all three nodes under load: what was acknowledged is there again, and takes effect once.

All that the nodes and the client wrote below the data directory is recorded; a power loss leaves what was synced,
and of the rest nothing, or any part of it. The sink is outside: what took effect before stays done. The work
journals prove nothing after a boot, so each task that was in a worker is decided by its handler's check.

RELIABILITY 12, and invariants 7 and 11: also no position may be behind one that somebody had seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

import pytest

from chaos.history import History
from node.supervisor import child_environment
from tests.support.powerloss import PowerLossRecorder, Recording
from tests.support.powerloss_disk import Loss
from tests.support.real_cluster import RealCluster, eventually
from tests.support.real_submit import heard_of

HANDLERS = ("once", "reckon", "drift")
OUTAGES = [(Loss.ALL, 0), (Loss.RANDOM, 1), (Loss.RANDOM, 2), (Loss.RANDOM, 3)]


def run_until_the_lights_go_out(
    cluster: RealCluster, scratch: Path, effects: int, env: Mapping[str, str] | None = None
) -> Recording:
    """Load the cluster, and kill every process of it at once; the acknowledged tasks are in its history."""
    recorder = PowerLossRecorder(cluster.cluster.dir, scratch)
    recorded = {name: recorder.env()[name] for name in ("LD_PRELOAD", "POWERLOSS_DIR", "POWERLOSS_LOG")}
    cluster.start(env={**recorded, **(env or {})})
    cluster.wait_up()
    heard = scratch / "acknowledged"
    with heard.open("wb") as out:
        client = subprocess.Popen(
            [sys.executable, "-m", "tests.support.real_submit", str(cluster.cluster.dir), *HANDLERS],
            stdout=out,
            env={**child_environment(), **recorded},
        )
    try:
        eventually(f"{effects} effects", lambda: len(cluster.sink.read()) >= effects)
    finally:
        client.kill()
        cluster.kill(*cluster.nodes)
        client.wait(10)
    for handler, ids, acknowledged in heard_of(heard):
        cluster.acknowledged(ids, handler, acknowledged)
    assert len(cluster.history.submitted) >= effects / 2
    return recorder.recording()


def judge_what_is_left(
    cluster: RealCluster, recording: Recording, loss: Loss, seed: int, up_s: float = 40.0
) -> None:
    """Go on with what a power loss left, and judge the history. The data directory must be out of the way."""
    directory = cluster.cluster.dir
    before, effects = cluster.history, cluster.sink.path.read_bytes()
    recording.rebuild(directory, seed=seed, loss=loss)
    cluster.history = History()
    cluster.history.submitted = dict(before.submitted)
    cluster.history.positions = list(before.positions)
    cluster.start(env={"OK_BOOT_ID": str(uuid.UUID(int=seed + 1))})
    try:
        cluster.wait_up(up_s)
        more = cluster.submit("once", count=50)
        cluster.check()
        assert cluster.effects_of(more) == [1] * 50
        assert len(cluster.sink.read()) >= sum(each.acknowledged for each in before.submitted.values())
    except AssertionError as error:
        raise AssertionError(f"{loss}, seed {seed}: {error}") from error
    finally:
        cluster.kill(*cluster.nodes)
        cluster.forget_client()  # its log is that of this directory, its ids are those of this course of things
        shutil.rmtree(directory)
        cluster.sink.path.write_bytes(effects)
        cluster.history = before


@pytest.mark.slow
def test_power_lost_on_all_nodes_under_load_loses_no_acknowledged_task_and_repeats_none(
    tmp_path: Path,
) -> None:
    with RealCluster(tmp_path) as cluster:
        (tmp_path / "recordings").mkdir()
        recording = run_until_the_lights_go_out(cluster, tmp_path / "recordings", effects=1200)
        cluster.cluster.dir.rename(tmp_path / "as-it-was")
        for loss, seed in OUTAGES:
            judge_what_is_left(cluster, recording, loss, seed)


@pytest.mark.slow
def test_nodes_that_skip_their_sync_are_seen_to_lose_what_they_acknowledged(tmp_path: Path) -> None:
    (tmp_path / "bug").mkdir()
    (tmp_path / "bug" / "sitecustomize.py").write_text("import os\nos.fdatasync = lambda fd: None\n")
    path = os.pathsep.join([str(tmp_path / "bug"), child_environment()["PYTHONPATH"]])
    with RealCluster(tmp_path) as cluster:
        (tmp_path / "recordings").mkdir()
        recording = run_until_the_lights_go_out(
            cluster, tmp_path / "recordings", effects=600, env={"PYTHONPATH": path}
        )
        cluster.cluster.dir.rename(tmp_path / "as-it-was")
        # Either the journals are missed by the nodes, which then refuse to begin anew, or by the history.
        with pytest.raises(AssertionError, match=r"each_acknowledged_task_ends_once|take work"):
            judge_what_is_left(cluster, recording, Loss.ALL, 0, up_s=10.0)
