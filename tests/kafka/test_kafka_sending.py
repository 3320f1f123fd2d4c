"""Appending through faults: what was stored, what was not, and what is not known, each told as it is."""

from __future__ import annotations

import re
import threading
import time

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, NewPartitions

from chaos.toxiproxy import DOWN, UP
from dedup.ids import Ids, keyed_id
from node.kafkaup.broker import Kafka
from oncekeeper.envelope import TaskBatch
from oncekeeper.errors import LogUnusable
from oncekeeper.log.kafka import KafkaLog, open_kafka
from oncekeeper.log.port import Fetched, Gap, Item, Undecodable, UnknownAppend, Unsent
from tests.support.kafka_broker import (
    Private,
    ProxiedKafka,
    admin,
    create_topic,
    produce,
    stored,
)

HANGS_S = 60.0


def run(start: int, count: int = 1, queue: str = "default", body: bytes = b"{}") -> TaskBatch:
    return TaskBatch(queue=queue, handler="h", ids=Ids(((start, count),)), bodies=(body,) * count)


def opened(bootstrap: str, prefix: str, **options: object) -> KafkaLog:
    return open_kafka(f"kafka://{bootstrap}/{prefix}", create=True, partitions=2, **options)  # type: ignore[arg-type]


def all_items(log: KafkaLog, number: int = 0) -> list[Item]:
    found: list[Item] = []
    offset, end = 0, log.ends()[number]
    while offset < end and (more := log.read(number, offset, 1000, 10**6)):
        found += more
        offset = found[-1].end
    return found


def all_ids(log: KafkaLog) -> list[int]:
    """Of both partitions, sorted."""
    items = [item for number in range(2) for item in all_items(log, number)]
    return sorted(int(i) for item in items if isinstance(item, Fetched) for i in item.batch.ids)


# --- refused --------------------------------------------------------------------------------------------------


def test_a_task_over_the_limit_is_refused_before_anything_is_sent(kafka: Kafka, prefix: str) -> None:
    create_topic(kafka.bootstrap(), f"{prefix}.q.default", 2, max_message_bytes="2000")
    log = opened(kafka.bootstrap(), prefix)
    large = run(500, 1, body=b'{"x":"%b"}' % (b"y" * 2000))
    with pytest.raises(
        Unsent, match=r"task 500 has \d+ bytes, topic .*q\.default takes 1872 .*2000\): nothing"
    ):
        log.append([run(1, 100), large])
    assert set(log.ends().values()) == {0}
    # Many small ones make no batch that is over the limit.
    log.append([run(1, 100, body=b'{"x":"%b"}' % (b"y" * 1500))])
    assert all_ids(log) == list(range(1, 101))
    log.close()


def test_our_own_limit_counts_too(kafka: Kafka, prefix: str) -> None:
    log = opened(kafka.bootstrap(), prefix, settings={"message.max.bytes": "1500"})
    with pytest.raises(Unsent, match=r"takes 1372"):
        log.append([run(1, 1, body=b'{"x":"%b"}' % (b"y" * 1500))])
    log.close()


def test_a_queue_that_cannot_have_a_topic_is_refused(kafka: Kafka, prefix: str) -> None:
    log = opened(kafka.bootstrap(), prefix)
    with pytest.raises(Unsent, match="Kafka allows 249"):
        log.append([run(1), run(2, queue="x" + ":" * 199)])
    create_topic(kafka.bootstrap(), f"{prefix}.q.mail", cleanup_policy="compact")
    with pytest.raises(Unsent, match=r"q\.mail: cleanup\.policy=compact must be 'delete'"):
        log.append([run(1), run(2, queue="mail")])
    assert set(log.ends().values()) == {0}
    log.close()


# --- not known ------------------------------------------------------------------------------------------------


def test_a_lost_acknowledgement_is_unknown_and_sending_again_is_safe(proxied_kafka: ProxiedKafka) -> None:
    log = opened(proxied_kafka.bootstrap, "ack", send_timeout_ms=2000)
    log.append([run(1)])
    proxied_kafka.proxy.add("mute", "timeout", DOWN, {"timeout": 0})  # requests arrive, answers do not
    start = time.monotonic()
    with pytest.raises(
        UnknownAppend, match=r"0 tasks are confirmed, the others are not: not confirmed within 2 s"
    ):
        log.append([run(10, 3)])
    assert time.monotonic() - start < HANGS_S
    proxied_kafka.proxy.heal()
    direct = opened(proxied_kafka.direct, "ack")
    assert set(all_ids(direct)) >= {10, 11, 12}, "they were stored all the same"
    again_until(log, [run(10, 3)])
    ids = all_ids(direct)
    assert set(ids) == {1, 10, 11, 12}, "with the same ids: the ledger knows them again"
    for each in (log, direct):
        each.close()


def again_until(log: KafkaLog, batches: list[TaskBatch]) -> None:
    """As a client does: the same ids, until it is known that they are stored."""
    until = time.monotonic() + HANGS_S
    while True:
        try:
            log.append(batches)
            return
        except (Unsent, UnknownAppend):
            if time.monotonic() > until:
                raise


