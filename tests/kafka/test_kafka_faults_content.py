"""What stands in the topics is not what it should be: strangers' messages, deleted ones, positions set back.

RELIABILITY 31, 32, 38 and 39. The whole history is judged after each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Message, TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from dedup.ids import TaskId, id_text, keyed_id
from node.kafkaup.broker import Kafka
from tests.support.kafka_broker import ANSWER_S, admin, produce, stored
from tests.support.real_cluster import eventually
from tests.support.real_kafka import PARTITIONS, KafkaCluster, working_on

REWOUND = 20_000


@pytest.fixture(scope="module")
def cluster(kafka: Kafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    with working_on(kafka, tmp_path_factory.mktemp("content")) as running:
        yield running


def test_messages_of_other_clients_run_once_with_an_id_with_a_key_or_without(cluster: KafkaCluster) -> None:
    without = [task_id for partition in range(PARTITIONS) for task_id in cluster.produce(partition, 20)]
    with_key = keyed_id("default", "order-1")
    with_id = cluster.client.send("real.once", [b'{"name": "known"}'])
    again = [
        {"handler": "real.once", "body": {"name": "same"}, **named}
        for named in ({"key": "order-1"}, {"id": id_text(next(iter(with_id)))})
    ]
    for partition in range(PARTITIONS):
        produce(cluster.direct, cluster.topic, [json.dumps(each).encode() for each in again], partition)
    ids: list[TaskId] = [*without, with_key, *with_id]
    cluster.acknowledged(ids, "once")
    cluster.check()
    assert cluster.effects_of(ids) == [1] * len(ids)
    cluster.kill(*cluster.nodes)
    cluster.start()
    cluster.wait_up()
    cluster.check()
    assert cluster.effects_of(ids) == [1] * len(ids)


def test_what_cannot_be_decoded_or_has_no_handler_is_a_dead_letter_and_its_partition_goes_on(
    cluster: KafkaCluster,
) -> None:
    bad = [b"no JSON", b'{"handler": 5}', b'{"handler": "real.once", "body": {}, "version": 99}', b"\xff\xfe"]
    unknown = json.dumps({"handler": "real.nobody", "body": {"n": 1}}).encode()
    good = []
    at: list[int] = []
    for value in (*bad, unknown):
        good += cluster.produce(1, 5)
        at += [message.offset() or 0 for message in produce(cluster.direct, cluster.topic, [value], 1)]
    good += cluster.produce(1, 5)
    cluster.check()
    assert cluster.effects_of(good) == [1] * len(good)
    dead = {
        id_text(keyed_id("undecodable", f"1/{offset}")): raw for offset, raw in zip(at, bad, strict=False)
    }
    dead[id_text(keyed_id("kafka", f"{cluster.topic}/1/{at[-1]}"))] = unknown
    letters = dict(letter(record) for record in stored(cluster.direct, f"{cluster.prefix}.dead"))
    assert letters.keys() == dead.keys()
    for task_id, raw in dead.items():
        value, reason = letters[task_id]
        assert value == raw or json.loads(value)["body"] == {"n": 1}
        assert reason
    assert "'real.nobody' is not registered" in letters[[*dead][-1]][1]
    rows = cluster.cli("task", "list", "--state", "dead")["tasks"]
    assert {row["id"]: row["error"] for row in rows} == {
        task_id: reason for task_id, (_, reason) in letters.items()
    }


def letter(record: Message) -> tuple[str, tuple[bytes, str]]:
    """The id, the message, and the reason, as any client of the dead-letter topic finds them."""
    headers: dict[str, bytes] = dict(cast(Any, record.headers()))
    return headers["id"].decode(), (record.value() or b"", headers["reason"].decode())


def test_what_kafka_deleted_unread_is_an_alarm_and_its_partition_waits_for_a_persons_word(
    cluster: KafkaCluster,
) -> None:
    cluster.check()
    cluster.stop()
    lost = cluster.produce(2, 20)
    left = cluster.produce(2, 10)
    others = [task_id for partition in (0, 1, 3, 4, 5) for task_id in cluster.produce(partition, 10)]
    log = cluster.open_log()
    low = log.ends()[2] - len(left)
    position = log.committed()[2]
    log.close()
    assert position == low - len(lost)
    client = admin(cluster.direct)
    for deleted in client.delete_records([TopicPartition(cluster.topic, 2, low)]).values():
        deleted.result(ANSWER_S)
    cluster.start()
    cluster.wait_up()
    eventually("the others go on", lambda: all(cluster.effects_of(others)), 60)
    alarm = eventually(
        "the alarm",
        lambda: [note for notes in cluster.notes().values() for note in notes if "deleted" in note],
        60,
    )
    assert f"offsets {position} to {low - 1}" in alarm[0]
    assert "oncekeeper queue skip 2" in alarm[0]
    more = cluster.produce(2, 5)
    later = [task_id for partition in (0, 1, 3, 4, 5) for task_id in cluster.produce(partition, 10)]
    eventually("the others go on still", lambda: all(cluster.effects_of(later)), 60)
    status = cluster.status()
    assert status is not None
    assert not status["idle"]
    assert cluster.committed()[2] == position
    assert not any(cluster.effects_of([*left, *more])), "nothing is passed in silence"
    cluster.cli("queue", "skip", "2")
    for task_id in lost:
        del cluster.history.submitted[task_id]  # accepted
    cluster.check()
    assert cluster.effects_of([*left, *more, *others, *later]) == [1] * (15 + 100)
    assert not any("deleted" in note for notes in cluster.notes().values() for note in notes)


def test_positions_that_a_person_set_back_bring_nothing_back_and_cost_no_claim(cluster: KafkaCluster) -> None:
    sent = [cluster.submit("drift", count=2000) for _ in range(REWOUND // 2000)]
    cluster.check()
    effects, asked = cluster.sink.read(), cluster.asked()
    assert cluster.stop() == dict.fromkeys(cluster.nodes, 0)
    cluster.rewound()
    rewind(cluster)
    before = cluster.committed()
    log = cluster.open_log()
    assert sum(log.ends().values()) - sum(before.values()) >= REWOUND
    log.close()
    cluster.start()
    cluster.wait_up()
    cluster.check()
    assert cluster.sink.read() == effects
    new = cluster.asked() - asked
    assert not new, f"{sum(new.values())} claims"
    assert sum(map(len, sent)) == REWOUND


def rewind(cluster: KafkaCluster) -> None:
    """As `kafka-consumer-groups --reset-offsets --to-earliest` does."""
    client = admin(cluster.direct)
    earliest = {
        TopicPartition(cluster.topic, partition): OffsetSpec.earliest()  # type: ignore[no-untyped-call]
        for partition in range(PARTITIONS)
    }
    places = [
        TopicPartition(place.topic, place.partition, found.result(ANSWER_S).offset)
        for place, found in client.list_offsets(earliest).items()
    ]

    def reset() -> bool:
        asked = client.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(cluster.prefix, places)])
        found = asked[cluster.prefix].result(ANSWER_S).topic_partitions
        return all(place.error is None for place in found)

    eventually("the group is empty, and can be set back", reset, 60)
