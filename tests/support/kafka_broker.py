"""Real Kafka brokers for tests: one that a session shares, private ones to be killed, one behind a proxy.

A test folder gets the fixtures by importing them in its ``conftest.py``::

    from tests.support.kafka_broker import kafka, prefix, private_kafka, proxied_kafka

(each folder that does has a broker of its own).

Every broker is attached: it dies with the test process, however that ends. Tests share the broker, so each names
its topics and groups by its own ``prefix``.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from chaos.toxiproxy import Proxy, Toxiproxy
from node.certs import CertFiles, make_all
from node.kafkaup.broker import Broker, BrokerEnded, Kafka
from node.kafkaup.layout import PLAIN, PROXIED, TlsFiles

ROOT = Path(__file__).resolve().parents[2]
ANSWER_S = 60.0  # for what takes a moment, on a machine that is busy with other things


class Private(Protocol):
    def __call__(self, brokers: int = 1, **options: Any) -> Kafka: ...


# --- fixtures -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """The broker of this test session. Nobody may kill it."""
    with _directory() as directory:
        made = started(directory / "kafka")
        try:
            yield made
        finally:
            made.kill()


@pytest.fixture
def prefix(kafka: Kafka) -> Iterator[str]:
    """What the test's topics and groups start with; the topics are deleted after it."""
    made = unique_prefix()
    yield made
    delete_topics(kafka.bootstrap(), made)


@pytest.fixture
def private_kafka() -> Iterator[Private]:
    """``private_kafka(brokers=3, settings={…})`` starts brokers of this test alone (``started`` says more)."""
    with contextlib.ExitStack() as stack:

        def make(brokers: int = 1, **options: Any) -> Kafka:
            directory = stack.enter_context(_directory())
            made = started(directory / "kafka", brokers=brokers, **options)
            stack.callback(made.kill)
            return made

        yield make


@pytest.fixture
def proxied_kafka() -> Iterator[ProxiedKafka]:
    """A private broker and a Toxiproxy in front of one of its listeners."""
    with _directory() as directory, proxied(directory) as made:
        yield made


# --- starting -------------------------------------------------------------------------------------


def unique_prefix() -> str:
    return f"t-{uuid.uuid4().hex[:12]}"


def started(directory: Path, *, brokers: int = 1, **options: Any) -> Kafka:
    """Brokers on free ports in a new directory, ready. ``options`` are those of ``Kafka.create``.

    They die with this process; ``kill`` or ``stop`` ends them before.
    """
    for attempt in range(3):
        kafka = Kafka.create(directory / f"{attempt}", brokers=brokers, **options)
        try:
            kafka.start()
        except BrokerEnded as error:
            # A port that was free when it was chosen was another's when Java came to it.
            if attempt == 2 or "already in use" not in str(error):
                raise
        else:
            return kafka
    raise AssertionError("not reached")


@dataclass(frozen=True)
class ProxiedKafka:
    kafka: Kafka
    proxy: Proxy
    toxiproxy: Toxiproxy

    @property
    def broker(self) -> Broker:
        return self.kafka.brokers[1]

    @property
    def bootstrap(self) -> str:
        """By way of the proxy, also after the client has asked where the broker is."""
        return self.kafka.bootstrap(PROXIED)

    @property
    def direct(self) -> str:
        return self.kafka.bootstrap(PLAIN)


