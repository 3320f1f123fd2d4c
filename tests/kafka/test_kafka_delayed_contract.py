"""The suite of stores of delayed tasks on Kafka: a real broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from node.kafkaup.broker import Kafka
from oncekeeper.log.kafka import KafkaLog

pytest.register_assert_rewrite("tests.support.delayed_suite")

from tests.support.delayed_suite import *  # noqa: E402, F403
from tests.support.delayed_suite import Clock  # noqa: E402
from tests.support.kafka_delayed import opened  # noqa: E402


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def copies() -> bool:
    return True


@pytest.fixture
def log(kafka: Kafka, prefix: str, tmp_path: Path) -> Iterator[KafkaLog]:
    with opened(f"kafka://{kafka.bootstrap()}/{prefix}", tmp_path / "delays.db", partitions=4) as log:
        yield log
