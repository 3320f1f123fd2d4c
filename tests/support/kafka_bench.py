"""The log on Kafka beside librdkafka's bare loops: ``python -m tests.support.kafka_bench [TASKS] [HOST:PORT]``.

Without an address a broker is started. Prints medians of three runs. Not a test: nothing here is asserted.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from dedup.ids import Ids
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.kafka import KafkaLog, open_kafka
from oncekeeper.log.kafka_codec import items, messages
from oncekeeper.log.port import Aside
from tests.support.kafka_broker import delete_topics, started, unique_prefix

PARTITIONS = 12
BODY = b'{"order_id": %d, "amount_cents": 500, "note": "' + b"x" * 60 + b'"}'


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def batches(count: int, size: int = 10_000) -> list[TaskBatch]:
    return [
        TaskBatch(
            queue="default",
            handler="shop.charge",
            ids=Ids(((start, size),)),
            bodies=tuple(BODY % n for n in range(start, start + size)),
            submitted_ms=1_750_000_000_000,
            submitted_by="host:1 bench",
        )
        for start in range(1, count + 1, size)
    ]


def bare_produce(bootstrap: str, topic: str, values: list[bytes]) -> None:
    """The loop that everybody writes: produce with a callback, poll now and then, flush."""
    producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 5})
    producer.list_topics(timeout=5)
    confirmed = 0

    def note(error: KafkaError | None, message: Message) -> None:
        nonlocal confirmed
        confirmed += error is None

    for n, value in enumerate(values):
        while True:
            try:
                producer.produce(topic, value, partition=n // 2000 % PARTITIONS, on_delivery=note)
                break
            except BufferError:
                producer.poll(0.01)
        if n % 1000 == 0:
            producer.poll(0)
    producer.flush()
    assert confirmed == len(values)


def bare_consume(bootstrap: str, topic: str, ends: dict[int, int]) -> dict[int, list[Message]]:
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "bench",
            "enable.auto.commit": False,
            "check.crcs": True,
            "fetch.queue.backoff.ms": 10,
        }
    )
    consumer.assign([TopicPartition(topic, partition, 0) for partition in ends])
    found: dict[int, list[Message]] = {partition: [] for partition in ends}
    left = sum(ends.values())
    while left:
        for record in consumer.consume(min(left, 500), 1.0):
            found[record.partition() or 0].append(record)
            left -= 1
    consumer.close()
    return found


def read_all(log: KafkaLog) -> None:
    for partition, end in log.ends().items():
        offset = 0
        while offset < end:
            offset = log.read(partition, offset, 4096, 1 << 24)[-1].end


def once(bootstrap: str, count: int) -> dict[str, float]:
    prefix = unique_prefix()
    log = open_kafka(f"kafka://{bootstrap}/{prefix}", create=True, partitions=PARTITIONS)
    given = batches(count)
    values = [value for batch in given for _, value in messages(batch)]
    topic = log.names.topic("bare")
    log.append([TaskBatch(queue="bare", handler="h", ids=Ids(((1, 1),)), bodies=(b"{}",))])
    figures = {"bare produce/s": count / timed(lambda: bare_produce(bootstrap, topic, values))}
    figures["append 10,000 at a time/s"] = count / timed(lambda: [log.append([batch]) for batch in given])
    figures["append all at once/s"] = count / timed(lambda: log.append(given))
    figures["encode only/s"] = count / timed(lambda: [list(messages(batch)) for batch in given])
    figures["append / bare"] = figures["append all at once/s"] / figures["bare produce/s"]
    singles = sorted(timed(lambda: log.append([given[0].part(0, 1)])) for _ in range(200))
    figures["append one, p50 ms"], figures["append one, p99 ms"] = singles[100] * 1e3, singles[197] * 1e3
    ends = {n: end for n, end in log.ends().items() if n < PARTITIONS}
    tasks = sum(ends.values())
    records: dict[int, list[Message]] = {}
    figures["bare consume/s"] = tasks / timed(
        lambda: records.update(bare_consume(bootstrap, log.names.default, ends))
    )
    figures["codec only/s"] = tasks / timed(lambda: [items(n, "t", n, found) for n, found in records.items()])
    figures["read/s"] = tasks / timed(lambda: read_all(log))
    figures["ends ms"] = timed(log.ends) * 1e3
    figures["committed ms"] = timed(log.committed) * 1e3
    figures["find, scanning all/s"] = tasks / timed(lambda: log.find(2**62))
    aside = [Aside("dead", n, values[n], "why", n) for n in range(1000)]
    figures["put aside/s"] = len(aside) / timed(lambda: log.put_aside(aside))
    figures["first look at what lies aside, ms"] = timed(lambda: log.aside("dead", 0, 100)) * 1e3
    figures["next look, ms"] = timed(lambda: log.aside("dead", 0, 100)) * 1e3
    log.close()
    delete_topics(bootstrap, prefix)
    return figures


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    with tempfile.TemporaryDirectory(prefix="oncekeeper-bench-") as name:
        kafka = None if len(sys.argv) > 2 else started(Path(name))
        bootstrap = sys.argv[2] if kafka is None else kafka.bootstrap()
        runs = [once(bootstrap, count) for _ in range(3)]
        if kafka is not None:
            kafka.kill()
    for figure in runs[0]:
        print(f"{figure:36} {statistics.median(run[figure] for run in runs):14,.2f}")


if __name__ == "__main__":
    main()
