"""What a node's log says of its workers."""

from __future__ import annotations

import logging
from typing import assert_never

from node.workers.events import (
    GuardRestarted,
    PoolEvent,
    Printed,
    WorkerEnded,
    WorkerFailed,
    WorkerStarted,
)

_log = logging.getLogger("oncekeeper.node")


def tell(event: PoolEvent, *, stopping: bool) -> None:
    """``stopping``: the node is, so that workers end as they should."""
    match event:
        case Printed(pid, _, task, line):
            _log.info("worker %d, task %s: %s", pid, task or "none", line)
        case WorkerStarted(pid, kind):
            _log.info("worker %d started (%s)", pid, kind)
        case WorkerEnded(pid, kind, why, in_doubt):
            level = logging.INFO if stopping and not in_doubt else logging.WARNING
            _log.log(level, "worker %d ended (%s): %s; %d tasks in doubt", pid, kind, why, in_doubt)
        case WorkerFailed(kind, error, retry_s):
            _log.error("a worker could not start (%s), again in %.1f s: %s", kind, retry_s, error)
        case GuardRestarted(status):
            _log.warning("the guard ended with %d and was started again", status)
        case _:
            assert_never(event)
