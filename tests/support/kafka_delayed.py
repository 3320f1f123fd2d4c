"""Logs on Kafka that keep delayed tasks, each with an index of its own as a node has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oncekeeper.errors import LogUnusable
from oncekeeper.log.kafka import KafkaLog, open_kafka
from oncekeeper.log.kafka_delay_follow import Follower
from oncekeeper.log.kafka_names import Names, parse_url
from oncekeeper.log.kafka_settings import KafkaSettings
from tests.support.kafka_broker import ANSWER_S
from tests.support.real_cluster import eventually


def follower(url: str, file: Path) -> Follower:
    address = parse_url(url)
    made = Follower(address, KafkaSettings(), Names(address.prefix), "c" * 32, file)
    made.start()
    return made


def is_current(following: Follower) -> bool:
    try:
        following.check_current()
    except LogUnusable:
        return False
    return True


@contextmanager
def opened(url: str, file: Path, partitions: int | None = None) -> Iterator[KafkaLog]:
    log = open_kafka(url, create=True, partitions=partitions)
    following = follower(url, file)
    log.keep_delayed(following)
    eventually("the index is current", lambda: is_current(following), ANSWER_S)
    try:
        yield log
    finally:
        log.close()
        following.close()
