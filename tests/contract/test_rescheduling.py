"""What a reschedule makes of a task that takes its turn, where the clocks of the nodes differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dedup.ids import Ids
from node.rescheduling import _goes_by
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.delayed import ENQUEUE, Deferral, Delayed, Place
from oncekeeper.log.embedded import EmbeddedLog, open_log
from oncekeeper.log.memory import MemoryLog

OLD_MS = 1_900_000_000_000
NEW_MS = OLD_MS - 3_600_000
ID = 77


@pytest.fixture(params=["embedded", "memory"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedLog | MemoryLog]:
    makers: dict[str, Callable[[], EmbeddedLog | MemoryLog]] = {
        "embedded": lambda: open_log(tmp_path, create=True, partitions=4),
        "memory": lambda: MemoryLog(4, lambda: 0),
    }
    made = makers[request.param]()
    yield made
    made.close()


def waits(log: Any) -> Delayed:
    batch = TaskBatch(
        queue="q", handler="h", ids=Ids(((ID, 1),)), bodies=(b"{}",), due_ms=OLD_MS, then=ENQUEUE
    )
    (place,) = log.append([batch])
    log.delays.defer([Deferral(place.partition, place.base, OLD_MS, ENQUEUE, batch)])
    return Delayed(OLD_MS, place.partition, place.base, 1, ENQUEUE)


def test_it_goes_by_a_time_for_which_it_waits(log: Any) -> None:
    row = waits(log)
    log.delays.move([Place(row.partition, row.offset)], NEW_MS)
    assert _goes_by(log, ID, NEW_MS, NEW_MS - 50)
    assert not _goes_by(log, ID, NEW_MS + 1, NEW_MS - 50)


def test_what_its_owner_enqueued_by_the_new_time_goes_by_it_though_it_is_not_due_by_our_clock(
    log: Any,
) -> None:
    """Found by the simulation: the clock of the owner was six milliseconds ahead."""
    row = waits(log)
    log.delays.move([Place(row.partition, row.offset)], NEW_MS)
    (moved,) = log.delays.due(range(4), NEW_MS, None, 10)
    log.delays.enqueue([moved])
    assert _goes_by(log, ID, NEW_MS, NEW_MS - 6)


def test_what_its_owner_enqueued_by_the_old_time_does_not_go_by_the_new_one(log: Any) -> None:
    log.delays.enqueue([waits(log)])
    assert not _goes_by(log, ID, NEW_MS, NEW_MS - 6)
    assert _goes_by(log, ID, NEW_MS, NEW_MS), "by whichever time it takes its turn, it starts after this one"
