"""One suite for every task log: what the port promises, each log keeps.

A test module takes it in by ``from tests.support.log_suite import *`` and gives it the fixtures ``log`` (empty, of
four partitions), ``clock`` (by which the log stamps what it stores) and ``traits``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import pytest

from dedup.ids import Ids, keyed_id
from oncekeeper.envelope import BATCH_TASKS_MAX, TaskBatch
from oncekeeper.log.port import READ_ITEMS_MAX, Aside, Fetched, Item, TaskLog

NOW_MS = 1_800_000_000_000


class Clock:
    """Of a log that is told the time."""

    def __init__(self) -> None:
        self.now_ms = NOW_MS

    def __call__(self) -> int:
        return self.now_ms

    def advance(self, ms: int) -> None:
        self.now_ms += ms


class RealClock:
    """Of a log that takes the machine's."""

    def __call__(self) -> int:
        return time.time_ns() // 1_000_000

    def advance(self, ms: int) -> None:
        until = self() + ms
        while (now := self()) < until:
            time.sleep((until - now) / 1000)


class Traits(msgspec.Struct, frozen=True):
    """Where the logs differ, by what they are made of."""

    whole_rows: bool = True
    """Rows are read as they were appended. Kafka stores tasks one by one, and cuts where the bounds are."""
    finds_committed: bool = True
    """A task is found also below the committed position. Kafka has no index: what is done is not searched."""
    places_stay: bool = True
    """What is put aside again keeps its place. On Kafka it stands behind the others then."""


def ids_in(items: Sequence[Item]) -> list[int | bytes]:
    return [task_id for item in items if isinstance(item, Fetched) for task_id in item.batch.ids]


def run(start: int, count: int, body: bytes = b"") -> TaskBatch:
    bodies = tuple(body or b'{"n": %d}' % n for n in range(start, start + count))
    return TaskBatch(
        queue="default", handler="shop.charge", ids=Ids(((start, count),)), bodies=bodies, submitted_ms=NOW_MS
    )


def keyed(*keys: str) -> TaskBatch:
    ids = Ids(keys=tuple(keyed_id("default", key) for key in keys))
    return TaskBatch(
        queue="default", handler="shop.charge", ids=ids, bodies=(b"{}",) * len(keys), keys=tuple(keys)
    )


def everything(log: TaskLog) -> dict[int, list[Fetched]]:
    found: dict[int, list[Fetched]] = {}
    for partition in range(log.partitions):
        offset = 0
        while batches := log.read(partition, offset, 100, 100_000):
            for batch in batches:
                assert isinstance(batch, Fetched)
                assert batch.base == offset
                offset += len(batch.batch)
                found.setdefault(partition, []).append(batch)
        assert offset == log.ends()[partition]
    return found


def test_it_is_a_task_log(log: TaskLog) -> None:
    assert isinstance(log, TaskLog)
    assert (log.partitions, log.ends(), log.committed()) == (
        4,
        dict.fromkeys(range(4), 0),
        dict.fromkeys(range(4), 0),
    )


def test_what_was_appended_is_read_back_equal(log: TaskLog) -> None:
    batch = TaskBatch(
        queue="mail",
        handler="shop.send",
        ids=Ids(((7, 2),)),
        bodies=(b'{"to": "a"}', b'{"to": "\xc3\xa9"}'),
        ttr_ms=5_000,
        due_ms=NOW_MS + 1,
        attempt=3,
        traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
        submitted_ms=NOW_MS,
        submitted_by="host:1 test",
    )
    (appended,) = log.append([batch])
    (fetched,) = log.read(appended.partition, appended.base, 10, 10_000)
    assert fetched == Fetched(appended.partition, appended.base, batch)


def test_a_large_run_gives_every_partition_work_and_loses_no_task(log: TaskLog) -> None:
    total = 5 * BATCH_TASKS_MAX
    appended = log.append([run(1, total)])
    found = everything(log)
    assert set(found) == {0, 1, 2, 3}
    assert sum(piece.count for piece in appended) == total
    ids = sorted(i for batches in found.values() for fetched in batches for i in fetched.batch.ids)
    assert ids == list(range(1, total + 1))
    assert all(len(f.batch) <= BATCH_TASKS_MAX for batches in found.values() for f in batches)
    for fetched in (f for batches in found.values() for f in batches):
        assert fetched.batch == run(*fetched.batch.ids.runs[0])