@contextlib.contextmanager
def proxied(directory: Path, **options: Any) -> Iterator[ProxiedKafka]:
    """``proxy.add``, ``proxy.enable`` and ``proxy.heal`` as chaos/toxiproxy.py has them."""
    listeners = [PROXIED, *options.pop("listeners", ())]
    found = subprocess.run([ROOT / "tools" / "get-toxiproxy"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    directory.mkdir(parents=True, exist_ok=True)
    toxiproxy = Toxiproxy(Path(found.stdout.strip()), directory / "toxiproxy.log")
    try:
        kafka = Kafka.create(directory / "kafka", listeners=listeners, **options)
        proxy = toxiproxy.proxy("kafka", f"127.0.0.1:{kafka.brokers[1].plan.ports[PROXIED]}")
        kafka.advertise(PROXIED, {1: int(proxy.listen.rpartition(":")[2])})
        kafka.start()
        try:
            yield ProxiedKafka(kafka, proxy, toxiproxy)
        finally:
            kafka.kill()
    finally:
        toxiproxy.close()


def tls_files(directory: Path) -> TlsFiles:
    """For ``Kafka.create(tls=…)``: a certificate for loopback; ``authority`` is clients' ``ssl.ca.location``."""
    files = CertFiles(directory)
    make_all(files, "c" * 32, {"n1": ()})
    both = directory / "broker.pem"
    both.write_text(files.key("n1").read_text("ascii") + files.certificate("n1").read_text("ascii"))
    both.chmod(0o600)
    return TlsFiles(str(both), str(files.authority))


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    # Not pytest's: those are kept for three sessions, and a broker's data can be large.
    made = Path(tempfile.mkdtemp(prefix="oncekeeper-kafka-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


# --- plain clients --------------------------------------------------------------------------------


def admin(bootstrap: str, **settings: Any) -> AdminClient:
    return AdminClient({"bootstrap.servers": bootstrap, **_dotted(settings)})


def create_topic(bootstrap: str, name: str, partitions: int = 1, **config: str) -> None:
    """``config`` with underscores for dots: ``cleanup_policy="compact"``. Replicated as the brokers' default."""
    client = admin(
        bootstrap
    )  # held until the answer is here: what asked and is collected takes the answer along
    client.create_topics([NewTopic(name, partitions, config=_dotted(config))])[name].result(ANSWER_S)


def topics(bootstrap: str, starting_with: str = "") -> list[str]:
    found = admin(bootstrap).list_topics(timeout=ANSWER_S).topics
    return sorted(name for name in found if name.startswith(starting_with))


def delete_topics(bootstrap: str, starting_with: str) -> None:
    if names := topics(bootstrap, starting_with):
        client = admin(bootstrap)
        for each in client.delete_topics(names).values():
            each.result(ANSWER_S)


def produce(
    bootstrap: str, topic: str, values: Iterable[bytes], partition: int = -1, **settings: Any
) -> list[Message]:
    """Store every value, each acknowledged by all replicas in sync; AssertionError if one was not."""
    delivered: list[Message] = []
    failed: list[str] = []

    def note(error: object, message: Message) -> None:
        if error is None:
            delivered.append(message)
        else:
            failed.append(str(error))

    given = {"enable.idempotence": True, "linger.ms": 2, "message.timeout.ms": int(ANSWER_S * 1000)}
    producer = Producer({"bootstrap.servers": bootstrap, **given, **_dotted(settings)})
    for value in values:
        while True:
            try:
                producer.produce(topic, value, partition=partition, on_delivery=note)
            except BufferError:
                producer.poll(0.1)
            else:
                break
    left = producer.flush(ANSWER_S + 5)
    assert not failed, failed[:3]
    assert left == 0, f"{left} are not acknowledged"
    return delivered


def stored(bootstrap: str, topic: str, **settings: Any) -> list[Message]:
    """All that a topic holds at this moment, in the order of partitions and offsets."""
    given = {"group.id": unique_prefix(), "enable.auto.commit": False, "enable.partition.eof": True,
             "fetch.wait.max.ms": 50}  # fmt: skip
    consumer = Consumer({"bootstrap.servers": bootstrap, **given, **_dotted(settings)})
    try:
        unread = set(consumer.list_topics(topic, timeout=ANSWER_S).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, each, OFFSET_BEGINNING) for each in unread])
        found: list[Message] = []
        deadline = time.monotonic() + ANSWER_S
        while unread:
            got = consumer.consume(1000, 0.05)  # it waits for all of the thousand, or the time
            if got:
                deadline = time.monotonic() + ANSWER_S
            assert time.monotonic() < deadline, f"{topic} says nothing; {sorted(unread)} are not at their end"
            for message in got:
                error = message.error()
                if error is None:
                    found.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    unread.discard(message.partition())
                else:
                    raise KafkaException(error)
        return sorted(found, key=lambda message: (message.partition() or 0, message.offset() or 0))
    finally:
        consumer.close()


def _dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "."): value for name, value in settings.items()}
