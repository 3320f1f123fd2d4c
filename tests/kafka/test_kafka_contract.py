"""The suite of the port on Kafka: a real broker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from node.kafkaup.broker import Kafka
from oncekeeper.log.kafka import open_kafka
from oncekeeper.log.port import TaskLog

pytest.register_assert_rewrite("tests.support.log_suite")

from tests.support.log_suite import *  # noqa: E402, F403
from tests.support.log_suite import RealClock, Traits  # noqa: E402


@pytest.fixture
def clock() -> RealClock:
    return RealClock()


@pytest.fixture
def traits() -> Traits:
    return Traits(whole_rows=False, finds_committed=False, places_stay=False)


@pytest.fixture
def log(kafka: Kafka, prefix: str) -> Iterator[TaskLog]:
    log = open_kafka(f"kafka://{kafka.bootstrap()}/{prefix}", create=True, partitions=4)
    yield log
    log.close()