def test_small_submits_take_turns_at_the_partitions(log: TaskLog) -> None:
    assert {log.append([run(n, 1)])[0].partition for n in range(1, 5)} == {0, 1, 2, 3}


def test_equal_keys_meet_in_one_partition(log: TaskLog) -> None:
    names = [f"order-{n}" for n in range(50)]
    first, again = log.append([keyed(*names)]), log.append([keyed(*names)])
    assert {a.partition: a.count for a in first} == {a.partition: a.count for a in again}
    for name in names:
        one, two = log.find(keyed_id("default", name))
        assert one.partition == two.partition
        assert one.offset < two.offset
        assert one.batch.keys == two.batch.keys == (name,)


def test_reading_from_within_a_batch_cuts_it_there(log: TaskLog) -> None:
    (appended,) = log.append([run(100, 20)])
    (fetched,) = log.read(appended.partition, appended.base + 5, 100, 10_000)
    assert fetched == Fetched(appended.partition, 5, run(105, 15))


def test_reading_stops_at_the_bounds_but_gives_at_least_one_batch(log: TaskLog, traits: Traits) -> None:
    for n in range(12):
        log.append([run(1 + 10 * n, 10)])
    partition = next(number for number, end in log.ends().items() if end == 30)
    everything = ids_in(log.read(partition, 0, 1000, 10**6))
    assert len(everything) == 30
    for tasks_max in (20, 15, 5):
        items = log.read(partition, 0, tasks_max, 10**6)
        assert ids_in(items) == everything[: items[-1].end]
        assert items[-1].end <= tasks_max or len(items) == 1
        if traits.whole_rows:
            assert items[-1].end % 10 == 0
    assert len(log.read(partition, 0, 1, 1)) == 1
    assert len(log.read(partition, 0, 1000, 10**6)) == 3


def test_a_read_ends_after_so_many_batches_and_the_next_goes_on_there(log: TaskLog, traits: Traits) -> None:
    rows = 4 * (READ_ITEMS_MAX + 7)
    log.append([run(1 + n, 1) for n in range(rows)])
    items = log.read(0, 0, 8192, 10**7)
    if traits.whole_rows:
        assert len(items) == READ_ITEMS_MAX
    found = [
        task_id for batches in everything(log).values() for batch in batches for task_id in batch.batch.ids
    ]
    assert sorted(map(int, found)) == list(range(1, rows + 1))


def test_there_is_nothing_to_read_at_the_end(log: TaskLog) -> None:
    (appended,) = log.append([run(1, 3)])
    assert log.read(appended.partition, 3, 10, 1000) == []
    assert log.read((appended.partition + 1) % 4, 0, 10, 1000) == []


def test_nothing_is_appended_by_an_empty_call(log: TaskLog) -> None:
    assert log.append([]) == []


def test_ids_of_two_kinds_in_one_batch_are_refused(log: TaskLog) -> None:
    mixed = TaskBatch(queue="q", handler="h", ids=Ids(((1, 1),), (b"k" * 16,)), bodies=(b"{}", b"{}"))
    with pytest.raises(ValueError, match="one run of ids or keys only"):
        log.append([run(1, 1), mixed])
    assert set(log.ends().values()) == {0}


def test_every_id_is_found_where_it_stands(log: TaskLog) -> None:
    log.append([run(10, 300), keyed("a"), run(1000, 1)])
    for task_id in (10, 173, 309, 1000):
        (located,) = log.find(task_id)
        (fetched,) = (f for f in log.read(located.partition, located.offset, 1, 1) if isinstance(f, Fetched))
        assert fetched.base == located.offset
        assert fetched.batch.part(0, 1) == located.batch
        assert list(located.batch.ids) == [task_id]
    assert log.find(9) == log.find(310) == log.find(b"?" * 16) == []


def test_an_id_that_was_submitted_twice_is_found_twice(log: TaskLog) -> None:
    log.append([run(10, 30)])
    log.append([run(15, 2)])
    assert [list(found.batch.ids) for found in log.find(16)] == [[16], [16]]
    assert len(log.find(17)) == 1


def test_committed_positions_never_go_back(log: TaskLog) -> None:
    log.append([run(1, 4 * 64)])
    log.commit({0: 5, 1: 7})
    log.commit({0: 3, 1: 9, 2: 0})
    assert log.committed() == {0: 5, 1: 9, 2: 0, 3: 0}


