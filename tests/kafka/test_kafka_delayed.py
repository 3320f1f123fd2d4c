"""Delayed tasks on a real broker: other owners, lost and damaged indexes, compaction, a broker that goes away."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.cimpl import NewTopic

from dedup.ids import Ids
from node.kafkaup.broker import Kafka
from oncekeeper.envelope import TaskBatch
from oncekeeper.errors import LogUnusable
from oncekeeper.log.delayed import Deferral, Delayed, Place
from oncekeeper.log.kafka import KafkaLog
from oncekeeper.log.kafka_delay_follow import FollowedReads
from oncekeeper.log.kafka_delayed import KafkaDelays
from oncekeeper.log.port import Fetched, UnknownAppend, Unsent
from tests.support.kafka_broker import ANSWER_S, Private, admin, stored
from tests.support.kafka_delayed import follower, opened
from tests.support.real_cluster import eventually

NOW_MS = 1_800_000_000_000
FAR_MS = NOW_MS + 10**12


@pytest.fixture
def url(kafka: Kafka, prefix: str) -> str:
    return f"kafka://{kafka.bootstrap()}/{prefix}"


@pytest.fixture
def log(url: str, tmp_path: Path) -> Iterator[KafkaLog]:
    with opened(url, tmp_path / "a.db", partitions=4) as log:
        yield log


@pytest.fixture
def other(url: str, tmp_path: Path, log: KafkaLog) -> Iterator[KafkaLog]:
    with opened(url, tmp_path / "b.db") as other:
        yield other


def deferred(log: KafkaLog, start: int, count: int, due_ms: int = NOW_MS) -> Delayed:
    """Tasks of one partition of the default queue that wait. Their place is made up: nobody looks at it."""
    task = deferral(start, count, due_ms)
    store(log).defer([task])
    return Delayed(due_ms, task.partition, task.offset, count)


def deferral(start: int, count: int, due_ms: int = NOW_MS) -> Deferral:
    bodies = tuple(b'{"n":%d}' % n for n in range(start, start + count))
    batch = TaskBatch(queue="default", handler="h", ids=Ids(((start, count),)), bodies=bodies)
    return Deferral(start // 1000 % 4, start, due_ms, "run", batch)


def store(log: KafkaLog) -> KafkaDelays:
    assert log.delays is not None
    return log.delays


def everything(log: KafkaLog) -> list[Delayed]:
    return store(log).due(range(4), FAR_MS, None, 10**6)


def tasks(log: KafkaLog) -> list[int | bytes]:
    found: list[int | bytes] = []
    for _, item in store(log).fetch(everything(log)):
        assert isinstance(item, Fetched)
        found += item.batch.ids
    return sorted(found, key=str)


# --- several nodes --------------------------------------------------------------------------------------------


def test_whoever_takes_a_partition_over_has_its_tasks_and_what_became_of_them(
    log: KafkaLog, other: KafkaLog
) -> None:
    row = deferred(log, 1000, 10)
    store(log).move([Place(row.partition, row.offset + 2, 3)], NOW_MS + 9)
    store(log).drop([Place(row.partition, row.offset + 7)])
    assert everything(other) == everything(log) != []
    assert store(other).counts() == {row.partition: 9}
    assert store(other).drop([Place(row.partition, row.offset, 3)]) == 3
    assert store(other).move([Place(row.partition, row.offset + 9)], NOW_MS + 11) == 1
    assert store(log).find(1009) == [Delayed(NOW_MS + 11, row.partition, row.offset + 9)]
    assert tasks(log) == tasks(other) == [1003, 1004, 1005, 1006, 1008, 1009]


def test_a_reschedule_that_another_node_made_meanwhile_is_not_undone(log: KafkaLog, other: KafkaLog) -> None:
    row = deferred(log, 1000, 2)
    store(other).move([Place(row.partition, row.offset)], NOW_MS + 50)
    assert store(log).move([Place(row.partition, row.offset, 2)], NOW_MS + 70, was_ms=NOW_MS) == 1
    assert [r.due_ms - NOW_MS for r in everything(other)] == [50, 70]
    store(log).defer([deferral(1000, 2)])
    assert [r.due_ms - NOW_MS for r in everything(other)] == [50, 70], "it was read again after a crash"


def test_a_node_is_told_for_which_partitions_others_put_or_moved_tasks(
    url: str, log: KafkaLog, tmp_path: Path
) -> None:
    told: set[int] = set()
    following = follower(url, tmp_path / "c.db")
    following.on_change = told.update
    row = deferred(log, 2000, 5)
    eventually("of what was put", lambda: row.partition in told, ANSWER_S)
    told.clear()
    store(log).move([Place(row.partition, row.offset)], NOW_MS + 5)
    eventually("of what was moved", lambda: row.partition in told, ANSWER_S)
    following.close()


def test_a_node_is_not_told_of_what_it_wrote_itself(url: str, tmp_path: Path) -> None:
    told: set[int] = set()
    with opened(url, tmp_path / "d.db", partitions=4) as log, opened(url, tmp_path / "e.db") as other:
        store(log)._follower.on_change = told.update
        deferred(log, 1000, 5)
        deferred(other, 3000, 5)
        eventually("of the other's", lambda: 3 in told, ANSWER_S)
    assert told == {3}


def test_readers_on_other_threads_see_what_was_written(log: KafkaLog) -> None:
    deferred(log, 1000, 5)
    reads = store(log)._follower.reads()
    found: list[list[Delayed]] = []
    thread = threading.Thread(target=lambda: found.append(reads.due([1], FAR_MS, None, 10)))
    thread.start()
    thread.join()
    assert found == [everything(log)]
    reads.close()


# --- the index ------------------------------------------------------------------------------------------------


def test_an_index_goes_on_where_it_was(url: str, log: KafkaLog, tmp_path: Path) -> None:
    file = tmp_path / "mine.db"
    row = deferred(log, 1000, 5)
    with opened(url, file) as mine:
        assert everything(mine) == [row]
    deferred(log, 2000, 5)
    store(log).drop([Place(row.partition, row.offset, 5)])
    with opened(url, file) as mine:
        assert everything(mine) == everything(log)
        assert tasks(mine) == list(range(2000, 2005))


@pytest.mark.parametrize("deed", ["deleted", "garbage", "an empty file", "too old", "of another cluster"])
def test_an_index_that_cannot_be_relied_on_is_built_anew_from_the_topic(
    url: str, log: KafkaLog, tmp_path: Path, deed: str
) -> None:
    file = tmp_path / "mine.db"
    row = deferred(log, 1000, 50)
    with opened(url, file) as mine:
        assert everything(mine) == [row]
    store(log).drop([Place(row.partition, row.offset, 20)])
    if deed == "deleted":
        file.unlink()
    elif deed == "garbage":
        file.write_bytes(os.urandom(100_000))
    elif deed == "an empty file":
        file.write_bytes(b"")
    else:
        change = {
            "too old": "seen SET ms = 1",
            "of another cluster": "meta SET value = 'x' WHERE name = 'cluster_id'",
        }
        with sqlite3.connect(file) as database:
            database.execute(f"UPDATE {change[deed]}")
        database.close()
    with opened(url, file) as mine:
        assert tasks(mine) == list(range(1020, 1050))


def test_damage_that_is_met_while_it_runs_is_healed_from_the_topic(
    log: KafkaLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = deferred(log, 1000, 5)
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("UPDATE messages SET message = substr(message, 2)")
    database.close()
    reads = store(log)._follower.reads()
    with caplog.at_level(logging.WARNING), pytest.raises(LogUnusable, match="checksum"):
        reads.fetch([row])

    def fetched() -> bool:
        try:
            return len(reads.fetch([row])) == 1
        except LogUnusable:
            return False

    eventually("it is healed", fetched, ANSWER_S)
    assert "deleted, and rebuilt" in caplog.text
    assert tasks(log) == list(range(1000, 1005))
    reads.close()


def test_an_index_that_was_deleted_while_it_runs_is_built_anew_when_somebody_misses_it(
    log: KafkaLog, tmp_path: Path
) -> None:
    row = deferred(log, 1000, 5)
    for file in tmp_path.glob("a.db*"):
        file.unlink()
    reads = store(log)._follower.reads()
    with pytest.raises(LogUnusable, match="unable to open"):
        reads.fetch([row])
    eventually("it is there again", lambda: gives(reads, row), ANSWER_S)
    assert tasks(log) == list(range(1000, 1005))
    reads.close()


def test_records_that_are_none_of_ours_are_passed_over(
    url: str, kafka: Kafka, prefix: str, log: KafkaLog, caplog: pytest.LogCaptureFixture
) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap()})
    for key in (b"17", b"17/0/x", b"\xff/0/1", b"", None):
        producer.produce(f"{prefix}.delay", b"?", key=key or b"-", partition=1)
    producer.produce(f"{prefix}.delay", b"{}", key=b"17/1/1", partition=1, headers=[("delay", b"put 1")])
    producer.produce(
        f"{prefix}.delay", b"{}", key=b"17/1/1", partition=1, headers=[("delay", b"a 1 run 1 x")]
    )
    assert producer.flush(ANSWER_S) == 0
    row = deferred(log, 1000, 5)
    assert everything(log) == [row]
    assert caplog.text.count("passed over") == 7


def test_nothing_is_given_to_be_run_by_an_index_that_may_be_behind_of_what_it_should_know(
    private_kafka: Private, tmp_path: Path
) -> None:
    broker = private_kafka()
    with opened(f"kafka://{broker.bootstrap()}/x", tmp_path / "a.db", partitions=4) as log:
        row = deferred(log, 1000, 5)
        reads = store(log)._follower.reads()
        eventually("it is current", lambda: gives(reads, row), ANSWER_S)
        broker.kill()
        assert gives(reads, row), "what is due is started, with or without a broker"
        store(log)._follower.expect_current()
        assert not gives(reads, row)
        assert reads.counts() == {1: 5}, "what people see goes on"
        broker.start()
        eventually("it is current again", lambda: gives(reads, row), ANSWER_S)
        reads.close()


def gives(reads: FollowedReads, row: Delayed) -> bool:
    try:
        return len(reads.fetch([row])) == 1
    except LogUnusable:
        return False


# --- the broker -----------------------------------------------------------------------------------------------


def test_what_was_deferred_while_the_broker_went_away_is_repeated_and_stands_once(
    private_kafka: Private, tmp_path: Path
) -> None:
    broker = private_kafka()
    with opened(f"kafka://{broker.bootstrap()}/x", tmp_path / "a.db", partitions=4) as log:
        deferred(log, 1000, 5)
        broker.kill()
        with pytest.raises((Unsent, UnknownAppend)):
            store(log).defer([deferral(2000, 500)])
        broker.start()

        def stored_now() -> bool:
            try:
                store(log).defer([deferral(2000, 500)])
            except (Unsent, UnknownAppend):
                return False
            return True

        eventually("it is stored", stored_now, ANSWER_S)
        assert store(log).counts() == {1: 5, 2: 500}
        assert len(tasks(log)) == 505


def test_compaction_keeps_what_waits_and_forgets_what_ended(private_kafka: Private, tmp_path: Path) -> None:
    broker = private_kafka(settings={"log.cleaner.backoff.ms": "100"})
    config = {
        "cleanup.policy": "compact",
        "max.message.bytes": str(2 << 20),
        "segment.ms": "100",
        "min.cleanable.dirty.ratio": "0.001",
        "delete.retention.ms": "100",
    }
    client = admin(broker.bootstrap())
    client.create_topics([NewTopic("x.delay", 4, config=config)])["x.delay"].result(ANSWER_S)
    with opened(f"kafka://{broker.bootstrap()}/x", tmp_path / "a.db", partitions=4) as log:
        row = deferred(log, 1000, 300)
        store(log).move([Place(row.partition, row.offset + 100, 100)], NOW_MS + 7)
        store(log).move([Place(row.partition, row.offset + 150, 50)], NOW_MS + 8)
        store(log).drop([Place(row.partition, row.offset, 90)])
        expected = everything(log), tasks(log)

        def compacted() -> bool:
            deferred(log, 5000, 1)  # a segment is closed when another record comes
            store(log).drop([Place(1, 5000)])
            return len(stored(broker.bootstrap(), "x.delay")) < 300

        eventually("it is compacted", compacted, ANSWER_S)
        assert (everything(log), tasks(log)) == expected
        with opened(f"kafka://{broker.bootstrap()}/x", tmp_path / "b.db") as other:
            assert (everything(other), tasks(other)) == expected