def test_an_unreachable_broker_is_a_clear_error_within_the_deadline_each_time(
    proxied_kafka: ProxiedKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oncekeeper.log.kafka_send.PROBE_S", 0.5)
    log = opened(proxied_kafka.bootstrap, "cut", send_timeout_ms=2000)
    log.append([run(1)])
    proxied_kafka.proxy.enable(False)
    said = []
    for n in range(3):
        start = time.monotonic()
        with pytest.raises((UnknownAppend, Unsent)) as caught:
            log.append([run(100 + n)])
        assert time.monotonic() - start < HANGS_S
        said.append(caught.value)
    assert isinstance(said[-1], Unsent), (
        "nothing is tried while no broker is there, and so nothing is unknown"
    )
    assert re.search("Connection refused|Disconnected|reset", str(said[-1]))
    monkeypatch.setattr("oncekeeper.log.kafka_admin.ASK_S", 0.5)
    for question in (log.ends, log.committed, lambda: log.aside("dead", 0, 1), lambda: log.read(0, 0, 1, 1)):
        start = time.monotonic()
        with pytest.raises(LogUnusable):
            question()
        assert time.monotonic() - start < HANGS_S
    proxied_kafka.proxy.enable(True)
    again_until(log, [run(200)])
    assert 200 in all_ids(log)
    log.close()


def test_a_hanging_connection_is_not_waited_for_beyond_the_deadline(proxied_kafka: ProxiedKafka) -> None:
    log = opened(proxied_kafka.bootstrap, "hang", send_timeout_ms=2000)
    log.append([run(1)])
    proxied_kafka.proxy.add("deaf", "timeout", UP, {"timeout": 0})
    start = time.monotonic()
    with pytest.raises(UnknownAppend):
        log.append([run(2, 50_000, body=b'{"x":"%b"}' % (b"y" * 500))])
    assert time.monotonic() - start < HANGS_S
    proxied_kafka.proxy.heal()
    again_until(log, [run(2, 100)])
    assert set(all_ids(log)) == {1, *range(2, 102)}
    log.close()


@pytest.mark.slow
def test_a_broker_that_starts_again_is_found_again(private_kafka: Private) -> None:
    kafka = private_kafka()
    log = opened(kafka.bootstrap(), "again", send_timeout_ms=5000)
    log.append([run(1, 100)])
    log.commit({0: 10})
    kafka.brokers[1].kill()
    kafka.brokers[1].restart()
    # At once: the coordinator still reads its log, and says so.
    until = time.monotonic() + HANGS_S
    while True:
        try:
            assert log.committed()[0] == 10
            break
        except LogUnusable:
            assert time.monotonic() < until
    again_until(log, [run(1000, 100)])
    assert set(all_ids(log)) == {*range(1, 101), *range(1000, 1100)}
    log.close()


def test_more_than_the_buffers_hold_is_sent_in_turns(
    kafka: Kafka, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oncekeeper.log.kafka_send.BUFFERED_MAX", 1000)
    log = opened(kafka.bootstrap(), prefix)
    appended = log.append([run(1, 20_000)])
    assert sum(each.count for each in appended) == 20_000
    assert all_ids(log) == list(range(1, 20_001))
    log.close()


def test_acks_1_is_not_idempotent_and_stores_all_the_same(kafka: Kafka, prefix: str) -> None:
    log = opened(kafka.bootstrap(), prefix, settings={"acks": "1"})
    log.append([run(1, 1000)])
    assert all_ids(log) == list(range(1, 1001))
    log.close()


def test_places_are_told_exactly_also_where_two_write_at_once(kafka: Kafka, prefix: str) -> None:
    logs = [opened(kafka.bootstrap(), prefix) for _ in range(2)]
    appended: list[list[tuple[int, int]]] = [[], []]

    def write(who: int) -> None:
        for n in range(20):
            first = 1 + 100_000 * who + 1000 * n
            for place in logs[who].append([run(first, 500)]):
                appended[who] += [(place.partition, place.base + at) for at in range(place.count)]

    threads = [threading.Thread(target=write, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(set(places)) for places in appended] == [10_000, 10_000]
    found: dict[tuple[int, int], int] = {}
    for number in range(2):
        for item in all_items(logs[0], number):
            assert isinstance(item, Fetched)
            found |= {(number, item.base + at): int(task_id) for at, task_id in enumerate(item.batch.ids)}
    for who in range(2):
        assert sorted(found[place] for place in appended[who]) == sorted(
            1 + 100_000 * who + 1000 * n + k for n in range(20) for k in range(500)
        )
        logs[who].close()


def test_a_queue_whose_topic_was_deleted_gets_it_anew(kafka: Kafka, prefix: str) -> None:
    log = opened(kafka.bootstrap(), prefix, send_timeout_ms=2000)
    log.append([run(1, queue="mail")])
    client = admin(kafka.bootstrap())
    client.delete_topics([f"{prefix}.q.mail"])[f"{prefix}.q.mail"].result(30)
    again_until(log, [run(2, queue="mail")])
    assert len(stored(kafka.bootstrap(), f"{prefix}.q.mail")) == 1
    log.close()


# --- what others send -----------------------------------------------------------------------------------------


def test_messages_of_any_client_are_read_and_found(kafka: Kafka, prefix: str) -> None:
    log = opened(kafka.bootstrap(), prefix)
    topic = f"{prefix}.q.default"
    produce(
        kafka.bootstrap(),
        topic,
        [b'{"handler": "h", "body": {}}', b"no JSON", b'{"handler": "h", "key": "order-1", "body": {}}'],
        partition=1,
    )
    items = all_items(log, 1)
    assert [type(item) for item in items] == [Fetched, Undecodable, Fetched]
    assert isinstance(items[0], Fetched)
    made_up = next(iter(items[0].batch.ids))
    assert isinstance(made_up, bytes)
    assert log.find(made_up)[0].offset == 0
    found = log.find(keyed_id("default", "order-1"))
    assert [(each.partition, each.offset) for each in found] == [(1, 2)]
    log.close()


def test_what_a_transaction_leaves_is_a_gap_and_what_was_rolled_back_is_not_read(
    kafka: Kafka, prefix: str
) -> None:
    log = opened(kafka.bootstrap(), prefix)
    producer = Producer({"bootstrap.servers": kafka.bootstrap(), "transactional.id": prefix})
    producer.init_transactions(30)
    for commit in (True, False, True):
        producer.begin_transaction()
        producer.produce(f"{prefix}.q.default", b'{"handler":"h","id":"7","body":{}}', partition=0)
        producer.flush(30)
        (producer.commit_transaction if commit else producer.abort_transaction)(30)
    until = time.monotonic() + HANGS_S
    while not (items := all_items(log, 0)) or items[-1].end < 6:
        assert time.monotonic() < until, items  # the last marker is written after the answer
    assert [(type(item), item.base, item.end) for item in items] == [
        (Fetched, 0, 1),
        (Gap, 1, 4),
        (Fetched, 4, 5),
        (Gap, 5, 6),
    ]
    assert log.read(0, 1, 10, 1000)[0] == Gap(0, 1, 3), "a jump that is no loss is a gap, wherever one begins"
    assert log.read(0, 5, 10, 1000) == [Gap(0, 5, 1)]
    assert log.read(0, 6, 10, 1000) == []
    log.close()


def test_what_kafka_deleted_shows_by_the_first_offset(kafka: Kafka, prefix: str) -> None:
    log = opened(kafka.bootstrap(), prefix)
    log.append([run(1, 64)])
    (number,) = [number for number, end in log.ends().items() if end]
    log.commit({number: 30})
    assert log.retain(0, time.time_ns() // 10**6 + 1000) == 30
    (first, *_) = log.read(number, 3, 1000, 10**6)
    assert (type(first), first.base) == (Fetched, 30)
    log.close()


def test_more_partitions_than_when_it_was_opened_are_seen(kafka: Kafka, prefix: str) -> None:
    log = opened(kafka.bootstrap(), prefix)
    client = admin(kafka.bootstrap())
    client.create_partitions([NewPartitions(f"{prefix}.q.default", 3)])[f"{prefix}.q.default"].result(30)
    produce(kafka.bootstrap(), f"{prefix}.q.default", [b'{"handler":"h","id":"9","body":{}}'], partition=2)
    until = time.monotonic() + HANGS_S
    while log.ends().get(2) != 1:
        assert time.monotonic() < until
    assert [task_id for item in log.read(2, 0, 10, 1000) for task_id in item.batch.ids] == [9]  # type: ignore[union-attr]
    log.close()


def test_a_member_of_the_group_keeps_others_from_committing(kafka: Kafka, prefix: str) -> None:
    log = opened(kafka.bootstrap(), prefix)
    log.append([run(1, 128)])
    member = Consumer(
        {"bootstrap.servers": kafka.bootstrap(), "group.id": prefix, "group.protocol": "consumer"}
    )
    member.subscribe([f"{prefix}.q.default"])
    until = time.monotonic() + HANGS_S
    while not member.assignment():
        member.poll(0.1)
        assert time.monotonic() < until
    with pytest.raises((Unsent, UnknownAppend), match="only its members can"):
        log.commit({0: 1})
    member.close()
    log.commit({0: 1})
    assert log.committed()[0] == 1
    log.close()


def test_a_lower_limit_that_is_set_later_is_found_out(kafka: Kafka, prefix: str) -> None:
    log = opened(kafka.bootstrap(), prefix, send_timeout_ms=3000)
    topic = f"{prefix}.q.mail"
    body = b'{"x":"%b"}' % (b"y" * 5000)
    log.append([run(1, queue="mail", body=body)])
    client = admin(kafka.bootstrap())
    entry = ConfigEntry("max.message.bytes", "2000", incremental_operation=AlterConfigOpType.SET)
    change = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    client.incremental_alter_configs([change])[change].result(30)
    with pytest.raises(Unsent, match="Message size too large"):
        log.append([run(2, queue="mail", body=body)])
    with pytest.raises(Unsent, match=r"task 3 has \d+ bytes"):
        log.append([run(3, queue="mail", body=body)])
    log.append([run(4, queue="mail")])
    log.close()