def test_a_position_above_the_end_is_refused_and_moves_nothing(log: TaskLog) -> None:
    log.append([run(1, 4 * 64)])
    with pytest.raises(ValueError, match="position=65 is above its end=64"):
        log.commit({0: 10, 1: 65})
    with pytest.raises(ValueError, match="partition=4 must be below 4"):
        log.commit({4: 0})
    assert set(log.committed().values()) == {0}


def test_retention_deletes_only_what_is_committed_and_old(
    log: TaskLog, clock: Clock | RealClock, traits: Traits
) -> None:
    before_ms = clock()
    log.append([run(1, 4 * 64), keyed("a")])
    after_ms = clock()
    clock.advance(20)
    log.append([run(1001, 4 * 64)])
    ends = log.ends()
    log.commit(ends)
    assert log.retain(keep_ms=1000, now_ms=before_ms + 999) == 0
    assert log.retain(keep_ms=1000, now_ms=after_ms + 1000) == 257
    assert log.find(5) == log.find(keyed_id("default", "a")) == []
    assert len(log.find(1005)) == (1 if traits.finds_committed else 0)
    assert log.ends() == ends
    left = [task_id for partition in ends for task_id in ids_in(log.read(partition, 0, 1000, 10**6))]
    assert sorted(map(int, left)) == list(range(1001, 1001 + 4 * 64))


def test_retention_keeps_what_is_not_committed_however_old(log: TaskLog, traits: Traits) -> None:
    log.append([run(1, 4 * 64)])
    log.commit({0: 63})
    assert log.retain(keep_ms=0, now_ms=NOW_MS + 10**9) == (0 if traits.whole_rows else 63)
    log.commit({0: 64})
    assert log.retain(keep_ms=0, now_ms=NOW_MS + 10**9) == (64 if traits.whole_rows else 1)
    assert next(item.base for item in log.read(1, 0, 10, 10**6)) == 0


def test_offsets_are_not_reused_after_retention(log: TaskLog) -> None:
    log.append([run(1, 4 * 64)])
    log.commit(dict.fromkeys(range(4), 64))
    log.retain(0, NOW_MS + 10**9)
    assert {appended.base for appended in log.append([run(1001, 4 * 64)])} == {64}
    (fetched,) = log.read(0, 0, 10, 1000)
    assert fetched.base == 64


def test_what_is_put_aside_is_paged_found_replaced_and_dropped(log: TaskLog, traits: Traits) -> None:
    def page(kind: str) -> list[int | bytes]:
        found = [task.id for _, task in log.aside(kind, 0, 10)]
        return found if traits.places_stay else sorted(found, key=str)

    dead = [Aside("dead", n, b"m%d" % n, "why", n) for n in range(1, 6)]
    log.put_aside([*dead, Aside("suspect", 3, b"s", "lost", 9), Aside("dead", b"k" * 16, b"k", "why", 0)])
    first = log.aside("dead", 0, 3)
    assert [task for _, task in first] == dead[:3]
    rest = log.aside("dead", first[-1][0], 10)
    assert [task.id for _, task in rest] == [4, 5, b"k" * 16]
    assert {(a.kind, a.id) for a in log.find_aside(Ids(((3, 2),), (b"k" * 16,)))} == {
        ("dead", 3),
        ("suspect", 3),
        ("dead", 4),
        ("dead", b"k" * 16),
    }
    log.put_aside([Aside("dead", 3, b"new", "again", 7)])
    assert [a.reason for a in log.find_aside(Ids(((3, 1),))) if a.kind == "dead"] == ["again"]
    assert page("dead") == [1, 2, 3, 4, 5, b"k" * 16]
    log.drop_aside([*dead[:3], Aside("dead", b"k" * 16, b"k", "why", 0)])
    assert page("dead") == [3, 4, 5], "3 was put aside anew meanwhile"
    log.drop_aside(log.find_aside(Ids(((3, 1),)))[:1])
    assert page("dead") == [4, 5]
    assert page("suspect") == [3]


def test_large_bodies_are_cut_into_rows_that_can_be_read(log: TaskLog, traits: Traits) -> None:
    body = b'{"x": "' + b"y" * 200_000 + b'"}'
    appended = log.append([run(1, 20, body)])
    assert sum(piece.count for piece in appended) == 20
    if traits.whole_rows:
        assert max(piece.count for piece in appended) == 5
    assert sum(len(f.batch) for batches in everything(log).values() for f in batches) == 20
