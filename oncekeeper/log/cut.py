"""How batches become rows: which partition takes which tasks (pure).

A run of range ids is spread over all partitions, so that one large submit gives every node work. Keyed tasks
go by their key, so that a task submitted twice under one key meets itself in one partition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from dedup.ids import Ids
from oncekeeper.envelope import BATCH_TASKS_MAX, TaskBatch

ROW_BYTES_MAX = 1024 * 1024
"""A row of more than one task is cut in two until its bodies fit: rows are read and written whole."""
RUN_TASKS_MIN = 64
"""A run is not spread thinner than this: a row for each handful of tasks would cost more than it wins."""


def partition_of_key(key: bytes, partitions: int) -> int:
    """Keyed ids are digests, so that some of their bits do as a hash."""
    return int.from_bytes(key[:8], "big") % partitions


def cut(batches: Sequence[TaskBatch], partitions: int, turn: int) -> Iterator[tuple[int, TaskBatch]]:
    """(partition, row) pairs in order; ``turn`` is the partition from which runs are dealt out in turn."""
    for batch in batches:
        if len(batch.ids) != len(batch.bodies) or len(batch.ids.runs) + bool(batch.ids.keys) != 1:
            raise ValueError(
                f"a batch has one run of ids or keys only, and a body for each: {len(batch.ids.runs)} runs, "
                f"{len(batch.ids.keys)} keys, {len(batch.bodies)} bodies"
            )
        if batch.ids.keys:
            for partition, row in _by_key(batch, partitions):
                yield from ((partition, piece) for piece in _fitting(row))
            continue
        size = min(BATCH_TASKS_MAX, max(RUN_TASKS_MIN, -(-len(batch) // partitions)))
        for at in range(0, len(batch), size):
            for piece in _fitting(batch.part(at, size)):
                yield turn % partitions, piece
                turn += 1


def _by_key(batch: TaskBatch, partitions: int) -> Iterator[tuple[int, TaskBatch]]:
    places: dict[int, list[int]] = {}
    for at, key in enumerate(batch.ids.keys):
        places.setdefault(partition_of_key(key, partitions), []).append(at)
    for partition, ats in sorted(places.items()):
        for start in range(0, len(ats), BATCH_TASKS_MAX):
            chosen = ats[start : start + BATCH_TASKS_MAX]
            yield (
                partition,
                msgspec.structs.replace(
                    batch,
                    ids=Ids(keys=tuple(batch.ids.keys[at] for at in chosen)),
                    bodies=tuple(batch.bodies[at] for at in chosen),
                    keys=tuple(batch.keys[at] for at in chosen) if batch.keys else (),
                ),
            )


def _fitting(batch: TaskBatch) -> Iterator[TaskBatch]:
    if len(batch) > 1 and sum(map(len, batch.bodies)) > ROW_BYTES_MAX:
        half = len(batch) // 2
        yield from _fitting(batch.part(0, half))
        yield from _fitting(batch.part(half, len(batch) - half))
    else:
        yield batch
