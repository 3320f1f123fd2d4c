"""The index of delayed tasks as a real file: what it finds, and what crashes, damage and full disks leave of it."""

from __future__ import annotations

import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedup.ids import Ids, TaskId, keyed_id
from oncekeeper.envelope import TaskBatch, encode_task
from oncekeeper.log.delayed import ENQUEUE, RUN, WAYS, Delayed
from oncekeeper.log.kafka_delay_index import (
    END,
    FORMAT,
    MOVE,
    PUT,
    Change,
    DelayIndex,
    IndexDamaged,
    IndexReads,
    IndexUnusable,
)
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
def index(file: Path) -> Iterator[Index]:
    index = Index(file)
    yield index
    index.close()


class Index:
    """A writer and a reader of one file."""

    def __init__(self, file: Path, cluster: str = "cluster-1", generation: str = "topic-1") -> None:
        self.file = file
        self.writer = DelayIndex(file, cluster, generation, cache_bytes=CACHE_BYTES)
        try:
            self.writer.open()
        except IndexDamaged as error:
            self.writer.reset(str(error))
        self.reader = IndexReads(file)
        self.reader.open()

    def apply(self, changes: list[Change], position: int = 0, source: int = 0) -> None:
        self.writer.apply({source: (changes, position)})

    def everything(self) -> list[Delayed]:
        return self.reader.due([0, 1, 3, OTHER], FAR_MS, None, 10**6)

    def fetch_everything(self) -> list[tuple[Delayed, Fetched | Undecodable]]:
        return self.reader.fetch(self.everything())

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


def task(task_id: TaskId, due_ms: int) -> TaskBatch:
    ids = Ids(((task_id, 1),)) if isinstance(task_id, int) else Ids(keys=(task_id,))
    return TaskBatch(queue="q", handler="h", ids=ids, bodies=(b'{"a":1}',), due_ms=due_ms)


def put(
    partition: int,
    offset: int,
    task_id: TaskId,
    due_ms: int,
    then: str = RUN,
    head: int = -1,
    kind: str = PUT,
) -> Change:
    message = encode_task(task(task_id, due_ms))
    head = offset if head < 0 else head
    return Change(kind, partition, offset, task_id, due_ms, WAYS.index(then), head, message)


def fill(index: Index, count: int, partition: int = 0, first_id: int = 1) -> None:
    changes = [put(partition, n, first_id + n, NOW_MS + n * 7919 % 1000) for n in range(count)]
    index.apply(changes, count)


# --- following a source ---------------------------------------------------------------------------------------


def test_what_was_applied_is_found_by_due_time_by_id_and_by_partition(index: Index) -> None:
    key = keyed_id("q", "k")
    index.apply([put(3, 5, 10, NOW_MS + 9), put(3, 8, key, NOW_MS + 4, ENQUEUE)], 9, source=3)
    index.apply([put(OTHER, 5, 11, NOW_MS + 9)], 6, source=7)
    late, soon = Delayed(NOW_MS + 9, 3, 5), Delayed(NOW_MS + 4, 3, 8, 1, ENQUEUE)
    other = Delayed(NOW_MS + 9, OTHER, 5)
    reader = index.reader
    assert index.everything() == [soon, late, other]
    assert reader.due([3], NOW_MS + 8, None, 10) == [soon]
    assert (reader.find(10), reader.find(key), reader.find(11), reader.find(12)) == (
        [late],
        [soon],
        [other],
        [],
    )
    assert reader.counts() == {3: 2, OTHER: 1}
    assert index.writer.positions() == {3: 9, 7: 6}
    assert reader.fetch([soon, other]) == [
        (soon, Fetched(3, 8, task(key, NOW_MS + 4))),
        (other, Fetched(OTHER, 5, task(11, NOW_MS + 9))),
    ]


