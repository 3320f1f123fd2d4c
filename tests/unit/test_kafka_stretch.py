"""What was fetched of one partition and is not taken yet."""

from __future__ import annotations

from dedup.ids import Ids
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.kafka_stretch import Stretch
from oncekeeper.log.port import READ_ITEMS_MAX, Fetched


def single(offset: int) -> Fetched:
    batch = TaskBatch(queue="q", handler="h", ids=Ids(((offset + 1, 1),)), bodies=(b"{}",))
    return Fetched(3, offset, batch)


def test_a_read_takes_so_many_items_and_the_next_goes_on_there() -> None:
    stretch = Stretch(0)
    items = [single(offset) for offset in range(READ_ITEMS_MAX + 7)]
    stretch.add(items)
    first = stretch.read(0, 8192, 10**7)
    assert first == items[:READ_ITEMS_MAX]
    assert stretch.read(first[-1].end, 8192, 10**7) == items[READ_ITEMS_MAX:]
    assert stretch.tasks == 7
