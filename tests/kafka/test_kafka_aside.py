"""What lies aside on Kafka: the topics are the truth, the index is a copy that may be lost at any time."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Producer

from dedup.ids import Ids
from node.kafkaup.broker import Kafka
from oncekeeper.log.kafka import KafkaLog, open_kafka
from oncekeeper.log.port import Aside, Unsent
from tests.support.kafka_broker import admin, stored

Open = Callable[..., KafkaLog]


@pytest.fixture
def opened(kafka: Kafka, prefix: str) -> Open:
    def open_one(index: Path | None = None) -> KafkaLog:
        url = f"kafka://{kafka.bootstrap()}/{prefix}"
        return open_kafka(url, create=True, partitions=1, index_path=index)

    return open_one


def dead(number: int, message: bytes = b"{}", at_ms: int = 0) -> Aside:
    return Aside("dead", number, message, "why", at_ms)


def everything(log: KafkaLog) -> list[tuple[int, Aside]]:
    return log.aside("dead", 0, 10_000) + log.aside("suspect", 0, 10_000)


def test_what_one_handle_puts_aside_every_other_sees_at_once(opened: Open, tmp_path: Path) -> None:
    logs = [opened(tmp_path / "a.db"), opened(tmp_path / "a.db"), opened(tmp_path / "b.db"), opened()]
    for n, log in enumerate(logs):
        log.put_aside([dead(1 + n)])
        assert [[task.id for _, task in each.aside("dead", 0, 10)] for each in logs] == [
            [*range(1, n + 2)]
        ] * 4
    logs[3].drop_aside([dead(1), dead(2)])
    assert [[task.id for _, task in each.aside("dead", 0, 10)] for each in logs] == [[3, 4]] * 4
    for log in logs:
        log.close()


@pytest.mark.parametrize("seed", range(3))
def test_an_index_that_is_made_anew_gives_the_same_answers(opened: Open, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    log = opened(tmp_path / "index.db")
    for _ in range(40):
        some = [
            Aside(rng.choice(("dead", "suspect")), 1 + rng.randrange(8), b"%d" % rng.randrange(3), "why", 0)
            for _ in range(rng.randrange(1, 4))
        ]
        if rng.random() < 0.6:
            log.put_aside(some)
        else:
            log.drop_aside(log.find_aside(Ids(((1, 8),)))[: rng.randrange(3)] + some[:1])
    anew = opened()
    assert everything(anew) == everything(log), f"seed {seed}"
    ids = Ids(((1, 8),))
    assert anew.find_aside(ids) == log.find_aside(ids)
    for each in (log, anew):
        each.close()


@pytest.mark.parametrize("harm", ["noise", "cut", "table", "other topics", "gone"])
def test_a_damaged_index_is_made_anew(opened: Open, tmp_path: Path, harm: str) -> None:
    index = tmp_path / "index.db"
    log = opened(index)
    log.put_aside([dead(n, b"x" * 500) for n in range(1, 51)])
    before = everything(log)
    log.close()
    if harm == "noise":
        index.write_bytes(random.Random(1).randbytes(index.stat().st_size))
    elif harm == "cut":
        index.write_bytes(index.read_bytes()[:5000])
    elif harm == "gone":
        index.unlink()
    else:
        statement = "DROP TABLE alive" if harm == "table" else "UPDATE meta SET value = 'another cluster'"
        with sqlite3.connect(index) as database:
            database.execute(statement)
    log = opened(index)
    assert everything(log) == before
    assert index.stat().st_mode & 0o077 == 0
    log.close()


def test_topics_that_were_made_anew_are_not_answered_from_the_old_index(
    opened: Open, kafka: Kafka, prefix: str, tmp_path: Path
) -> None:
    log = opened(tmp_path / "index.db")
    log.put_aside([dead(1)])
    assert len(everything(log)) == 1
    log.close()
    client = admin(kafka.bootstrap())
    client.delete_topics([f"{prefix}.dead"])[f"{prefix}.dead"].result(30)
    log = opened(tmp_path / "index.db")
    assert everything(log) == []
    log.put_aside([dead(2)])
    assert [task.id for _, task in everything(log)] == [2]
    log.close()


def test_one_that_was_replaced_never_comes_back_whatever_compaction_left(
    opened: Open, kafka: Kafka, prefix: str
) -> None:
    log = opened()
    log.put_aside([dead(1, b"old")])
    log.put_aside([dead(1, b"new")])
    log.drop_aside([dead(1, b"old")])
    assert [task.message for _, task in everything(log)] == [b"new"], "only as it was read"
    log.drop_aside([dead(1, b"new")])
    assert everything(log) == []
    last = {record.key(): record.value() for record in stored(kafka.bootstrap(), f"{prefix}.dead")}
    assert len(last) == 2
    assert set(last.values()) == {None}, (
        "every key ends in a tombstone, so compaction may drop any of the rest"
    )
    log.close()


def test_a_record_of_somebody_else_is_passed_over(opened: Open, kafka: Kafka, prefix: str) -> None:
    log = opened()
    producer = Producer({"bootstrap.servers": kafka.bootstrap()})
    producer.produce(f"{prefix}.dead", b"what is this", key=b"dead/1/x")
    producer.produce(f"{prefix}.dead", b"{}", key=b"x", headers={"id": "y", "reason": b"\xff", "at_ms": ""})
    assert producer.flush(30) == 0
    log.put_aside([dead(1)])
    assert [task.id for _, task in everything(log)] == [1]
    log.close()


def test_what_kafka_would_not_take_is_cut_and_says_so(opened: Open) -> None:
    log = opened()
    log.put_aside([dead(1, b"x" * (3 << 20)), Aside("dead", 2, b"", "y" * 100_000, 0)])
    (_, cut), (_, short) = log.aside("dead", 0, 10)
    assert len(cut.message) < 2 << 20
    assert f"of its {3 << 20} bytes are kept" in cut.reason
    assert (short.message, set(short.reason)) == (b"", {"y"})
    log.drop_aside([cut, short])
    assert everything(log) == []
    log.close()


def test_an_unknown_kind_is_refused(opened: Open) -> None:
    log = opened()
    with pytest.raises(ValueError, match="kind='lost' must be one of dead, suspect"):
        log.put_aside([Aside("lost", 1, b"", "", 0)])
    log.close()


def test_an_index_that_cannot_be_written_is_an_error_and_nothing_is_lost(
    opened: Open, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    log = opened(blocked / "index.db")
    with pytest.raises(Unsent, match=r"index\.db"):
        log.put_aside([dead(1)])
    log.close()
    log = opened()
    assert everything(log) == []
    log.close()


def test_handles_that_share_an_index_do_not_disturb_each_other(opened: Open, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(who: int) -> None:
        first = 1 + 100 * who
        try:
            log = opened(tmp_path / "index.db")
            for n in range(15):
                log.put_aside([dead(first + n)])
                assert [task.id for task in log.find_aside(Ids(((first, 50),)))] == [
                    first + k for k in range(n + 1)
                ]
            log.close()
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    log = opened(tmp_path / "index.db")
    assert len(everything(log)) == 45
    log.close()
