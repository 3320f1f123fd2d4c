"""Fixtures of every test on a real broker."""

import pytest

from tests.support.kafka_broker import kafka, prefix, private_kafka, proxied_kafka
from tests.support.kafka_java import start_soon

__all__ = ["kafka", "prefix", "private_kafka", "proxied_kafka"]


@pytest.fixture(scope="session", autouse=True)
def _brokers_start_soon() -> None:
    start_soon()
