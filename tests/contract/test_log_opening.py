"""Opening the embedded log: whoever comes at the same moment makes it once, and all of them may use it."""

from __future__ import annotations

import threading
from pathlib import Path

from oncekeeper.log.embedded import open_log

TOGETHER, ROUNDS = 6, 40


def test_those_who_open_a_new_log_at_the_same_moment_all_get_it(tmp_path: Path) -> None:
    failures: list[Exception] = []
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        (folder / "log").mkdir(parents=True)
        barrier = threading.Barrier(TOGETHER)

        def come(folder: Path = folder, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                open_log(folder, create=True, partitions=12, cluster_id="0" * 32).close()
            except Exception as error:  # noqa: BLE001  # told below
                failures.append(error)

        threads = [threading.Thread(target=come) for _ in range(TOGETHER)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
