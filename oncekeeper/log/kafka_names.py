"""What things are called on Kafka: addresses, topics, and the port's partition numbers.

- A log is ``kafka://HOST:PORT[,HOST:PORT…][/PREFIX]``; its topics are ``PREFIX.q.QUEUE``, ``PREFIX.dead``,
  ``PREFIX.suspect`` and ``PREFIX.cluster``, its consumer group is ``PREFIX``.
- A queue's name may hold a colon, a topic's may not: such a queue has the topic ``PREFIX.qe.QUEUE`` with ``-3a``
  for each colon and ``-2d`` for each hyphen. No two queues share a topic.
- The port numbers partitions. Those of the queue ``default`` are 0, 1, …; those of another queue have forty bits of
  its name's digest above their low twelve, and bit 52 set, so that they are the same in every process and exact in
  JSON. A number tells its queue only to one who has met it, so names are learned as topics are seen.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from oncekeeper.errors import LogUnusable

SCHEME = "kafka"
PREFIX_DEFAULT = "oncekeeper"
QUEUE_DEFAULT = "default"
PARTITIONS_MAX = 4096
TOPIC_CHARS_MAX = 249
PORT_DEFAULT = 9092

_SHIFT = 12
_OTHER = 1 << 40
_PREFIX = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_HOST = re.compile(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9]+)?\]")
_WAYS = f"{SCHEME}://HOST:PORT[,HOST:PORT...][/PREFIX]"


@dataclass(frozen=True)
class Address:
    servers: str
    """As librdkafka wants it: HOST:PORT[,HOST:PORT…]."""
    prefix: str

    def __str__(self) -> str:
        return f"{SCHEME}://{self.servers}/{self.prefix}"


def parse_url(url: str) -> Address:
    """The address that ``url`` names; LogUnusable says what is wrong with it, and never repeats a password."""
    scheme, found, rest = url.partition("://")
    if not found or scheme != SCHEME:
        raise LogUnusable(f"log={url.rpartition('@')[2]!r} must be {_WAYS}")
    servers, _, prefix = rest.partition("/")
    if "@" in rest:
        raise LogUnusable(
            f"log={SCHEME}://…@{rest.rpartition('@')[2]}: no user or password in the address: "
            "they belong into the settings file (sasl.username, sasl.password)"
        )
    prefix = prefix.rstrip("/") or PREFIX_DEFAULT
    for mark in "?#":
        if mark in rest:
            raise LogUnusable(f"log={url!r}: {mark!r} has no meaning here: it must be {_WAYS}")
    return Address(",".join(_server(part.strip(), url) for part in servers.split(",")), check_prefix(prefix))


def _server(text: str, url: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):  # [::1] has colons, and no port
        host, port = text, str(PORT_DEFAULT)
    if not _HOST.fullmatch(host):
        raise LogUnusable(f"log={url!r}: {text!r} must be HOST:PORT; the whole is {_WAYS}")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise LogUnusable(f"log={url!r}: the port of {text!r} must be from 1 to 65535")
    return f"{host}:{port}"


def check_prefix(prefix: str) -> str:
    if not _PREFIX.fullmatch(prefix) or len(prefix) > 40:
        raise LogUnusable(
            f"prefix={prefix!r} must have 1 to 40 letters, digits, '_', '-' and dots between them"
        )
    if {"q", "qe"} & set(prefix.split(".")[1:]):
        # The topics of the prefix "a.q" would be queues of the prefix "a".
        raise LogUnusable(f"prefix={prefix!r}: no part of it after a dot may be 'q' or 'qe'")
    return prefix


class Names:
    """Both ways between queues, topics and numbers. Learning is safe in any thread."""

    def __init__(self, prefix: str) -> None:
        self.prefix = self.group = check_prefix(prefix)
        self.dead = f"{prefix}.dead"
        self.suspect = f"{prefix}.suspect"
        self.cluster = f"{prefix}.cluster"
        self.delay = f"{prefix}.delay"
        self.default = f"{prefix}.q.{QUEUE_DEFAULT}"
        self._plain, self._escaped = f"{prefix}.q.", f"{prefix}.qe."
        self._bases = {self.default: 0}
        self._topics = {0: self.default}

    def topic(self, queue: str) -> str:
        """LogUnusable for a queue whose topic would have too long a name."""
        if ":" in queue:
            topic = self._escaped + queue.replace("-", "-2d").replace(":", "-3a")
        else:
            topic = self._plain + queue
        if len(topic) > TOPIC_CHARS_MAX:
            raise LogUnusable(
                f"queue {queue!r}: its topic {topic!r} would have {len(topic)} characters, "
                f"Kafka allows {TOPIC_CHARS_MAX}: give the queue a shorter name"
            )
        return topic

    def queue(self, topic: str) -> str:
        if topic.startswith(self._plain):
            return topic[len(self._plain) :]
        if topic.startswith(self._escaped):
            return topic[len(self._escaped) :].replace("-3a", ":").replace("-2d", "-")
        raise ValueError(f"{topic!r} is no topic of a queue of {self.prefix!r}")

    def is_queue_topic(self, topic: str) -> bool:
        return len(topic) > len(self._plain) and topic.startswith((self._plain, self._escaped))

    def number(self, topic: str | None, partition: int) -> int:
        """The port's number of a topic's partition."""
        base = self._bases.get(topic or "")
        return (self._learn(topic or "") if base is None else base) | partition

    def _learn(self, topic: str) -> int:
        digest = hashlib.blake2b(self.queue(topic).encode(), digest_size=5).digest()
        base = (int.from_bytes(digest, "big") | _OTHER) << _SHIFT
        if (known := self._topics.setdefault(base, topic)) != topic:
            raise LogUnusable(
                f"the queues of {known!r} and {topic!r} have one number: rename one of the two queues"
            )
        self._bases[topic] = base
        return base

    def place(self, number: int) -> tuple[str, int]:
        """(topic, partition); KeyError for a queue that nobody here has met."""
        base = number >> _SHIFT << _SHIFT
        return self._topics[base], number - base

    def shown(self, number: int) -> str:
        """For people."""
        try:
            topic, partition = self.place(number)
        except KeyError:
            return f"partition {number}"
        return f"{topic}/{partition}"
