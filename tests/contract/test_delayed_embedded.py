"""Delayed tasks in the embedded log's file: former formats, other processes, crashes, damage and full disks."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dedup.ids import Ids
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.delay_rows import SPAN_SHIFT, SPANS_NEAR
from oncekeeper.log.delayed import RUN, Deferral, Delayed, Place
from oncekeeper.log.embedded import EmbeddedLog, open_log
from oncekeeper.log.embedded_file import log_path
from oncekeeper.log.port import Fetched, Undecodable, Unsent

ROOT = Path(__file__).parents[2]
NOW_MS = 1_800_000_000_000
FAR_MS = NOW_MS + 10**12

FORMAT_2 = """
CREATE TABLE delayed (
    place INTEGER PRIMARY KEY,     -- partition << 44 | offset of the first task
    count INTEGER NOT NULL,
    partition INTEGER NOT NULL,
    due_ms INTEGER NOT NULL,       -- epoch
    way INTEGER NOT NULL           -- what happens then: 0 run, 1 enqueue
)"""


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EmbeddedLog]:
    log = open_log(tmp_path, create=True, partitions=4)
    yield log
    log.close()


def sql(path: Path, *statements: str) -> None:
    database = sqlite3.connect(log_path(path))
    with database:
        for statement in statements:
            database.execute(statement)
    database.close()


def tasks(start: int, count: int, body: bytes = b"{}") -> TaskBatch:
    return TaskBatch(
        queue="q", handler="h", ids=Ids(((start, count),)), bodies=(body,) * count, due_ms=NOW_MS
    )


def deferred(log: EmbeddedLog, start: int, count: int) -> Delayed:
    (place,) = log.append([tasks(start, count)])
    log.delays.defer([Deferral(place.partition, place.base, NOW_MS, RUN, tasks(start, count))])
    return Delayed(NOW_MS, place.partition, place.base, count)


def everything(log: EmbeddedLog) -> list[Delayed]:
    return log.delays.due(range(4), FAR_MS, None, 10**6)


def test_a_log_of_the_format_before_is_brought_up_to_this_one_and_keeps_its_tasks(
    tmp_path: Path, log: EmbeddedLog
) -> None:
    (place,) = log.append([tasks(1, 3)])
    log.close()
    sql(
        tmp_path,
        "DROP TABLE delayed",
        "DROP TABLE delayed_counts",
        "UPDATE meta SET value = 1 WHERE name = 'format'",
    )
    again = open_log(tmp_path)
    assert len(again.read(place.partition, 0, 10, 10**6)) == 1
    row = deferred(again, 10, 2)
    again.close()
    third = open_log(tmp_path)
    assert everything(third) == [row]
    third.close()


def test_a_log_without_spans_is_brought_up_to_them_and_keeps_what_is_delayed(
    tmp_path: Path, log: EmbeddedLog
) -> None:
    row = deferred(log, 10, 2)
    log.close()
    sql(
        tmp_path,
        "DROP INDEX delayed_by_span",
        "DROP INDEX delayed_by_due",
        "ALTER TABLE delayed RENAME TO newer",
        FORMAT_2,
        "INSERT INTO delayed SELECT place, count, partition, due_ms, way FROM newer",
        "DROP TABLE newer",
        "CREATE INDEX delayed_by_due ON delayed (partition, due_ms)",
        "UPDATE meta SET value = 2 WHERE name = 'format'",
    )
    again = open_log(tmp_path)
    assert everything(again) == [row]
    more = deferred(again, 20, 2)
    assert everything(again) == sorted([row, more])
    again.close()


def far_and_near(log: EmbeddedLog) -> set[object]:
    return {span for (span,) in log._rows("SELECT span FROM delayed")}


def test_retention_brings_into_order_what_is_due_in_the_next_days(tmp_path: Path) -> None:
    log = open_log(tmp_path / "far", create=True, partitions=4, clock_ms=lambda: 0)
    rows = sorted(deferred(log, start, 2) for start in range(10, 90, 10))
    assert far_and_near(log) == {NOW_MS >> SPAN_SHIFT}
    log.retain(10**15, NOW_MS - (SPANS_NEAR + 1 << SPAN_SHIFT))
    assert far_and_near(log) == {NOW_MS >> SPAN_SHIFT}
    log.retain(10**15, NOW_MS - (SPANS_NEAR << SPAN_SHIFT))
    assert far_and_near(log) == {None}
    assert everything(log) == rows
    log.close()


def test_what_is_brought_into_order_while_somebody_reads_is_seen_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path / "far", create=True, partitions=4, clock_ms=lambda: 0)
    rows = sorted(deferred(log, start, 2) for start in range(10, 90, 10))
    other = open_log(tmp_path / "far")
    ask = log._rows
    drawn = []

    def then_draw(statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        answer = ask(statement, values)
        drawn.append(other.delays.draw_near(range(4), NOW_MS))
        return answer

    monkeypatch.setattr(log, "_rows", then_draw)
    assert everything(log) == rows
    assert sum(drawn) == len(rows)
    other.close()
    log.close()


def test_what_one_process_deferred_another_finds_moves_and_drops(tmp_path: Path, log: EmbeddedLog) -> None:
    row = deferred(log, 10, 5)
    other = open_log(tmp_path)
    assert everything(other) == [row]
    other.delays.move([Place(row.partition, row.offset)], NOW_MS - 1)
    assert [part.count for part, _ in log.delays.fetch([row])] == [4]
    assert [r.count for r in everything(log)] == [1, 4]
    other.delays.drop([Place(row.partition, row.offset, 5)])
    assert everything(log) == []
    other.close()


def test_a_damaged_message_is_given_as_what_it_is_and_not_enqueued(tmp_path: Path, log: EmbeddedLog) -> None:
    row = deferred(log, 10, 5)
    sql(tmp_path, "UPDATE batches SET message = substr(message, 2)")
    ((found, item),) = log.delays.fetch([row])
    assert found == row
    assert isinstance(item, Undecodable)
    assert (item.base, item.count) == (row.offset, 5)
    assert "the file is damaged" in item.reason
    assert log.delays.enqueue([row]) == []
    assert everything(log) == [row]


def test_a_message_that_is_gone_is_told_and_stops_nothing(tmp_path: Path, log: EmbeddedLog) -> None:
    row = deferred(log, 10, 5)
    sql(tmp_path, "DELETE FROM batches")
    ((_, item),) = log.delays.fetch([row])
    assert isinstance(item, Undecodable)
    assert "no message here" in item.reason


def test_a_full_disk_is_unsent_and_leaves_all_as_it_was(log: EmbeddedLog) -> None:
    row = deferred(log, 10, 5)
    (pages,) = log._database.execute("PRAGMA page_count").fetchone()
    log._database.execute(f"PRAGMA max_page_count = {pages}")
    # Places alone: nothing looks for their messages before they are due.
    far = [Deferral(0, 1000 + 2 * n, NOW_MS + n, RUN, tasks(1, 1)) for n in range(5000)]
    with pytest.raises(Unsent, match="full"):
        log.delays.defer(far)
    assert everything(log) == [row]
    assert log.delays.counts() == {row.partition: 5}
    log._database.execute("PRAGMA max_page_count = 1000000")
    log.delays.defer(far)
    assert len(everything(log)) == 5001


def test_a_large_part_of_delayed_rows_does_not_hinder_retention_behind_it(
    log: EmbeddedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oncekeeper.log.embedded_retention.SPARED_MAX", 300)
    for start in range(0, 4 * 450, 4):
        deferred(log, 1 + start, 1)
    log.append([tasks(100_000, 4 * 64)])
    log.commit(log.ends())
    # A sweep stops among what it must spare, and the next one goes on there.
    assert log.retain(0, NOW_MS * 2) in (0, 4 * 64)
    total = log.retain(0, NOW_MS * 2) + log.retain(0, NOW_MS * 2)
    assert len(everything(log)) == 450
    assert log.find(100_000) == []
    assert total <= 4 * 64
    dropped = log.delays.drop([Place(partition, 0, 10**6) for partition in range(4)])
    assert dropped == 450
    assert sum(log.retain(0, NOW_MS * 2) for _ in range(5)) == 450


WRITER = """
import sys
from dedup.ids import Ids
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.delay_rows import SPAN_SHIFT, SPANS_NEAR
from oncekeeper.log.delayed import RUN, Deferral, Place
from oncekeeper.log.embedded import open_log
log = open_log(sys.argv[1])
batch = TaskBatch(queue="q", handler="h", ids=Ids(((1, 2),)), bodies=(b"{}", b"{}"))
n = int(sys.argv[2])
while True:
    # All tasks of a round are due at one time, and those of the round before are gone with them.
    log.delays.defer([Deferral(p, 2 * (n * 500 + i), 1 + n, RUN, batch) for p in range(4) for i in range(500)])
    print(n, flush=True)
    log.delays.drop([Place(p, 2 * n * 500, 1000) for p in range(3)])
    n += 1
"""


def test_a_writer_that_is_killed_leaves_whole_transactions_and_counts_that_agree(
    tmp_path: Path, log: EmbeddedLog
) -> None:
    first = 0
    for rounds in range(1, 4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(first)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        confirmed = [int(writer.stdout.readline()) for _ in range(rounds)]
        writer.send_signal(signal.SIGKILL)
        confirmed += map(int, writer.stdout.read().split())
        writer.wait()
        rows = everything(log)
        by_round: dict[int, dict[int, int]] = {}
        for row in rows:
            tally = by_round.setdefault(row.due_ms - 1, {})
            tally[row.partition] = tally.get(row.partition, 0) + row.count
        assert set(confirmed) <= set(by_round)
        assert all(
            set(tally.values()) == {1000} and set(tally) in ({3}, {0, 1, 2, 3}) for tally in by_round.values()
        )
        counted: dict[int, int] = {}
        for row in rows:
            counted[row.partition] = counted.get(row.partition, 0) + row.count
        assert log.delays.counts() == dict(sorted(counted.items()))
        first = max(by_round) + 1
    assert isinstance(log.read(0, 0, 1, 1), list)
    assert not any(isinstance(item, Fetched) for item in log.read(0, 0, 1, 1))
