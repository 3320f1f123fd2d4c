"""The disk of the task log, where delayed tasks wait, takes no more: what is due runs, and nothing is lost.

Only the log's: the nodes' own have room, so that they stay up (tests/cluster/test_faults_disk.py fills those).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from oncekeeper.errors import SubmitFailed
from tests.support.delay_stage import APP, FAR_MS, Stage, staged, wall_ms
from tests.support.real_cluster import RealCluster, eventually
from tests.support.small_disk import fill, mounted

DISK_BYTES = 24 << 20


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    cluster = RealCluster(tmp_path, app=APP)
    with mounted(cluster.cluster.dir / "log", DISK_BYTES), staged(cluster, tmp_path) as running:
        yield running


def submit_on(stage: Stage, due_ms: int) -> None:
    for _ in range(1000):  # the log's file may have some room inside
        stage.submit(100, due_ms)


def test_what_is_due_runs_on_a_full_disk_and_the_rest_goes_on_when_there_is_room(stage: Stage) -> None:
    due_ms = wall_ms() + FAR_MS
    soon, later = stage.submit(200, due_ms), stage.submit(100, due_ms + FAR_MS, "enqueue")
    stage.wait_kept(300)
    ballast = fill(stage.cluster.cluster.dir / "log")
    with pytest.raises(SubmitFailed, match=r"nothing was stored.*full"):
        submit_on(stage, due_ms)
    refused_after = len(stage.dues)
    stage.fall_due(due_ms)
    # Claims and settlements are the ledger's, and reading needs no room.
    stage.wait_started(soon)
    stage.fall_due(due_ms + FAR_MS)
    notes = eventually("a node says what it waits for", lambda: [n for each in _notes(stage) for n in each])
    assert any("cannot be written" in note for note in notes), notes
    ballast.unlink()
    stage.wait_started(list(stage.dues))
    assert len(stage.dues) == refused_after
    assert stage.count(later) == 100
    stage.check()


def _notes(stage: Stage) -> list[list[str]]:
    return [stage.cluster.api(node).get("/v1/status", local=1)["notes"] for node in stage.cluster.nodes]
