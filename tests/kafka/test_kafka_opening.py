"""Opening a log on Kafka: what is there is as it must be, or the error names it and says what is wrong."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    ConfigResource,
    ResourcePatternType,
    ResourceType,
)

from dedup.ids import Ids
from node.kafkaup.broker import Kafka
from node.kafkaup.layout import SASL, SASL_TLS, TLS
from oncekeeper.envelope import TaskBatch
from oncekeeper.errors import LogUnusable
from oncekeeper.log.kafka import open_kafka
from oncekeeper.log.port import Unsent
from tests.support.kafka_broker import admin, create_topic, produce, started, stored, tls_files, topics

ANSWERED_WITHIN_S = 30.0  # on a busy machine; what librdkafka would take by itself is minutes


def url(kafka: Kafka, prefix: str, listener: str = "PLAIN") -> str:
    return f"kafka://{kafka.bootstrap(listener)}/{prefix}"


def task(number: int = 1, queue: str = "default") -> TaskBatch:
    return TaskBatch(queue=queue, handler="h", ids=Ids(((number, 1),)), bodies=(b"{}",))


# --- topics -----------------------------------------------------------------------------------------------------


def test_topics_are_made_as_the_log_needs_them(kafka: Kafka, prefix: str) -> None:
    open_kafka(url(kafka, prefix), create=True, partitions=3, cluster_id="a" * 32).close()
    assert topics(kafka.bootstrap(), prefix) == [
        f"{prefix}.cluster",
        f"{prefix}.dead",
        f"{prefix}.delay",
        f"{prefix}.q.default",
        f"{prefix}.suspect",
    ]
    found = {}
    for name in ("q.default", "dead"):
        resource = ConfigResource(ConfigResource.Type.TOPIC, f"{prefix}.{name}")
        client = admin(kafka.bootstrap())  # a client that is let go of lets go of its answers
        config = client.describe_configs([resource])[resource].result(30)
        found[name] = config["cleanup.policy"].value, config["retention.ms"].value
    assert found["q.default"] == ("delete", "-1"), "Kafka deletes no task by itself"
    assert found["dead"][0] == "compact"
    log = open_kafka(url(kafka, prefix), cluster_id="a" * 32)
    assert log.partitions == 3
    log.close()


def test_a_log_that_is_not_there_is_not_made_unasked(kafka: Kafka, prefix: str) -> None:
    with pytest.raises(
        LogUnusable, match=rf"topic {prefix}\.q\.default: does not exist; `oncekeeper cluster up`"
    ):
        open_kafka(url(kafka, prefix))
    assert topics(kafka.bootstrap(), prefix) == []


def test_a_second_cluster_is_refused_and_the_first_is_not_disturbed(kafka: Kafka, prefix: str) -> None:
    open_kafka(url(kafka, prefix), create=True, partitions=1, cluster_id="a" * 32).close()
    for _ in range(2):
        with pytest.raises(LogUnusable, match=f"belongs to cluster {'a' * 32}, not to {'b' * 32}"):
            open_kafka(url(kafka, prefix), create=True, cluster_id="b" * 32)
    open_kafka(url(kafka, prefix), cluster_id="a" * 32).close()
    # Two that came at once both wrote: the first counts, and what compaction would leave is made the first's.
    produce(kafka.bootstrap(), f"{prefix}.cluster", [], partition=0)
    producer = Producer({"bootstrap.servers": kafka.bootstrap()})
    producer.produce(f"{prefix}.cluster", b"b" * 32, key=b"cluster_id", partition=0)
    assert producer.flush(30) == 0
    with pytest.raises(LogUnusable, match="belongs to cluster aaa"):
        open_kafka(url(kafka, prefix), create=True, cluster_id="b" * 32)
    assert stored(kafka.bootstrap(), f"{prefix}.cluster")[-1].value() == b"a" * 32


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"cleanup_policy": "compact"}, "cleanup.policy=compact must be 'delete'"),
        ({"cleanup_policy": "compact,delete"}, "cleanup.policy=compact,delete must be 'delete'"),
        (
            {"retention_ms": "3600000"},
            "retention.ms=3600000 must be -1 (nodes delete what is done), or 604800000",
        ),
        ({"retention_bytes": "1000000"}, "retention.bytes=1000000 must be -1"),
        ({"partitions": 2}, "partitions=2 must be 3 at least"),
    ],
)
def test_a_task_topic_that_would_lose_tasks_is_refused_by_its_setting(
    kafka: Kafka, prefix: str, config: dict[str, str], said: str
) -> None:
    name = f"{prefix}.q.default"
    create_topic(kafka.bootstrap(), name, **{"partitions": 3, **config})
    with pytest.raises(LogUnusable, match=re.escape(f"topic {name}: {said}")):
        open_kafka(url(kafka, prefix), create=True, partitions=3)


def test_a_task_topic_with_kafkas_own_retention_will_do(kafka: Kafka, prefix: str) -> None:
    create_topic(kafka.bootstrap(), f"{prefix}.q.default", 5)
    log = open_kafka(url(kafka, prefix), create=True, partitions=3)
    assert log.partitions == 5
    log.close()
    with pytest.raises(LogUnusable, match=r"retention\.ms=604800000 must be -1"):
        open_kafka(url(kafka, prefix), retention_ms_min=604_800_001)


def test_an_aside_topic_that_would_forget_is_refused(kafka: Kafka, prefix: str) -> None:
    create_topic(kafka.bootstrap(), f"{prefix}.dead", cleanup_policy="delete")
    with pytest.raises(LogUnusable, match=rf"topic {prefix}\.dead: cleanup\.policy=delete must be 'compact'"):
        open_kafka(url(kafka, prefix), create=True)


def test_more_replicas_than_there_are_brokers_is_an_error_that_says_so(kafka: Kafka, prefix: str) -> None:
    with pytest.raises(LogUnusable, match="replication=3"):
        open_kafka(url(kafka, prefix), create=True, replication=3)
    open_kafka(url(kafka, prefix), create=True, replication=1).close()
    with pytest.raises(LogUnusable, match="replication=1 must be 2 at least"):
        open_kafka(url(kafka, prefix), replication=2)


def test_a_new_queue_gets_its_topic_when_it_is_first_used(kafka: Kafka, prefix: str) -> None:
    log = open_kafka(url(kafka, prefix), create=True, partitions=3)
    (appended,) = log.append([task(queue="mail:eu")])
    assert f"{prefix}.qe.mail-3aeu" in topics(kafka.bootstrap(), prefix)
    assert set(log.ends()) == {0, 1, 2} | {appended.partition // 4096 * 4096 + n for n in range(3)}
    (fetched,) = log.read(appended.partition, 0, 10, 1000)
    assert fetched.batch.queue == "mail:eu"  # type: ignore[union-attr]
    other = open_kafka(url(kafka, prefix))
    assert other.read(appended.partition, 0, 10, 1000) == [fetched], "one that never met the queue finds it"
    for each in (log, other):
        each.close()


@pytest.mark.parametrize("name", ["compression.typo", "client.typo", "compression.codec", "batch.size"])
def test_a_setting_that_librdkafka_does_not_take_is_named(kafka: Kafka, prefix: str, name: str) -> None:
    def open_and_append() -> None:
        log = open_kafka(url(kafka, prefix), create=True, partitions=1, settings={name: "x"})
        log.append([task()])

    with pytest.raises((LogUnusable, Unsent), match=re.escape(name)):
        open_and_append()


# --- brokers ----------------------------------------------------------------------------------------------------


def soon(url: str, **options: object) -> str:
    """What the error says; it came within a few seconds."""
    start = time.monotonic()
    with pytest.raises(LogUnusable) as caught:
        open_kafka(url, create=True, **options)  # type: ignore[arg-type]
    assert time.monotonic() - start < ANSWERED_WITHIN_S
    return str(caught.value)


@pytest.fixture
def soon_tired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oncekeeper.log.kafka_admin.CONNECT_S", 1.0)


@pytest.mark.usefixtures("soon_tired")
def test_no_broker_is_told_as_what_it_is() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        port = taken.getsockname()[1]
        said = soon(f"kafka://127.0.0.1:{port}/x")
    assert f"kafka://127.0.0.1:{port}/x: no broker answers within 1 s" in said
    assert "Connection refused" in said


@pytest.mark.usefixtures("soon_tired")
def test_a_name_that_does_not_exist_is_told_as_what_it_is() -> None:
    assert "resolve 'no.such.host.invalid:9092'" in soon("kafka://no.such.host.invalid:9092")


@pytest.mark.usefixtures("soon_tired")
def test_a_server_that_is_no_broker_or_says_nothing_is_told_as_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        said = soon(f"kafka://127.0.0.1:{server.getsockname()[1]}")
    assert "no broker answers within 1 s" in said


def test_a_broker_below_2_4_is_refused() -> None:
    # librdkafka's simulated broker knows few requests, and none that came with 2.4 for administrators.
    simulated = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "x"})
    bootstrap = next(iter(simulated.list_topics(timeout=30).brokers.values()))
    assert "the broker is older than Kafka 2.4" in soon(f"kafka://{bootstrap.host}:{bootstrap.port}")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kafka, Path]]:
    directory = tmp_path_factory.mktemp("guarded")
    files = tls_files(directory)
    users = {"shop": "hunter2", "guest": "hunter3"}
    kafka = started(directory / "kafka", listeners=[SASL, TLS, SASL_TLS], users=users, tls=files)
    yield kafka, Path(files.authority)
    kafka.kill()


def login(user: str, password: str, protocol: str = "SASL_PLAINTEXT") -> dict[str, str]:
    return {
        "security.protocol": protocol,
        "sasl.mechanisms": "PLAIN",
        "sasl.username": user,
        "sasl.password": password,
    }


def test_sasl_and_tls_pass_through(guarded: tuple[Kafka, Path]) -> None:
    kafka, authority = guarded
    settings = login("shop", "hunter2", "SASL_SSL") | {"ssl.ca.location": str(authority)}
    log = open_kafka(url(kafka, "tls", SASL_TLS), create=True, partitions=2, settings=settings)
    (appended,) = log.append([task()])
    assert log.read(appended.partition, 0, 10, 1000)[0].base == 0
    assert "hunter2" not in repr(settings) or "hunter2" not in repr(log)
    log.close()


def test_wrong_credentials_are_told_at_once_and_not_repeated(guarded: tuple[Kafka, Path]) -> None:
    kafka, _ = guarded
    said = soon(url(kafka, "x", SASL), settings=login("shop", "hunter9"))
    assert "the broker refuses these credentials" in said
    assert "Authentication failed" in said
    assert "hunter9" not in said


def test_a_certificate_that_is_not_trusted_is_told_as_what_it_is(guarded: tuple[Kafka, Path]) -> None:
    kafka, _ = guarded
    assert "SSL" in soon(url(kafka, "x", TLS), settings={"security.protocol": "ssl"})


def permit(kafka: Kafka, topic: str, *operations: AclOperation) -> None:
    """These, and nothing else."""
    acls = [
        AclBinding(
            ResourceType.TOPIC,
            topic,
            ResourcePatternType.LITERAL,
            "User:guest",
            "*",
            operation,
            AclPermissionType.ALLOW,
        )
        for operation in operations
    ]
    client = admin(kafka.bootstrap())
    for future in client.create_acls(acls).values():
        future.result(30)


def test_a_topic_without_permission_is_named_with_what_is_lacking(guarded: tuple[Kafka, Path]) -> None:
    kafka, _ = guarded
    open_kafka(url(kafka, "acl"), create=True, partitions=1).close()
    permit(kafka, "acl.q.default", AclOperation.READ)
    said = soon(url(kafka, "acl", SASL), settings=login("guest", "hunter3"))
    assert "topic acl.q.default: no permission to WRITE (allowed are:" in said
    permit(kafka, "acl.q.default", AclOperation.WRITE)
    permit(kafka, "acl.dead", AclOperation.CREATE)
    said = soon(url(kafka, "acl", SASL), settings=login("guest", "hunter3"))
    assert "topic acl.dead: no permission: " in said


def test_a_permission_that_is_withdrawn_later_makes_a_clear_unsent(guarded: tuple[Kafka, Path]) -> None:
    kafka, _ = guarded
    open_kafka(url(kafka, "late"), create=True, partitions=1).close()
    log = open_kafka(url(kafka, "late", SASL), settings=login("guest", "hunter3"))
    log.append([task(1)])
    permit(kafka, "late.q.default", AclOperation.READ)
    with pytest.raises(Unsent, match="Topic authorization failed"):
        log.append([task(2)])
    log.close()
    assert len(stored(kafka.bootstrap(), "late.q.default")) == 1


def test_handles_may_be_opened_at_once(kafka: Kafka, prefix: str) -> None:
    failures: list[BaseException] = []

    def open_one() -> None:
        try:
            open_kafka(url(kafka, prefix), create=True, partitions=2, cluster_id="a" * 32).close()
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
