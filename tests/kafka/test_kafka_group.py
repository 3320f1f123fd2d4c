"""A node's membership of the consumer group on a real broker: who owns what, and that reading skips nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from confluent_kafka import Producer, TopicPartition

from node.kafkaup.broker import Kafka
from oncekeeper.log import kafka_group, kafka_stretch
from tests.support.kafka_broker import ANSWER_S, admin, create_topic, produce
from tests.support.kafka_member import Member, member, task_values

Made = Callable[..., Kafka]


def test_two_members_share_the_partitions_and_read_everything_once(kafka: Kafka, prefix: str) -> None:
    topic = f"{prefix}.q.default"
    create_topic(kafka.bootstrap(), topic, 6)

    async def act() -> None:
        async with member(kafka.bootstrap(), prefix) as one, member(kafka.bootstrap(), prefix) as other:
            await one.until(lambda: len(one.at) == 3 and len(other.at) == 3, "three partitions each")
            assert set(one.at).isdisjoint(other.at)
            for partition in range(6):
                await asyncio.to_thread(
                    produce,
                    kafka.bootstrap(),
                    topic,
                    task_values(range(1 + partition * 100, 101 + partition * 100)),
                    partition,
                )
            both = lambda: len(one.seen) + len(other.seen) >= 600  # noqa: E731
            await asyncio.gather(one.until(both, "all"), other.until(both, "all"))
            assert sorted(task_id for _, _, task_id in one.seen + other.seen) == list(range(1, 601))

    asyncio.run(act())


def test_who_leaves_is_succeeded_from_the_committed_positions(kafka: Kafka, prefix: str) -> None:
    topic = f"{prefix}.q.default"
    create_topic(kafka.bootstrap(), topic, 2)
    for partition in range(2):
        produce(
            kafka.bootstrap(), topic, task_values(range(1 + partition * 50, 51 + partition * 50)), partition
        )

    async def act() -> None:
        async with member(kafka.bootstrap(), prefix) as one:
            await one.until(lambda: len(one.seen) == 100, "all is read")
            one.group.commit({0: 20, 1: 50})
            async with member(kafka.bootstrap(), prefix) as other:
                one.group.want(False)
                assert one.group.positions == {}
                await other.until(lambda: len(other.at) == 2, "both partitions")
                await other.until(lambda: len(other.seen) >= 30, "what was not committed")
                assert sorted(task_id for _, _, task_id in other.seen) == list(range(21, 51))
                # What is no longer its own, it cannot commit: the successor's word counts.
                one.group.commit({0: 0, 1: 0})

    asyncio.run(act())


def test_markers_of_transactions_are_gaps_and_a_partition_that_ends_with_one_is_read_to_its_end(
    kafka: Kafka, prefix: str
) -> None:
    topic = f"{prefix}.q.default"
    create_topic(kafka.bootstrap(), topic, 1)
    producer = Producer({"bootstrap.servers": kafka.bootstrap(), "transactional.id": prefix})
    producer.init_transactions(ANSWER_S)
    for at, end in enumerate(
        (producer.commit_transaction, producer.abort_transaction, producer.commit_transaction)
    ):
        producer.begin_transaction()
        for value in task_values([10 * at + 1, 10 * at + 2]):
            producer.produce(topic, value, partition=0)
        producer.flush(ANSWER_S)  # what is aborted has been stored as well
        end(ANSWER_S)

    async def act() -> None:
        async with member(kafka.bootstrap(), prefix) as one:
            await one.until(lambda: one.at.get(0) == 9, "the end, behind the last marker")
            assert [task_id for _, _, task_id in one.seen] == [1, 2, 21, 22]
            assert sum(gap.count for gap in one.gaps) == 5

    asyncio.run(act())


def test_a_partition_that_nobody_reads_is_paused_and_the_others_go_on(
    kafka: Kafka, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_stretch, "TASKS_HIGH", 500)
    topic = f"{prefix}.q.default"
    create_topic(kafka.bootstrap(), topic, 2)
    produce(kafka.bootstrap(), topic, task_values(range(1, 20_001)), 0)
    produce(kafka.bootstrap(), topic, task_values(range(20_001, 25_001)), 1)

    async def act() -> None:
        async with member(kafka.bootstrap(), prefix) as one:
            await one.until(lambda: len(one.at) == 2, "both partitions")
            ignored = one.at.pop(0)
            await one.until(lambda: len(one.seen) == 5_000, "partition 1")
            held = one.group._buffers._stretches[0]
            assert held.tasks <= 500 + kafka_group.RECORDS_MAX
            one.at[0] = ignored
            await one.until(lambda: len(one.seen) == 25_000, "partition 0, after all")
            assert sorted(task_id for _, _, task_id in one.seen) == list(range(1, 25_001))

    asyncio.run(act())


def test_what_kafka_deleted_unread_stops_its_partition_until_a_person_accepts_it(
    kafka: Kafka, prefix: str
) -> None:
    topic = f"{prefix}.q.default"
    create_topic(kafka.bootstrap(), topic, 2)
    produce(kafka.bootstrap(), topic, task_values(range(1, 101)), 0)
    produce(kafka.bootstrap(), topic, task_values(range(101, 111)), 1)

    async def act() -> None:
        async with member(kafka.bootstrap(), prefix) as one:
            await one.until(lambda: len(one.seen) == 110, "all is read")
            one.group.commit({0: 30, 1: 10})
        client = admin(kafka.bootstrap())
        for deleted in client.delete_records([TopicPartition(topic, 0, 40)]).values():
            deleted.result(ANSWER_S)
        async with member(kafka.bootstrap(), prefix) as two:
            await two.until(lambda: 1 in two.at and two.group.stuck, "the alarm")
            assert two.group.stuck == {0: (30, 40)}
            assert set(two.at) == {1}
            assert "30" in two.group.trouble
            assert "39" in two.group.trouble
            await asyncio.to_thread(produce, kafka.bootstrap(), topic, task_values([500]), 1)
            await two.until(lambda: two.seen, "the other partition goes on")
            assert not two.group.skip(1)
            assert two.group.skip(0)
            await two.until(lambda: len(two.seen) == 61, "what is left")
            assert [task_id for number, _, task_id in two.seen if number == 0] == list(range(41, 101))
            assert two.group.stuck == {}
            # The decision is durable at once.
            await two.until(lambda: committed(kafka, prefix, topic, 0) == 40, "the position")

    asyncio.run(act())


def test_a_member_that_is_overtaken_by_deletion_is_stuck_too(
    kafka: Kafka, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_stretch, "TASKS_HIGH", 100)
    topic = f"{prefix}.q.default"
    create_topic(kafka.bootstrap(), topic, 1)
    values = [value[:-2] + b',"pad":"' + b"x" * 20_000 + b'"}}' for value in task_values(range(1, 2_001))]
    produce(kafka.bootstrap(), topic, values, 0)

    async def act() -> None:
        settings = {"queued.max.messages.kbytes": 1024, "fetch.message.max.bytes": 100_000}
        async with member(kafka.bootstrap(), prefix, settings=settings) as one:
            await one.until(lambda: one.at, "the partition")
            number, at = one.at.popitem()
            await one.until(lambda: one.group._buffers._stretches[number].paused, "it is full")
            client = admin(kafka.bootstrap())
            for deleted in client.delete_records([TopicPartition(topic, 0, 1_990)]).values():
                deleted.result(ANSWER_S)
            one.at[number] = at
            await one.until(lambda: one.group.stuck, "the alarm")
            high = len(one.seen)
            assert high < 1_990
            assert one.group.stuck == {0: (high, 1_990)}
            assert one.group.positions == {}

    asyncio.run(act())


def committed(kafka: Kafka, group: str, topic: str, partition: int) -> int:
    from confluent_kafka import Consumer

    consumer = Consumer({"bootstrap.servers": kafka.bootstrap(), "group.id": group})
    try:
        (found,) = consumer.committed([TopicPartition(topic, partition)], timeout=ANSWER_S)
        return found.offset
    finally:
        consumer.close()


def test_a_queue_that_comes_later_is_found(
    kafka: Kafka, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_group, "TOPICS_S", 0.2)
    create_topic(kafka.bootstrap(), f"{prefix}.q.default", 1)

    async def act() -> None:
        async with member(kafka.bootstrap(), prefix) as one:
            await one.until(lambda: one.at, "the first queue")
            await asyncio.to_thread(create_topic, kafka.bootstrap(), f"{prefix}.q.mail", 1)
            await asyncio.to_thread(
                produce, kafka.bootstrap(), f"{prefix}.q.mail", task_values([7], "mail"), 0
            )
            await one.until(lambda: one.seen, "the task of the second")
            assert len(one.at) == 2

    asyncio.run(act())


def test_reading_where_nothing_was_fetched_begins_a_new_membership(kafka: Kafka, prefix: str) -> None:
    topic = f"{prefix}.q.default"
    create_topic(kafka.bootstrap(), topic, 1)
    produce(kafka.bootstrap(), topic, task_values(range(1, 11)), 0)

    async def act() -> None:
        async with member(kafka.bootstrap(), prefix) as one:
            await one.until(lambda: len(one.seen) == 10, "all is read")
            one.read()  # from the end, so that what lies below is forgotten
            one.at[0] = 3  # no jump is believed
            one.read()
            assert one.group.positions == {}
            one.group.want(True)
            one.at.clear()
            one.seen.clear()
            await one.until(lambda: len(one.seen) == 10, "all is read again, from the committed position")

    asyncio.run(act())


def test_a_failure_while_partitions_are_taken_over_begins_a_new_membership(
    kafka: Kafka, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = f"{prefix}.q.default"
    create_topic(kafka.bootstrap(), topic, 2)
    produce(kafka.bootstrap(), topic, task_values(range(1, 11)), 0)
    failures = iter(range(2))
    low = kafka_group.Group._low

    def fails_twice(group: kafka_group.Group, number: int) -> int:
        if next(failures, None) is not None:
            assert group._consumer is not None
            group._consumer.get_watermark_offsets(TopicPartition(topic, 99), timeout=0.01, cached=False)
        return low(group, number)

    monkeypatch.setattr(kafka_group.Group, "_low", fails_twice)

    async def act() -> None:
        async with member(kafka.bootstrap(), prefix) as one:
            await one.until(lambda: len(one.seen) == 10, "all is read")
            assert one.group.trouble == ""

    asyncio.run(act())
    assert next(failures, None) is None, "it did fail"


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_both_group_protocols_do(kafka: Kafka, prefix: str, protocol: str) -> None:
    topic = f"{prefix}.q.default"
    create_topic(kafka.bootstrap(), topic, 4)

    async def act() -> None:
        async with member(kafka.bootstrap(), prefix, protocol=protocol) as one:
            await one.until(lambda: len(one.at) == 4, "all partitions")
            await share(one)

    async def share(one: Member) -> None:
        async with member(kafka.bootstrap(), prefix, protocol=protocol) as other:
            both = lambda: len(one.at) == 2 and len(other.at) == 2  # noqa: E731
            await asyncio.gather(one.until(both, "half each"), other.until(both, "half each"))
            # The one that stays keeps what it has: cooperative, nothing is taken away and given back.
            assert all(len(each) >= 2 for each in one.assignments)
        await one.until(lambda: len(one.at) == 4, "all again")

    asyncio.run(act())


def test_a_broker_without_the_new_protocol_gets_the_classic_one(private_kafka: Made) -> None:
    old = private_kafka(settings={"group.coordinator.rebalance.protocols": "classic"})
    create_topic(old.bootstrap(), "old.q.default", 2)
    produce(old.bootstrap(), "old.q.default", task_values(range(1, 6)), 0)

    async def act() -> None:
        async with member(old.bootstrap(), "old") as one:
            await one.until(lambda: len(one.seen) == 5, "all is read")
            assert one.group.protocol == "classic"

    asyncio.run(act())


@pytest.mark.slow
def test_a_broker_that_is_not_there_is_told_and_waited_for(private_kafka: Made) -> None:
    one_broker = private_kafka()
    create_topic(one_broker.bootstrap(), "late.q.default", 1)
    produce(one_broker.bootstrap(), "late.q.default", task_values(range(1, 6)), 0)
    one_broker.brokers[1].kill()

    async def act() -> None:
        async with member(one_broker.bootstrap(), "late") as one:
            await one.until(lambda: one.group.trouble, "it is said")
            await asyncio.to_thread(one_broker.brokers[1].restart)
            await one.until(lambda: len(one.seen) == 5, "all is read")
            assert one.group.trouble == ""

    asyncio.run(act())
