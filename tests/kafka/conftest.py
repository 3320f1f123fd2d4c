"""Fixtures of every test on a real broker."""

from tests.support.kafka_broker import kafka, prefix, private_kafka, proxied_kafka

__all__ = ["kafka", "prefix", "private_kafka", "proxied_kafka"]
