"""The index of delayed tasks as a real file: what it finds, and what crashes, damage and full disks leave of it."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedup.ids import Ids, TaskId, keyed_id
from node.delays import DelayIndex, DelayRecord, IndexDamaged, IndexUnusable, open_index
from oncekeeper.envelope import TaskBatch, encode_task
from oncekeeper.log.delayed import ENQUEUE, RUN, Delayed
from oncekeeper.log.port import Fetched, Undecodable

ROOT = Path(__file__).parents[2]
NOW_MS = 1_800_000_000_000
FAR_MS = NOW_MS + 10**12
OTHER = (1 << 40 | 12345) << 12 | 7  # a partition of a queue that is not the default one
CACHE_BYTES = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "delays.db"


@pytest.fixture
def index(file: Path) -> Iterator[DelayIndex]:
    index = reopened(file)
    yield index
    index.close()


def reopened(file: Path, generation: str = "topic-1") -> DelayIndex:
    return open_index(file, "cluster-1", generation, cache_bytes=CACHE_BYTES)


def task(task_id: TaskId, due_ms: int) -> TaskBatch:
    ids = Ids(((task_id, 1),)) if isinstance(task_id, int) else Ids(keys=(task_id,))
    return TaskBatch(queue="q", handler="h", ids=ids, bodies=(b'{"a":1}',), due_ms=due_ms)


def record(offset: int, task_id: TaskId, due_ms: int, then: str = RUN) -> DelayRecord:
    return DelayRecord(offset, task_id, due_ms, then, encode_task(task(task_id, due_ms)))


def everything(index: DelayIndex) -> list[Delayed]:
    return index.due(index.partitions(), FAR_MS, None, 10**6)


def fill(index: DelayIndex, partition: int, count: int, first_id: int = 1) -> None:
    records = [record(n, first_id + n, NOW_MS + n * 7919 % 1000) for n in range(count)]
    index.apply(partition, records, count, NOW_MS)


# --- following a source ---------------------------------------------------------------------------------------


def test_what_was_applied_is_found_by_due_time_by_id_and_by_partition(index: DelayIndex) -> None:
    key = keyed_id("q", "k")
    index.apply(3, [record(5, 10, NOW_MS + 9), record(8, key, NOW_MS + 4, ENQUEUE)], 9, NOW_MS)
    index.apply(OTHER, [record(5, 11, NOW_MS + 9)], 6, NOW_MS)
    late, soon, other = (
        Delayed(NOW_MS + 9, 3, 5),
        Delayed(NOW_MS + 4, 3, 8, 1, ENQUEUE),
        Delayed(NOW_MS + 9, OTHER, 5),
    )
    assert everything(index) == [soon, late, other]
    assert index.due([3], NOW_MS + 8, None, 10) == [soon]
    assert (index.find(10), index.find(key), index.find(11), index.find(12)) == ([late], [soon], [other], [])
    assert index.counts() == {3: 2, OTHER: 1}
    assert (index.position(3), index.position(OTHER), index.position(4)) == (9, 6, 0)
    assert index.fetch([soon, other]) == [
        (soon, Fetched(3, 8, task(key, NOW_MS + 4))),
        (other, Fetched(OTHER, 5, task(11, NOW_MS + 9))),
    ]


def test_a_page_follows_the_page_before_it_over_all_partitions(index: DelayIndex) -> None:
    for partition in (0, 1, OTHER):
        fill(index, partition, 40, 1 + 1000 * (partition & 7))
    paged: list[Delayed] = []
    while page := index.due([0, 1, OTHER], FAR_MS, paged[-1] if paged else None, 9):
        paged += page
    assert paged == everything(index)
    assert len(paged) == 120
    assert [row.due_ms for row in paged] == sorted(row.due_ms for row in paged)


def test_the_last_record_of_an_id_counts_and_a_tombstone_ends_it(index: DelayIndex) -> None:
    index.apply(0, [record(0, 1, NOW_MS + 5), record(1, 2, NOW_MS + 5), record(2, 1, NOW_MS + 90)], 3, NOW_MS)
    assert everything(index) == [Delayed(NOW_MS + 5, 0, 1), Delayed(NOW_MS + 90, 0, 2)]
    index.apply(0, [record(3, 2, NOW_MS + 70), DelayRecord(4, 1)], 5, NOW_MS)
    assert everything(index) == [Delayed(NOW_MS + 70, 0, 3)]
    assert index.fetch([Delayed(NOW_MS + 90, 0, 2)]) == []
    index.apply(0, [record(5, 3, NOW_MS), DelayRecord(6, 3)], 7, NOW_MS)
    assert index.counts() == {0: 1}


def test_records_that_are_read_again_change_nothing(index: DelayIndex) -> None:
    records = [record(0, 1, NOW_MS + 5), DelayRecord(1, 1), record(2, 2, NOW_MS + 6)]
    index.apply(0, records, 3, NOW_MS)
    index.apply(0, records[:1], 1, NOW_MS)
    assert everything(index) == [Delayed(NOW_MS + 6, 0, 2)]
    assert index.position(0) == 3


def test_a_position_moves_over_offsets_that_hold_nothing(index: DelayIndex) -> None:
    index.apply(0, [], 77, NOW_MS)
    assert (index.position(0), index.counts(), everything(index)) == (77, {}, [])


def test_what_ended_is_gone_before_its_tombstone_is_read(index: DelayIndex) -> None:
    fill(index, 0, 5)
    index.ended(0, [2, 3, 99])
    index.ended(4, [1])
    assert index.counts() == {0: 3}
    assert index.find(2) == []


def test_a_partition_that_moved_away_is_forgotten_at_once_and_comes_back_from_its_source(
    index: DelayIndex, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.delays.FORGET_ROWS", 7)
    fill(index, 0, 20)
    fill(index, 1, 20, 100)
    index.forget(0)
    index.forget(5)
    assert (index.position(0), index.counts(), index.find(3)) == (0, {1: 20}, [])
    assert index.sweep()
    index.close()
    again = reopened(file)  # it went on while what was forgotten was being deleted
    again.apply(0, [record(0, 3, NOW_MS)], 21, NOW_MS)
    assert (again.counts(), again.find(3)) == ({0: 1, 1: 20}, [Delayed(NOW_MS, 0, 0)])
    while again.sweep():
        pass
    assert again._rows("SELECT count(*) FROM tasks") == [(21,)]
    assert again.counts() == {0: 1, 1: 20}
    again.close()


def test_it_tells_how_old_its_knowledge_of_a_partition_is(index: DelayIndex) -> None:
    index.apply(0, [], 5, NOW_MS)
    index.apply(0, [], 5, NOW_MS + 60)
    assert (index.seen_ms(0), index.seen_ms(1)) == (NOW_MS + 60, 0)


def test_a_message_that_is_none_is_told_as_such(index: DelayIndex) -> None:
    index.apply(0, [DelayRecord(0, 1, NOW_MS, RUN, b"not JSON")], 1, NOW_MS)
    ((_, item),) = index.fetch([Delayed(NOW_MS, 0, 0)])
    assert isinstance(item, Undecodable)
    assert (item.raw, item.base, item.count) == (b"not JSON", 0, 1)


# --- opening, damage ------------------------------------------------------------------------------------------


def test_it_is_there_again_after_it_was_closed_and_others_cannot_read_it(
    file: Path, index: DelayIndex
) -> None:
    fill(index, 0, 50)
    rows = everything(index)
    index.close()
    again = reopened(file)
    assert (everything(again), again.position(0), again.counts()) == (rows, 50, {0: 50})
    assert file.stat().st_mode & 0o777 == 0o600
    again.close()


@pytest.mark.parametrize(("cluster", "generation"), [("cluster-2", "topic-1"), ("cluster-1", "topic-2")])
def test_the_index_of_another_cluster_or_source_is_begun_anew_and_it_says_so(
    file: Path, index: DelayIndex, cluster: str, generation: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(index, 0, 50)
    index.close()
    with caplog.at_level(logging.WARNING):
        again = open_index(file, cluster, generation)
    assert (again.position(0), everything(again)) == (0, [])
    assert "deleted, and rebuilt" in caplog.text
    assert (
        f"belongs to cluster_id=cluster-1, format=1, generation=topic-1, not to cluster_id={cluster}"
        in caplog.text
    )
    again.close()


def test_a_file_that_is_no_index_is_begun_anew_and_it_says_so(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_bytes(b"not a database, by any means" * 1000)
    with caplog.at_level(logging.WARNING):
        index = reopened(file)
    assert "file is not a database" in caplog.text
    fill(index, 0, 5)
    assert index.counts() == {0: 5}
    index.close()


def test_damaged_pages_are_noticed_and_the_index_is_begun_anew(file: Path, index: DelayIndex) -> None:
    fill(index, 0, 3000)
    index.close()
    size = file.stat().st_size
    with file.open("r+b") as raw:
        raw.seek(8192)
        raw.write(os.urandom(size - 8192))
    again = DelayIndex(file, "cluster-1", "topic-1", CACHE_BYTES)

    def use() -> None:
        again.open()
        again.fetch(everything(again))

    with pytest.raises(IndexDamaged):
        use()
    again.reset("damaged")
    assert again.position(0) == 0
    fill(again, 0, 5)
    assert len(everything(again)) == 5
    again.close()


@pytest.mark.parametrize(
    "change", ["due_ms = due_ms - 1", "message = message || ' '", "way = 1", "id = 77", "id = 'x'", "crc = 1"]
)
def test_a_row_that_a_disk_has_changed_is_noticed_before_it_starts_a_task(
    file: Path, index: DelayIndex, change: str
) -> None:
    fill(index, 0, 5)
    index.close()
    with sqlite3.connect(file) as database:
        database.execute(f"UPDATE tasks SET {change} WHERE place = 2")
    database.close()
    again = reopened(file)
    with pytest.raises(IndexDamaged, match=r"task .*: its checksum"):
        again.fetch(everything(again))
    again.close()


def test_a_table_that_is_missing_is_damage(file: Path, index: DelayIndex) -> None:
    index.close()
    with sqlite3.connect(file) as database:
        database.execute("DROP TABLE tasks")
    database.close()
    again = reopened(file)
    with pytest.raises(IndexDamaged, match="no such table: tasks"):
        again.due([0], FAR_MS, None, 1) or again.find(1)
    again.reset("a table is missing")
    fill(again, 0, 2)
    again.close()


def test_an_index_whose_file_cannot_be_made_says_where(tmp_path: Path) -> None:
    with pytest.raises(IndexUnusable, match=r"nowhere/delays\.db: No such file"):
        reopened(tmp_path / "nowhere" / "delays.db")


def test_a_closed_index_says_so(index: DelayIndex) -> None:
    index.close()
    with pytest.raises(IndexUnusable, match="is closed"):
        index.position(0)


# --- crashes and full disks -----------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from node.delays import DelayRecord, open_index
index = open_index(Path(sys.argv[1]), "cluster-1", "topic-1", cache_bytes=1 << 18)
offset = index.position(0)
while True:
    end = offset + 3000
    records = [DelayRecord(n, n + 1, 1 + n * 7919 % 1000003, "run", b"x" * 200) for n in range(offset, end)]
    index.apply(0, records, end, 1)
    offset = end
    print(offset, flush=True)
"""


