"""Power fails on all three replicas at once: what was acknowledged is there again, once."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from raft.store import INITIALISED
from tests.support.powerloss import PowerLossRecorder, Recording
from tests.support.powerloss_disk import Loss
from tests.support.raft_cluster import Cluster, eventually

ACKED_AT = (150, 700, 1500)
# Small, so that snapshots are taken, and the journal is trimmed, within the test.
LIMITS = {"compact_entries": 250, "tail_entries": 40}

Moment = tuple[list[str], int]
"""What had been acknowledged, and when that was known (``time.monotonic_ns``)."""


def heard(cluster: Cluster, count: int) -> list[str] | None:
    """What was acknowledged by now, if it is that much."""
    acked = [payload for node in cluster.nodes.values() for payload in list(node.acked)]
    return acked if len(acked) >= count else None


def run_and_record(
    tmp_path: Path, cluster: Cluster, patch: pytest.MonkeyPatch
) -> tuple[Recording, list[Moment]]:
    """Load all nodes, note at some moments what had been acknowledged, and kill all."""
    recorder = PowerLossRecorder(tmp_path / "data", tmp_path / "scratch")
    moments = []
    with patch.context() as recorded:
        for name in ("LD_PRELOAD", "POWERLOSS_DIR", "POWERLOSS_LOG"):
            recorded.setenv(name, recorder.env()[name])
        with cluster:
            cluster.leader()
            for name, node in cluster.nodes.items():
                node.begin("load", prefix=f"{name}-", seconds=60, depth=12)
            for count in ACKED_AT:
                acked = eventually(f"{count} acknowledged", partial(heard, cluster, count), 60)
                moments.append((acked, time.monotonic_ns()))
    return recorder.recording(), moments


def restarted(
    cluster: Cluster, recording: Recording, image: Path, moment: int, loss: Loss, forget: str = ""
) -> dict[str, int]:
    """What the replicas know, each with what a power loss at the moment left of its disk."""
    recording.rebuild(image, seed=1, upto=recording.at_time(moment), loss=loss)
    for name, settings in cluster.settings.items():
        settings["dir"] = str(image / name / "raft")
        if forget:
            (image / name / "raft" / forget).unlink(missing_ok=True)
    with cluster:
        for node in cluster.alive:
            eventually(f"{node.name} passes a barrier", partial(node.ask, "barrier"))
        first, *others = (node.ask("counts") for node in cluster.alive)
    assert others == [first, first]
    return dict(first)


@pytest.mark.slow
def test_what_replicas_acknowledged_survives_a_power_loss_on_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    cluster = Cluster(tmp_path / "data", limits=LIMITS)
    recording, moments = run_and_record(tmp_path, cluster, monkeypatch)
    snapshots = [event for event in recording.events if event.path2.endswith("/snapshot")]
    assert snapshots, "no snapshot was taken: the limits no longer fit the load"
    for number, (acked, moment) in enumerate(moments):
        for loss in (Loss.ALL, Loss.RANDOM):
            counts = restarted(cluster, recording, tmp_path / f"image-{number}-{loss.value}", moment, loss)
            lost = [payload for payload in acked if payload not in counts]
            twice = [payload for payload, count in counts.items() if count > 1]
            assert (lost, twice) == ([], []), f"{number}, {loss}"


@pytest.mark.slow
def test_replicas_that_skip_their_sync_are_seen_to_lose_what_they_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "bug").mkdir()
    (tmp_path / "bug" / "sitecustomize.py").write_text("import os\nos.fdatasync = lambda fd: None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bug"))
    cluster = Cluster(tmp_path / "data")
    recording, moments = run_and_record(tmp_path, cluster, monkeypatch)
    acked, moment = moments[-1]
    # A replica that was in use and finds its journal empty refuses to vote. Without what it knows that by, the
    # loss would go unnoticed, and it is the loss that this test is to show.
    counts = restarted(cluster, recording, tmp_path / "image", moment, Loss.ALL, forget=INITIALISED)
    assert len([payload for payload in acked if payload not in counts]) > len(acked) / 2