def test_what_was_put_together_is_one_row_and_what_was_not_is_none(index: Index) -> None:
    index.apply([put(0, n, 1 + n, NOW_MS, head=0) for n in range(4)], 4)
    index.apply([put(0, n, 1 + n, NOW_MS, head=4) for n in range(4, 6)], 6)
    assert [(row.offset, row.count) for row in index.everything()] == [(0, 4), (4, 2)]
    ((row, item), _) = index.fetch_everything()
    assert isinstance(item, Fetched)
    assert (row.count, item.batch.ids) == (4, Ids(((1, 4),)))


def test_a_page_follows_the_page_before_it_over_all_partitions(index: Index) -> None:
    for partition in (0, 1, OTHER):
        fill(index, 40, partition, 1 + 1000 * (partition & 7))
    paged: list[Delayed] = []
    while page := index.reader.due([0, 1, OTHER], FAR_MS, paged[-1] if paged else None, 9):
        paged += page
    assert paged == index.everything()
    assert len(paged) == 120
    assert [row.due_ms for row in paged] == sorted(row.due_ms for row in paged)


def test_a_place_that_waits_stays_as_it_is_by_a_put_and_changes_by_a_move(index: Index) -> None:
    index.apply([put(0, 0, 1, NOW_MS + 5), put(0, 0, 1, NOW_MS + 7)])
    index.apply([put(0, 0, 1, NOW_MS + 6)])
    assert index.everything() == [Delayed(NOW_MS + 5, 0, 0)]
    index.apply([put(0, 0, 1, NOW_MS + 80, kind=MOVE), put(0, 0, 1, NOW_MS + 90, kind=MOVE)])
    index.apply([put(0, 0, 1, NOW_MS + 6)])
    assert index.everything() == [Delayed(NOW_MS + 90, 0, 0)]
    assert index.reader.fetch([Delayed(NOW_MS + 5, 0, 0)]) == []
    assert index.fetch_everything() == [(Delayed(NOW_MS + 90, 0, 0), Fetched(0, 0, task(1, NOW_MS + 90)))]


def test_a_tombstone_ends_its_place_and_no_other_of_the_same_task(index: Index) -> None:
    index.apply([put(0, 0, 1, NOW_MS), put(0, 7, 1, NOW_MS + 1), Change(END, 0, 0, 1), Change(END, 0, 3, 9)])
    assert index.everything() == [Delayed(NOW_MS + 1, 0, 7)]
    assert index.reader.find(1) == [Delayed(NOW_MS + 1, 0, 7)]
    index.apply([Change(END, 0, 7, 1)])
    assert (index.reader.counts(), index.reader.find(1)) == ({}, [])


def test_what_compaction_left_of_a_history_says_the_same_as_all_of_it(index: Index, tmp_path: Path) -> None:
    draw = random.Random(3)
    whole: list[Change] = []
    for _ in range(400):
        offset = draw.randrange(20)
        kind = draw.choice((PUT, MOVE, END))
        standing = {change.offset: change for change in whole}.get(offset)
        if kind == PUT and standing is not None and standing.kind != END:
            continue  # only a process that was left behind does that
        if kind == MOVE and (standing is None or standing.kind == END):
            continue
        due_ms = NOW_MS + draw.randrange(9)
        whole.append(
            Change(END, 0, offset, offset + 1)
            if kind == END
            else put(0, offset, offset + 1, due_ms, kind=kind)
        )
    index.apply(whole)
    last = {change.offset: n for n, change in enumerate(whole)}
    compacted = Index(tmp_path / "compacted.db")
    compacted.apply([change for n, change in enumerate(whole) if last[change.offset] == n])
    assert compacted.everything() == index.everything() != []
    assert compacted.fetch_everything() == index.fetch_everything()
    assert compacted.reader.counts() == index.reader.counts()
    compacted.close()