def test_a_writer_that_is_killed_leaves_the_position_and_exactly_its_rows(file: Path) -> None:
    confirmed = 0
    for round_number in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(1 + round_number):
            confirmed = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)  # wherever it is in the next batch
        rest = writer.stdout.read().split()
        confirmed = int(rest[-1]) if rest else confirmed
        writer.wait()
        index = reopened(file)
        position = index.position(0)
        assert confirmed <= position <= confirmed + 3000
        rows = index.due([0], FAR_MS, None, 10**6)
        assert sorted(row.offset for row in rows) == list(range(position))
        assert index.counts() == {0: position}
        index.close()


LIMITED = """
import resource, sys
from pathlib import Path
from node.delays import DelayRecord, IndexUnusable, open_index
index = open_index(Path(sys.argv[1]), "cluster-1", "topic-1", cache_bytes=1 << 16)
def apply(start, count):
    records = [DelayRecord(n, n + 1, n, "run", b"x" * 500) for n in range(start, start + count)]
    index.apply(0, records, start + count, 1)
apply(0, 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
try:
    apply(100, 5000)
except IndexUnusable as error:
    print(type(error).__name__, error)
print(index.position(0), index.counts(), len(index.due([0], 10**9, None, 10**6)))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
apply(100, 5000)
print(index.position(0), index.counts(), len(index.due([0], 10**9, None, 10**6)))
index.close()
"""


def test_a_disk_that_takes_no_more_leaves_the_index_as_it_was_and_it_goes_on_when_there_is_room(
    file: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said, then, later = done.stdout.splitlines()
    assert said.startswith("IndexUnusable ")
    assert str(file) in said
    assert then == "100 {0: 100} 100", done.stderr
    assert later == "5100 {0: 5100} 5100"


def test_a_full_disk_is_told_and_nothing_of_the_batch_is_stored(index: DelayIndex) -> None:
    fill(index, 0, 100)
    index._rows("PRAGMA max_page_count = 30")
    with pytest.raises(IndexUnusable, match=r"delays\.db: database or disk is full: .* when there is room"):
        index.apply(0, [record(n, n + 1, NOW_MS) for n in range(100, 5000)], 5000, NOW_MS)
    assert (index.position(0), index.counts(), len(everything(index))) == (100, {0: 100}, 100)
    index._rows("PRAGMA max_page_count = 1000000")
    index.apply(0, [record(n, n + 1, NOW_MS) for n in range(100, 5000)], 5000, NOW_MS)
    assert index.counts() == {0: 5000}
