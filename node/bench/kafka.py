"""What is asked of a log on Kafka beyond what is asked of any: duplicates, and partitions that change hands.

Bare limits are loops over the client library alone, as everybody writes them, with records as the product's own.
"""

from __future__ import annotations

import logging
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from node.bench.bare import effects_s
from node.bench.measure import Plan
from node.cli.output import CliError
from oncekeeper.log.kafka_names import Address, Names, parse_url
from oncekeeper.log.kafka_settings import KafkaSettings, load

PARTITIONS = 12
RUN = 2_000  # records in a row to one partition, as the product's runs are
ANSWER_S = 30.0
HOPS_WARM = 20

_quiet = logging.Logger("node.bench.kafka", logging.CRITICAL)
"""A broker that has just started says much that is none of our concern."""


def bare_limits(plan: Plan) -> dict[str, float]:
    """Each per second; of the loops, medians of three."""
    settings, address = load(), parse_url(plan.log)
    home = plan.home / "bare"
    home.mkdir()
    with _topic(settings, address) as topic:
        values = [_value(number) for number in range(plan.bulk_tasks)]
        produced, consumed = [], []
        produce(settings, address, topic, values)  # Java is slow before it has compiled what it does
        for round_number in range(1, 4):
            produced.append(len(values) / produce(settings, address, topic, values))
            began = time.perf_counter()
            consume(settings, address, topic, round_number, len(values))
            consumed.append(len(values) / (time.perf_counter() - began))
        return {
            "kafka_produce_s": round(statistics.median(produced), 1),
            "kafka_consume_s": round(statistics.median(consumed), 1),
            "kafka_hops_s": round(hops_s(settings, address, topic, plan.latency_per_s), 1),
            "effects_s": round(effects_s(home / "effects", plan.bare_s), 1),
        }


def _value(number: int) -> bytes:
    """A record as the product writes it of a no-op task."""
    return (
        b'{"v":1,"handler":"bench.rerun","submitted":"2026-01-01T00:00:00.000Z","submitted_by":"host:12345 bench",'
        b'"id":"%d","body":{"number":%d}}' % (number + 1, number)
    )


@contextmanager
def _topic(settings: KafkaSettings, address: Address) -> Iterator[str]:
    admin = AdminClient(settings.admin(address.servers), logger=_quiet)
    name = f"{address.prefix}-bare-{secrets.token_hex(4)}"
    admin.create_topics([NewTopic(name, PARTITIONS)])[name].result(ANSWER_S)
    try:
        yield name
    finally:
        admin.delete_topics([name])[name].result(ANSWER_S)


@contextmanager
def bare_producing(plan: Plan) -> Iterator[Callable[[], float]]:
    """Records a second of one ``produce``, as often as it is called, for a comparison at that very moment."""
    settings, address = load(), parse_url(plan.log)
    values = [_value(number) for number in range(plan.bulk_tasks)]
    with _topic(settings, address) as topic:
        produce(settings, address, topic, values)
        yield lambda: len(values) / produce(settings, address, topic, values)


def produce(settings: KafkaSettings, address: Address, topic: str, values: list[bytes]) -> float:
    """Seconds for all; each is confirmed by a callback, acks=all, idempotent."""
    given = {**settings.producer(address.servers), "enable.idempotence": True, "linger.ms": 5}
    producer = Producer(given, logger=_quiet)
    producer.list_topics(timeout=ANSWER_S)
    confirmed = 0
    began = time.perf_counter()

    def note(error: KafkaError | None, message: Message) -> None:
        nonlocal confirmed
        confirmed += error is None

    for number, value in enumerate(values):
        while True:
            try:
                producer.produce(topic, value, partition=number // RUN % PARTITIONS, on_delivery=note)
                break
            except BufferError:
                producer.poll(0.01)
        if number % 1000 == 0:
            producer.poll(0)
    producer.flush()
    seconds = time.perf_counter() - began
    if confirmed != len(values):
        raise CliError(f"the bare loop: {confirmed} records of {len(values)} were confirmed")
    return seconds


def consume(settings: KafkaSettings, address: Address, topic: str, skip: int, count: int) -> None:
    """The records of one more ``produce``, after ``skip`` of them."""
    consumer = _reader(settings, address)
    starts = []
    for partition in range(PARTITIONS):
        place = TopicPartition(topic, partition)
        _, end = consumer.get_watermark_offsets(place, timeout=ANSWER_S)
        starts.append(TopicPartition(topic, partition, end // (skip + 1) * skip))
    consumer.assign(starts)
    left = count
    while left > 0:
        found = consumer.consume(min(left, 500), ANSWER_S)
        if not found:
            raise CliError(f"the bare loop: {left} records are missing")
        left -= sum(1 for record in found if record.error() is None)
    consumer.close()


def hops_s(settings: KafkaSettings, address: Address, topic: str, pace: int) -> float:
    """One record, confirmed and then seen by a consumer: how many a second, one after the other (the median)."""
    producer = Producer(
        {**settings.producer(address.servers), "enable.idempotence": True, "linger.ms": 0}, logger=_quiet
    )
    consumer = _reader(settings, address)
    place = TopicPartition(topic, 0)
    _, end = consumer.get_watermark_offsets(place, timeout=ANSWER_S)
    consumer.assign([TopicPartition(topic, 0, end)])
    taken = []
    for _ in range(HOPS_WARM + pace):
        began = time.perf_counter()
        producer.produce(topic, b"{}", partition=0)
        producer.flush()
        if not consumer.consume(1, ANSWER_S):
            raise CliError("the bare loop: a record was not seen")
        taken.append(time.perf_counter() - began)
    consumer.close()
    return 1 / statistics.median(taken[HOPS_WARM:])


def _reader(settings: KafkaSettings, address: Address) -> Consumer:
    return Consumer(
        {
            **settings.consumer(address.servers),
            "group.id": f"{address.prefix}-bare",
            "enable.auto.commit": False,
            "fetch.queue.backoff.ms": 5,
        },
        logger=_quiet,
    )


def rewind(url: str, partitions: int) -> None:
    """Every position of the default queue to its partition's beginning, as a person does it."""
    from confluent_kafka import ConsumerGroupTopicPartitions

    settings, address = load(), parse_url(url)
    names = Names(address.prefix)
    admin = AdminClient(settings.admin(address.servers), logger=_quiet)
    places = [TopicPartition(names.default, partition, 0) for partition in range(partitions)]
    asked = admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(names.group, places)])
    for answer in asked.values():
        for place in answer.result(ANSWER_S).topic_partitions:
            if place.error is not None:
                raise CliError(f"{place.topic}/{place.partition} cannot be rewound: {place.error.str()}")


def effects(path: Path, size: int) -> int:
    try:
        return os.stat(path).st_size // size
    except FileNotFoundError:
        return 0
