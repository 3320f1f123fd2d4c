"""What every store of delayed tasks promises, as tests that a module takes by ``from … import *``.

It gives them the fixtures ``log``, ``clock`` and ``copies``: whether the store has messages of its own, and needs
none of the log's any more.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec

from dedup.ids import Ids, keyed_id
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.delayed import ENQUEUE, RUN, Deferral, Delayed, DelayStore, Place, enqueued
from oncekeeper.log.port import Fetched

NOW_MS = 1_800_000_000_000
FAR_MS = NOW_MS + 10**12
Log = Any  # a TaskLog with ``delays``


class Clock:
    now_ms = NOW_MS

    def __call__(self) -> int:
        return self.now_ms


def batch(start: int, count: int, due_ms: int = NOW_MS) -> TaskBatch:
    bodies = tuple(b'{"n":%d}' % n for n in range(start, start + count))
    return TaskBatch(queue="q", handler="h", ids=Ids(((start, count),)), bodies=bodies, due_ms=due_ms)


def submit(log: Log, start: int, count: int, due_ms: int, then: str = RUN) -> list[Deferral]:
    """Append tasks, and what their owner says once it has read them."""
    return [
        Deferral(item.partition, item.base, due_ms, then, item.batch)
        for place in log.append([batch(start, count, due_ms)])
        for item in log.read(place.partition, place.base, place.count, 10**9)[:1]
        if isinstance(item, Fetched)
    ]


def delayed(log: Log, start: int, count: int, due_ms: int, then: str = RUN) -> Delayed:
    (task,) = submit(log, start, count, due_ms, then)
    log.delays.defer([task])
    return Delayed(due_ms, task.partition, task.offset, count, then)


def everything(log: Log) -> list[Delayed]:
    return joined(log.delays.due(log.ends(), FAR_MS, None, 10**6))


def joined(rows: list[Delayed]) -> list[Delayed]:
    """Neighbours as one: in how many pieces a store learns of what was written at once is not promised."""
    found: list[Delayed] = []
    for row in rows:
        last = found[-1] if found else None
        if last and (last.due_ms, last.partition, last.end, last.then) == (
            row.due_ms, row.partition, row.offset, row.then,
        ):  # fmt: skip
            found[-1] = msgspec.structs.replace(last, count=last.count + row.count)
        else:
            found.append(row)
    return found


def ids_of(log: Log, rows: list[Delayed]) -> list[int]:
    found: list[int] = []
    for _, item in log.delays.fetch(rows):
        assert isinstance(item, Fetched)
        found += [task_id for task_id in item.batch.ids if isinstance(task_id, int)]
    return found


def test_it_is_a_store_of_delayed_tasks(log: Log) -> None:
    assert isinstance(log.delays, DelayStore)
    assert (everything(log), log.delays.counts(), log.delays.find(1)) == ([], {}, [])


def test_what_was_deferred_is_found_whole_with_its_message(log: Log) -> None:
    row = delayed(log, 100, 20, NOW_MS + 5, ENQUEUE)
    assert everything(log) == [row]
    assert log.delays.counts() == {row.partition: 20}
    found, whole = log.delays.fetch([row]), batch(100, 20, NOW_MS + 5)
    assert joined([part for part, _ in found]) == [row]
    for part, item in found:
        cut = whole.part(part.offset - row.offset, part.count)
        assert item == Fetched(row.partition, part.offset, cut)
    assert log.delays.find(107) == [Delayed(NOW_MS + 5, row.partition, row.offset + 7, 1, ENQUEUE)]


def test_only_what_is_due_by_then_and_of_these_partitions_is_given(log: Log) -> None:
    first, second, third = (delayed(log, 1 + 10 * n, 1, NOW_MS + n) for n in range(3))
    assert log.delays.due(log.ends(), NOW_MS + 1, None, 10) == [first, second]
    assert log.delays.due([third.partition], FAR_MS, None, 10) == [third]
    assert log.delays.due([], FAR_MS, None, 10) == []


def test_pages_follow_the_due_order_over_all_partitions_and_miss_nothing(log: Log) -> None:
    draw = random.Random(5)
    rows = [delayed(log, 1 + 10 * n, draw.randint(1, 3), NOW_MS + draw.randrange(8)) for n in range(60)]
    paged: list[Delayed] = []
    while page := log.delays.due(log.ends(), FAR_MS, paged[-1] if paged else None, 7):
        assert len(page) <= 7
        paged += page
    assert joined(paged) == joined(sorted(rows))


def test_what_is_deferred_again_after_a_crash_stands_once_and_where_it_was_moved_to(log: Log) -> None:
    (task,) = submit(log, 10, 10, NOW_MS + 1)
    log.delays.defer([task])
    log.delays.move([Place(task.partition, task.offset + 4, 2)], NOW_MS + 99)
    before = everything(log)
    log.delays.defer([task])
    log.delays.defer([task, task])
    assert everything(log) == before
    assert [(row.due_ms - NOW_MS, row.count) for row in before] == [(1, 4), (1, 4), (99, 2)]
    assert log.delays.counts() == {task.partition: 10}


def test_a_part_that_was_deferred_before_does_not_hinder_the_rest(log: Log) -> None:
    (task,) = submit(log, 10, 10, NOW_MS + 1)
    log.delays.defer([msgspec.structs.replace(task, offset=task.offset + 3, batch=task.batch.part(3, 2))])
    log.delays.defer([task])
    rows = everything(log)
    assert rows == [Delayed(NOW_MS + 1, task.partition, task.offset, 10)]
    assert sorted(ids_of(log, rows)) == list(range(10, 20))


def test_a_part_of_a_row_can_be_dropped_and_the_rest_waits_on(log: Log) -> None:
    row = delayed(log, 10, 10, NOW_MS + 1)
    assert (
        log.delays.drop([Place(row.partition, row.offset + 2), Place(row.partition, row.offset + 5, 2)]) == 3
    )
    assert sorted(ids_of(log, everything(log))) == [10, 11, 13, 14, 17, 18, 19]
    assert log.delays.counts() == {row.partition: 7}
    assert log.delays.find(12) == []
    assert ids_of(log, [row]) == [10, 11, 13, 14, 17, 18, 19], "what is left of a row is found by what it was"


def test_what_is_dropped_twice_or_was_never_there_does_no_harm(log: Log) -> None:
    row = delayed(log, 10, 10, NOW_MS + 1)
    other = delayed(log, 50, 1, NOW_MS + 1)
    place = Place(row.partition, row.offset, 10)
    assert [log.delays.drop([place, place]), log.delays.drop([place]), log.delays.drop([])] == [10, 0, 0]
    assert everything(log) == [other]


def test_neighbouring_rows_are_dropped_by_one_place(log: Log) -> None:
    tasks = [task for n in range(12) for task in submit(log, 1 + n, 1, NOW_MS + n)]
    tasks = [task for task in tasks if task.partition == tasks[0].partition]
    log.delays.defer(tasks)
    assert log.delays.drop([Place(tasks[0].partition, tasks[0].offset, len(tasks))]) == len(tasks) >= 3
    assert everything(log) == []


def test_what_is_moved_waits_for_its_new_time_and_no_longer_for_the_old_one(log: Log) -> None:
    row = delayed(log, 10, 3, NOW_MS + 50)
    assert log.delays.move([Place(row.partition, row.offset + 1)], NOW_MS + 10) == 1
    assert log.delays.move([Place(row.partition, row.offset + 1)], NOW_MS + 20) == 1
    assert [(r.due_ms - NOW_MS, r.offset - row.offset, r.count) for r in everything(log)] == [
        (20, 1, 1),
        (50, 0, 1),
        (50, 2, 1),
    ]
    assert log.delays.move([Place(row.partition, row.offset + 3)], NOW_MS) == 0
    assert log.delays.find(11) == [Delayed(NOW_MS + 20, row.partition, row.offset + 1)]


def test_what_stands_at_places_is_told_whatever_time_it_waits_for(log: Log) -> None:
    row = delayed(log, 10, 6, NOW_MS + 50)
    log.delays.move([Place(row.partition, row.offset + 2)], NOW_MS + 90)
    log.delays.drop([Place(row.partition, row.offset + 4)])
    found = log.delays.standing(Place(row.partition, row.offset + 1, 4))
    assert [(r.offset - row.offset, r.count, r.due_ms - NOW_MS) for r in found] == [
        (1, 1, 50),
        (2, 1, 90),
        (3, 1, 50),
    ]
    assert log.delays.standing(Place(row.partition, row.offset + 6, 9)) == []
    assert log.delays.standing(Place((row.partition + 1) % log.partitions, row.offset, 6)) == []


def test_what_is_enqueued_stands_at_the_end_of_its_partition_and_waits_no_more(log: Log) -> None:
    row = delayed(log, 10, 3, NOW_MS + 50, ENQUEUE)
    other = delayed(log, 50, 1, NOW_MS + 60)
    end = log.ends()[row.partition]
    appended = log.delays.enqueue([row])
    assert (appended[0].base, sum(place.count for place in appended)) == (end, 3)
    again = enqueued(batch(10, 3, due_ms=NOW_MS + 50))
    assert log.read(row.partition, end, 10, 10**6) == [Fetched(row.partition, end, again)]
    assert everything(log) == [other]
    assert log.delays.enqueue([row]) == [], "it is not there any more"
    assert log.ends()[row.partition] == end + 3


def test_what_was_moved_and_is_enqueued_tells_by_which_time(log: Log) -> None:
    row = delayed(log, 10, 3, NOW_MS + 50, ENQUEUE)
    log.delays.move([Place(row.partition, row.offset, 3)], NOW_MS + 20)
    end = log.ends()[row.partition]
    log.delays.enqueue([msgspec.structs.replace(row, due_ms=NOW_MS + 20)])
    again = enqueued(batch(10, 3), NOW_MS + 20)
    assert log.read(row.partition, end, 10, 10**6) == [Fetched(row.partition, end, again)]


def test_what_somebody_else_moved_meanwhile_is_not_moved_by_the_time_it_had(log: Log) -> None:
    row = delayed(log, 10, 3, NOW_MS + 50)
    log.delays.move([Place(row.partition, row.offset + 1)], NOW_MS + 90)
    assert log.delays.move([Place(row.partition, row.offset, 3)], NOW_MS + 70, NOW_MS + 50) == 2
    waiting = sorted((each.offset - row.offset, each.due_ms - NOW_MS) for each in everything(log))
    assert waiting == [(0, 70), (1, 90), (2, 70)]


def test_what_was_moved_is_neither_fetched_nor_enqueued_by_its_old_time(log: Log) -> None:
    row = delayed(log, 10, 3, NOW_MS + 50)
    log.delays.move([Place(row.partition, row.offset, 3)], NOW_MS + 90)
    assert log.delays.fetch([row]) == []
    assert log.delays.enqueue([row]) == []
    assert log.delays.counts() == {row.partition: 3}


def test_what_is_left_of_a_row_is_enqueued_and_the_rest_of_it_is_not(log: Log) -> None:
    row = delayed(log, 10, 5, NOW_MS + 50, ENQUEUE)
    log.delays.drop([Place(row.partition, row.offset + 1)])
    log.delays.move([Place(row.partition, row.offset + 3)], NOW_MS + 90)
    appended = log.delays.enqueue([row])
    assert [place.count for place in appended] == [1, 1, 1]
    found = [log.read(place.partition, place.base, 1, 1)[0] for place in appended]
    assert [list(item.batch.ids) for item in found if isinstance(item, Fetched)] == [[10], [12], [14]]
    assert everything(log) == [Delayed(NOW_MS + 90, row.partition, row.offset + 3, 1, ENQUEUE)]


def test_a_keyed_task_is_found_by_its_id(log: Log) -> None:
    ids = Ids(keys=tuple(keyed_id("q", f"k{n}") for n in range(9)))
    tasks = []
    for place in log.append([TaskBatch(queue="q", handler="h", ids=ids, bodies=(b"{}",) * 9)]):
        (item,) = log.read(place.partition, place.base, place.count, 10**6)
        assert isinstance(item, Fetched)
        tasks.append(Deferral(item.partition, item.base, NOW_MS, RUN, item.batch))
    log.delays.defer(tasks)
    for key in ids.keys:
        (found,) = log.delays.find(key)
        assert log.delays.drop([Place(found.partition, found.offset)]) == 1
        assert log.delays.find(key) == []
    assert everything(log) == []


def test_retention_spares_what_is_delayed_and_takes_it_when_it_is_dropped(
    log: Log, clock: Clock, copies: bool
) -> None:
    row = delayed(log, 10, 3, NOW_MS + 50)
    log.append([batch(1000 + n, 1) for n in range(8)])
    log.commit(log.ends())
    assert log.retain(0, NOW_MS + 10**9) == (11 if copies else 8)
    assert ids_of(log, [row]) == [10, 11, 12]
    log.delays.drop([Place(row.partition, row.offset, 2)])
    assert log.retain(0, NOW_MS + 10**9) == 0
    assert ids_of(log, [row]) == [12]
    log.delays.drop([Place(row.partition, row.offset + 2)])
    assert log.retain(0, NOW_MS + 10**9) == (0 if copies else 3)
    assert log.find(10) == []


def test_any_sequence_leaves_what_a_dictionary_of_tasks_would(log: Log) -> None:
    draw = random.Random(11)
    tasks = [task for n in range(12) for task in submit(log, 1 + 100 * n, 20, NOW_MS)]
    model: dict[tuple[int, int], int] = {}
    for _ in range(150):
        task = draw.choice(tasks)
        at = draw.randrange(20)
        count = draw.randint(1, 20 - at)
        place = Place(task.partition, task.offset + at, count)
        keys = [(place.partition, place.offset + n) for n in range(count)]
        due_ms = NOW_MS + draw.randrange(5)
        what = draw.choice(["defer", "drop", "move"])
        if what == "defer":
            part = msgspec.structs.replace(
                task, offset=place.offset, due_ms=due_ms, batch=task.batch.part(at, count)
            )
            log.delays.defer([part])
            model |= {key: due_ms for key in keys if key not in model}
        elif what == "drop":
            assert log.delays.drop([place]) == sum(model.pop(key, None) is not None for key in keys)
        else:
            standing = [key for key in keys if key in model]
            assert log.delays.move([place], due_ms) == len(standing)
            model |= dict.fromkeys(standing, due_ms)
        rows = everything(log)
        shown = {(row.partition, row.offset + n): row.due_ms for row in rows for n in range(row.count)}
        assert shown == model
        assert len(shown) == sum(row.count for row in rows), "rows overlap"
        assert sum(log.delays.counts().values()) == len(model)
    assert sorted(ids_of(log, everything(log))) == sorted(
        next(iter(task.batch.ids)) + offset - task.offset  # type: ignore[operator]
        for task in tasks
        for partition, offset in model
        if partition == task.partition and 0 <= offset - task.offset < 20
    )