def test_records_that_are_read_again_in_their_order_change_nothing(index: Index) -> None:
    changes = [put(0, 0, 1, NOW_MS + 5), Change(END, 0, 0, 1), put(0, 2, 2, NOW_MS + 6)]
    index.apply(changes, 3)
    index.apply(changes, 3)
    assert (index.everything(), index.reader.counts()) == ([Delayed(NOW_MS + 6, 0, 2)], {0: 1})


def test_a_position_moves_over_offsets_that_hold_nothing(index: Index) -> None:
    index.apply([], 77)
    assert (index.writer.positions(), index.reader.counts(), index.everything()) == ({0: 77}, {}, [])


def test_it_tells_when_it_was_last_at_the_ends(index: Index) -> None:
    begun = index.writer.seen_ms()
    index.apply([], 5)
    assert index.writer.seen_ms() == begun > 0
    index.writer.apply({0: ([], 5)}, NOW_MS)
    assert index.writer.seen_ms() == NOW_MS


def test_a_message_that_is_none_is_told_as_such(index: Index) -> None:
    index.apply([Change(PUT, 0, 0, 1, NOW_MS, 0, 0, b"not JSON")])
    ((_, item),) = index.fetch_everything()
    assert isinstance(item, Undecodable)
    assert (item.raw, item.base, item.count) == (b"not JSON", 0, 1)


# --- opening, damage ------------------------------------------------------------------------------------------


def test_it_is_there_again_after_it_was_closed_and_others_cannot_read_it(file: Path, index: Index) -> None:
    fill(index, 50)
    rows = index.everything()
    index.close()
    again = Index(file)
    assert (again.everything(), again.writer.positions(), again.reader.counts()) == (rows, {0: 50}, {0: 50})
    assert file.stat().st_mode & 0o777 == 0o600
    again.close()


