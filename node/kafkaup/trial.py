"""A task log for a trial (the demo, the bench): embedded, on a Kafka broker of its own, or on one that is there.

A broker of its own keeps its data in the trial's directory, can be killed and started again, and dies with the
trial. On one that is there a trial without a prefix takes one that nobody has, and deletes its topics in the end.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.config import ConfigError
from node.kafkaup.broker import Broker, BrokerEnded, Kafka
from oncekeeper.errors import LogUnusable
from oncekeeper.log.opening import plugin_of

EMBEDDED, KAFKA = "embedded", "kafka"
ANSWER_S = 30.0
GONE_S = 3.0  # then there is no broker to clean up
STARTS = 3


@dataclass(frozen=True, slots=True)
class Trial:
    url: str = EMBEDDED
    broker: Broker | None = None
    """The one that is the trial's own, to do with as it likes."""

    @property
    def is_kafka(self) -> bool:
        return self.url != EMBEDDED

    @property
    def log_settings(self) -> dict[str, Any]:
        """For ``node.cluster.create``."""
        return {"log": self.url} if self.is_kafka else {}


def check_log(log: str) -> None:
    """Raises ConfigError for what no trial can run on; opens nothing."""
    if log == EMBEDDED:
        return
    if log != KAFKA and not log.startswith(f"{KAFKA}://"):
        raise ConfigError(
            f"log={log!r} must be {EMBEDDED}, {KAFKA}, or kafka://HOST:PORT[,…][/PREFIX]", "log"
        )
    try:
        plugin_of(f"{KAFKA}:")  # a client that is not installed is said now
        if log != KAFKA:
            from oncekeeper.log.kafka_names import parse_url

            parse_url(log)
    except LogUnusable as error:
        raise ConfigError(str(error), "log") from error


@contextlib.contextmanager
def trial_log(log: str, home: Path, name: str) -> Iterator[Trial]:
    """``home``: where a broker of its own keeps its data; ``name``: what a prefix of its own begins with."""
    check_log(log)
    if log == EMBEDDED:
        yield Trial()
    elif log == KAFKA:
        kafka = _started(home)
        try:
            yield Trial(f"kafka://{kafka.bootstrap()}/{name}", kafka.brokers[1])
        finally:
            kafka.kill()
    elif "/" in log.removeprefix(f"{KAFKA}://").rstrip("/"):
        yield Trial(log)
    else:
        prefix = f"{name}-{secrets.token_hex(4)}"
        try:
            yield Trial(f"{log.rstrip('/')}/{prefix}")
        finally:
            _delete_topics(log, prefix)


def _started(home: Path) -> Kafka:
    for attempt in range(STARTS):
        kafka = Kafka.create(home / f"kafka{attempt or ''}")
        try:
            kafka.start()
        except BrokerEnded as error:
            # A port that was free when it was chosen was another's when Java came to it.
            if attempt == STARTS - 1 or "already in use" not in str(error):
                raise
        else:
            return kafka
    raise AssertionError("not reached")


def _delete_topics(log: str, prefix: str) -> None:
    """Best effort: the broker may be gone, and the prefix is nobody else's."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    from oncekeeper.log.kafka_names import parse_url
    from oncekeeper.log.kafka_settings import load

    with contextlib.suppress(KafkaException, LogUnusable):
        quiet = logging.Logger("node.kafkaup.trial", logging.CRITICAL)
        client = AdminClient(load().admin(parse_url(log).servers), logger=quiet)
        names = [topic for topic in client.list_topics(timeout=GONE_S).topics if topic.startswith(prefix)]
        for each in (client.delete_topics(names) if names else {}).values():
            each.result(ANSWER_S)
