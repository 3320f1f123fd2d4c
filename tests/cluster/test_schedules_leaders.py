"""A schedule of every second whose leader is killed again and again: each of its times takes effect once."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.real_cluster import RealCluster, eventually
from tests.support.watched_schedule import Watched

KILLS = int(os.environ.get("ONCE_TEST_LEADER_KILLS", "5"))  # 20 take a minute and a half


def test_each_second_takes_effect_once_through_all_leaders_killed(tmp_path: Path) -> None:
    with RealCluster(tmp_path) as cluster:
        cluster.start()
        cluster.wait_up()
        watched = Watched(cluster, "seconds", "all", 1_000)
        for _ in range(KILLS):
            watched.wait_for(1)
            leader = cluster.leader()
            cluster.kill(leader)
            cluster.start(leader)
        watched.wait_for(2)
        cluster.wait_up()
        shown, effects = watched.end(), watched.effects()
        assert set(effects.values()) == {1}
        owed = list(range(watched.first_ms, max(effects) + 1, 1_000))
        assert sorted(effects) == owed, "a second was left out"
        assert (shown["fired"], shown["missed"]) == (len(owed), 0)
        watched.tell_history()
        eventually("all nodes take work", cluster.all_take_work)
        cluster.check()
        print(f"{len(owed)} seconds through {KILLS} killed leaders, each once")