@pytest.mark.parametrize(("cluster", "generation"), [("cluster-2", "topic-1"), ("cluster-1", "topic-2")])
def test_the_index_of_another_cluster_or_source_is_begun_anew_and_it_says_so(
    file: Path, index: Index, cluster: str, generation: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(index, 50)
    index.close()
    with caplog.at_level(logging.WARNING):
        again = Index(file, cluster, generation)
    assert (again.writer.positions(), again.everything()) == ({}, [])
    assert "deleted, and rebuilt" in caplog.text
    assert (
        f"belongs to cluster_id=cluster-1, format={FORMAT}, generation=topic-1, not to cluster_id={cluster}"
        in caplog.text
    )
    again.close()


def test_a_file_that_is_no_index_is_begun_anew_and_it_says_so(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_bytes(b"not a database, by any means" * 1000)
    with caplog.at_level(logging.WARNING):
        index = Index(file)
    assert "file is not a database" in caplog.text
    fill(index, 5)
    assert index.reader.counts() == {0: 5}
    index.close()


def test_damaged_pages_are_noticed_and_the_index_is_begun_anew(file: Path, index: Index) -> None:
    fill(index, 3000)
    index.close()
    size = file.stat().st_size
    with file.open("r+b") as raw:
        raw.seek(8192)
        raw.write(os.urandom(size - 8192))

    def use() -> None:
        reader = IndexReads(file)
        reader.open()
        try:
            reader.fetch(reader.due([0], FAR_MS, None, 10**6))
        finally:
            reader.close()

    with pytest.raises(IndexDamaged):
        use()
    writer = DelayIndex(file, "cluster-1", "topic-1")
    writer.reset("damaged")
    assert writer.positions() == {}
    writer.close()
    again = Index(file)
    fill(again, 5)
    assert len(again.everything()) == 5
    again.close()


@pytest.mark.parametrize(
    "change",
    [
        "messages SET message = message || ' '",
        "messages SET id = 77",
        "messages SET id = 'x'",
        "messages SET crc = 1",
        "delayed SET way = 1",
        "delayed SET due_ms = due_ms - 1",
    ],
)
def test_a_row_that_a_disk_has_changed_is_noticed_before_it_starts_a_task(
    file: Path, index: Index, change: str
) -> None:
    fill(index, 5)
    with sqlite3.connect(file) as database:
        database.execute(f"UPDATE {change} WHERE place = 2")
    database.close()
    with pytest.raises(IndexDamaged, match=r"its checksum|its message says"):
        index.fetch_everything()


def test_a_message_that_is_missing_is_noticed(file: Path, index: Index) -> None:
    fill(index, 5)
    with sqlite3.connect(file) as database:
        database.execute("DELETE FROM messages WHERE place = 2")
    database.close()
    with pytest.raises(IndexDamaged, match="0 messages stand where 1 tasks wait"):
        index.fetch_everything()


def test_a_table_that_is_missing_is_damage(file: Path, index: Index) -> None:
    with sqlite3.connect(file) as database:
        database.execute("DROP TABLE messages")
    database.close()
    with pytest.raises(IndexDamaged, match="no such table: messages"):
        index.reader.find(1)


def test_an_index_whose_file_cannot_be_made_says_where(tmp_path: Path) -> None:
    with pytest.raises(IndexUnusable, match=r"nowhere/delays\.db: No such file"):
        Index(tmp_path / "nowhere" / "delays.db")


def test_a_reader_makes_no_file(file: Path) -> None:
    with pytest.raises(IndexUnusable, match="unable to open"):
        IndexReads(file).open()
    assert not file.exists()


def test_a_closed_index_says_so(index: Index) -> None:
    index.close()
    with pytest.raises(IndexUnusable, match="is closed"):
        index.writer.positions()


# --- crashes and full disks -----------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from oncekeeper.log.kafka_delay_index import PUT, Change, DelayIndex
index = DelayIndex(Path(sys.argv[1]), "cluster-1", "topic-1", cache_bytes=1 << 18)
index.open()
offset = index.positions().get(0, 0)
while True:
    end = offset + 3000
    changes = [Change(PUT, 0, n, n + 1, 1 + n * 7919 % 1000003, 0, n, b"x" * 200) for n in range(offset, end)]
    index.apply({0: (changes, end)})
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
        index = Index(file)
        position = index.writer.positions()[0]
        assert confirmed <= position <= confirmed + 3000
        assert sorted(row.offset for row in index.everything()) == list(range(position))
        assert index.reader.counts() == {0: position}
        index.close()


LIMITED = """
import resource, sys
from pathlib import Path
from oncekeeper.log.kafka_delay_index import PUT, Change, DelayIndex, IndexReads, IndexUnusable
file = Path(sys.argv[1])
index = DelayIndex(file, "cluster-1", "topic-1", cache_bytes=1 << 16)
index.open()
reader = IndexReads(file)
reader.open()
def apply(start, count):
    changes = [Change(PUT, 0, n, n + 1, n, 0, n, b"x" * 500) for n in range(start, start + count)]
    index.apply({0: (changes, start + count)})
def show():
    print(index.positions()[0], reader.counts(), len(reader.due([0], 10**9, None, 10**6)))
apply(0, 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
try:
    apply(100, 5000)
except IndexUnusable as error:
    print(type(error).__name__, error)
show()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
apply(100, 5000)
show()
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


def test_a_full_disk_is_told_and_nothing_of_the_batch_is_stored(index: Index) -> None:
    fill(index, 100)
    index.writer._rows("PRAGMA max_page_count = 40")
    more = [put(0, n, n + 1, NOW_MS) for n in range(100, 5000)]
    with pytest.raises(IndexUnusable, match=r"delays\.db: database or disk is full: .* when there is room"):
        index.apply(more, 5000)
    assert (index.writer.positions(), index.reader.counts(), len(index.everything())) == (
        {0: 100},
        {0: 100},
        100,
    )
    index.writer._rows("PRAGMA max_page_count = 1000000")
    index.apply(more, 5000)
    assert index.reader.counts() == {0: 5000}
