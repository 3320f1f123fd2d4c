"""What a test names, and what is known of it: durations, tasks, and a task's facts from ledger, log and history."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dedup.ids import TaskId, id_text, ids_of, parse_id
from node.why import Facts, Place
from oncekeeper.envelope import ENQUEUED, decode_task
from oncekeeper.errors import UnknownTask
from oncekeeper.handle import Handle
from raft.ledger import TaskState

if TYPE_CHECKING:
    from chaos.testing.cluster import InMemoryCluster

Known = Handle[Any] | TaskId | str
Duration = str | float | timedelta

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)")
_UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def duration_ms(duration: Duration) -> int:
    """Milliseconds of "10s", of seconds, or of a timedelta."""
    if isinstance(duration, timedelta):
        return round(duration.total_seconds() * 1000)
    if isinstance(duration, str):
        matched = _DURATION.fullmatch(duration.strip())
        if matched is None:
            raise ValueError(f"{duration!r} must be a duration, as in 500ms, 30s, 5m, 1h or 2d")
        return round(float(matched[1]) * _UNIT_MS[matched[2]])
    if duration < 0:
        raise ValueError(f"{duration} must not be negative: time only passes")
    return round(duration * 1000)


def id_of(task: Known) -> TaskId:
    if isinstance(task, Handle):
        return task.task_id
    return parse_id(task) if isinstance(task, str) else task


def word(standing: TaskState, now_ms: int) -> str:
    """The word that people are told (as node/http/tasks.py has it, which needs a web server)."""
    match standing.state:
        case "claimed":
            return "running"
        case "waiting":
            return "delayed" if standing.due_ms > now_ms else "waiting"
        case "new" | "unallocated":
            return "waiting"
        case other:
            return other


def facts_of(cluster: InMemoryCluster, task_id: TaskId) -> Facts:
    """For ``describe`` and the story. Raises UnknownTask."""
    standing = cluster.ledger.describe(task_id)
    places, aside = cluster.log.find(task_id), cluster.log.find_aside(ids_of([task_id]))
    batch = places[0].batch if places else decode_task(aside[0].message) if aside else None
    attempts = [part for each in cluster.attempts if (part := each.of(task_id)) is not None]
    if batch is None and not attempts:
        raise UnknownTask(f"no task {id_text(task_id)} is known here", 404, "id")
    committed = cluster.log.committed()
    rows = cluster.log.delays.find(task_id)
    due_ms = rows[0].due_ms if rows else batch.due_ms if batch is not None else 0
    state = word(standing, cluster.ledger.now_ms)
    if (
        state == "waiting"
        and due_ms > cluster.wall_ms
        and all(place.batch.then != ENQUEUED for place in places)
    ):
        state = "delayed"
    handler = batch.handler if batch is not None else attempts[0].handler
    return Facts(
        id=task_id,
        state=state,
        standing=standing,
        due_in_ms=max(0, standing.due_ms - cluster.ledger.now_ms) if standing.state == "waiting" else 0,
        handler=handler,
        queue=batch.queue if batch is not None else attempts[0].queue,
        key=batch.keys[0] if batch is not None and batch.keys else "",
        submitted_ms=batch.submitted_ms if batch is not None else 0,
        submitted_by=batch.submitted_by if batch is not None else "",
        due_ms=due_ms,
        places=tuple(Place(p.partition, p.offset, p.offset < committed[p.partition]) for p in places),
        aside=aside[0].kind if aside else "",
        aside_reason=aside[0].reason if aside else "",
        attempts=tuple(attempts),
        events=tuple(event for each in cluster.events if (event := each.of(task_id)) is not None),
        on_doubt=cluster.infos[handler].on_doubt if handler in cluster.infos else "",
        queue_paused=batch is not None and cluster.ledger.paused(batch.queue),
    )
