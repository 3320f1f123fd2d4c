"""A disk that takes no more: what is asked for is refused with a clear error, and nothing is half-written.

RELIABILITY 22 and 23.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from oncekeeper.errors import SubmitFailed
from tests.support.real_cluster import RealCluster, eventually
from tests.support.small_disk import fill, mounted

DISK_BYTES = 160 << 20
LOG_BYTES = 32 << 10


def test_a_node_whose_journal_cannot_be_written_stops_and_says_why_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    with RealCluster(tmp_path) as cluster:
        cluster.start()
        cluster.wait_up()
        leader = cluster.leader()
        journal = cluster.cluster.node_dir(leader) / "raft" / "journal"
        # The node's own log says each half second that the task log cannot be written either, before it stops.
        while (size := max(each.stat().st_size for each in journal.iterdir())) < LOG_BYTES + 2 * len(
            cluster.log_text(leader)
        ):
            cluster.submit("once", count=100)
        cluster.wait_idle()
        # No file of this node may be longer than the journal is now: only that, its own log has room enough.
        resource.prlimit(cluster.pid(leader), resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        assert cluster.ended() == {leader: 1}
        assert "critical" in cluster.log_text(leader)
        assert "File too large" in cluster.log_text(leader)
        assert f"{cluster.cluster.node_dir(leader) / 'raft'}" in cluster.log_text(leader)
        ids = cluster.submit("once", count=100)
        eventually("the others did it", lambda: cluster.effects_of(ids) == [1] * 100)
        cluster.start(leader)
        cluster.wait_up()
        cluster.submit("reckon", count=50)
        cluster.check(troubled=(leader,))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", DISK_BYTES) as place:
        yield place


def submit_on(cluster: RealCluster) -> None:
    for _ in range(1000):  # the log's file may have some room inside
        cluster.submit("once", count=200)


def restarted(cluster: RealCluster) -> bool:
    """As a supervisor does: whoever stops is started again, also if that takes it a while."""
    for node in set(cluster.nodes) - set(cluster.running()):
        cluster.start(node)
    return cluster.all_take_work()


def test_a_full_disk_refuses_submits_and_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    with RealCluster(tmp_path, data=small_disk / "data") as cluster:
        cluster.start()
        cluster.wait_up()
        cluster.submit("once", count=200)
        ballast = fill(small_disk)
        with pytest.raises(SubmitFailed, match="full"):
            submit_on(cluster)
        # Who cannot write can be no leader's majority, so two stop; the third may never get so far as to write.
        ended: dict[str, int] = {}
        while len(ended) < 2:
            ended |= cluster.ended(30)
        assert set(ended.values()) == {1}, ended
        ballast.unlink()
        eventually("all three take work", partial(restarted, cluster), 60)
        cluster.submit("once", count=100)
        cluster.check(troubled=cluster.nodes)
