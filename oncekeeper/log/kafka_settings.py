"""librdkafka's settings: they pass through, but for those that would break what is promised here.

Three sources, each over the one before: the cluster's configuration (plain: anybody may read it, so it holds no
secrets), a properties file that only its owner may read, and the environment (``ONCEKEEPER_KAFKA_SASL_PASSWORD`` is
``sasl.password``). A secret appears in no text that this package writes: ``KafkaSettings.clean`` goes over what a
library says, ``shown`` and ``repr`` hide the values.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oncekeeper.errors import LogUnusable

FILE_VARIABLE = "ONCEKEEPER_KAFKA_PROPERTIES"
VARIABLE_PREFIX = "ONCEKEEPER_KAFKA_"
HIDDEN = "********"

_ENDS = "positions are committed when their tasks are settled, never by the client: a task could be lost"
_ONE_TRUTH = "the log itself decides this"
REFUSED: Mapping[str, str] = {
    "enable.auto.commit": _ENDS,
    "auto.commit.enable": _ENDS,
    "auto.commit.interval.ms": _ENDS,
    "enable.auto.offset.store": _ENDS,
    "offset.store.method": _ENDS,
    "auto.offset.reset": "a position out of range is an alarm; a reset would pass over tasks in silence",
    "group.id": "the consumer group is the prefix in the log's address",
    "group.instance.id": "a static member that starts again would be shut out by its former self",
    "group.protocol": "the protocol is found out from the broker",
    "transactional.id": "nodes of one name would shut each other out; the ledger makes tasks take effect once",
    "enable.idempotence": "it follows acks: on with all, off with 1",
    "enable.gapless.guarantee": _ONE_TRUTH,
    "message.timeout.ms": "send_timeout_ms says how long a send may take",
    "delivery.timeout.ms": "send_timeout_ms says how long a send may take",
    "delivery.report.only.error": "a send that is not confirmed would pass for stored",
    "enable.partition.eof": _ONE_TRUTH,
    "bootstrap.servers": "the brokers stand in the log's address",
    "metadata.broker.list": "the brokers stand in the log's address",
    "allow.auto.create.topics": "a topic that a broker makes by itself has the broker's retention",
    "plugin.library.paths": "no code is loaded by configuration",
    "interceptor.classes": "no code is loaded by configuration",
    "test.mock.num.brokers": "a simulated broker keeps nothing",
    "on_delivery": _ONE_TRUTH,
    "error_cb": _ONE_TRUTH,
}
_JAVA: Mapping[str, str] = {
    "sasl.jaas.config": "give sasl.username and sasl.password",
    "ssl.truststore.location": "give ssl.ca.location (a PEM file)",
    "ssl.truststore.password": "give ssl.ca.location (a PEM file)",
    "ssl.keystore.type": "give ssl.certificate.location and ssl.key.location (PEM files)",
}
_SECRETS = {
    "sasl.password",
    "ssl.key.password",
    "ssl.key.pem",
    "ssl.keystore.password",
    "sasl.oauthbearer.config",
    "sasl.oauthbearer.client.secret",
    "sasl.oauthbearer.assertion.private.key.pem",
    "sasl.oauthbearer.assertion.private.key.passphrase",
}
_SECRET_WORDS = ("password", "passphrase", "secret", "key.pem", "token")
_NO_SECRETS = {"sasl.oauthbearer.token.endpoint.url"}  # an address
_PRODUCER = (
    "acks",
    "request.required.acks",
    "request.timeout.ms",
    "linger.ms",
    "queue.buffering.",
    "batch.",
    "compression.",
    "retries",
    "message.send.max.retries",
    "retry.backoff.",
    "partitioner",
    "sticky.partitioning.",
)
_CONSUMER = (
    "fetch.",
    "queued.",
    "check.crcs",
    "isolation.level",
    "max.poll.interval.ms",
    "max.partition.fetch.bytes",
    "session.timeout.ms",
    "heartbeat.interval.ms",
    "partition.assignment.strategy",
    "group.",
)


def is_secret(name: str) -> bool:
    """A name that is not known here counts by its words: rather one too many."""
    return name in _SECRETS or (name not in _NO_SECRETS and any(word in name for word in _SECRET_WORDS))


def check_plain(values: Mapping[str, str]) -> None:
    """Refuse what has no place in a plain configuration: secrets, and what check refuses anyway."""
    for name in values:
        if is_secret(name):
            raise LogUnusable(
                f"kafka setting {name!r} is a secret: it belongs into the file that {FILE_VARIABLE} names, "
                f"or into {variable(name)}, not into the cluster's configuration"
            )
    check(values, "the configuration")


def check(values: Mapping[str, str], source: str) -> None:
    """LogUnusable for a setting that would break what the log promises, with the reason."""
    for name, value in values.items():
        if name in REFUSED:
            raise LogUnusable(f"{source}: kafka setting {name!r} cannot be set: {REFUSED[name]}")
        if name in _JAVA:
            raise LogUnusable(f"{source}: kafka setting {name!r} is one of Java's client: {_JAVA[name]}")
        shown = HIDDEN if is_secret(name) else value
        if name in ("acks", "request.required.acks") and value not in ("all", "-1", "1"):
            raise LogUnusable(
                f"{source}: kafka setting {name}={shown!r} must be 'all' or '1': "
                "with less a task counts as stored before any broker has it"
            )
        if name == "isolation.level" and value != "read_committed":
            raise LogUnusable(
                f"{source}: kafka setting {name}={shown!r} must be 'read_committed': "
                "tasks of a transaction that was rolled back would run"
            )


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return VARIABLE_PREFIX + name.replace(".", "_").upper()


class KafkaSettings:
    """What clients are made with. Its text forms hide secrets."""

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self._values = {name: str(value) for name, value in (values or {}).items()}
        check(self._values, "settings")

    def __repr__(self) -> str:
        return f"KafkaSettings({self.shown()})"

    def shown(self) -> dict[str, str]:
        """For ``config show``."""
        return {name: HIDDEN if is_secret(name) else value for name, value in sorted(self._values.items())}

    def clean(self, text: str) -> str:
        """``text`` without the secrets that stand in these settings."""
        for name, value in self._values.items():
            if is_secret(name) and value:
                text = text.replace(value, HIDDEN)
        return text

    @property
    def acks_all(self) -> bool:
        given = self._values.get("acks", self._values.get("request.required.acks", "all"))
        return given in ("all", "-1")

    def get(self, name: str) -> str | None:
        return self._values.get(name)

    def admin(self, servers: str) -> dict[str, Any]:
        return self._base(servers, (*_PRODUCER, *_CONSUMER))

    def producer(self, servers: str) -> dict[str, Any]:
        return self._base(servers, _CONSUMER)

    def consumer(self, servers: str) -> dict[str, Any]:
        """The caller adds group.id, and the settings that are refused here."""
        return {"check.crcs": "true", **self._base(servers, _PRODUCER)}

    def _base(self, servers: str, without: tuple[str, ...]) -> dict[str, Any]:
        # A client complains of each setting that is of another kind of client.
        given = {name: value for name, value in self._values.items() if not name.startswith(without)}
        return {
            "client.id": "oncekeeper",
            # Ends of what may take long without a word from the broker (librdkafka's own: 60 s, 10 s, 30 s).
            "socket.timeout.ms": "10000",
            "reconnect.backoff.max.ms": "1000",
            "socket.connection.setup.timeout.ms": "5000",
            "allow.auto.create.topics": "false",
            **given,
            "bootstrap.servers": servers,
        }


def load(
    plain: Mapping[str, str] | None = None,
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> KafkaSettings:
    """The settings of all three sources. ``file`` is used where the environment names none."""
    environ = os.environ if environ is None else environ
    plain = plain or {}
    check_plain(plain)
    values = dict(plain)
    if named := environ.get(FILE_VARIABLE) or file:
        values |= read_file(Path(named))
    for name, value in environ.items():
        if name.startswith(VARIABLE_PREFIX) and name != FILE_VARIABLE:
            setting = name.removeprefix(VARIABLE_PREFIX).lower().replace("_", ".")
            check({setting: value}, name)
            values[setting] = value
    return KafkaSettings(values)


def read_file(file: Path) -> dict[str, str]:
    """A properties file: ``name=value`` a line, ``#`` and ``!`` before comments.

    LogUnusable names the file, the line and the rule, and never what stands there: it may be half a password.
    """
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise LogUnusable(
                    f"{file}: mode {stat.S_IMODE(mode):04o} lets others read it: it must be 0600 (chmod 600 {file})"
                )
            lines = opened.read().decode().splitlines()
    except OSError as error:
        raise LogUnusable(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LogUnusable(f"{file}: it must be UTF-8 text") from error
    values: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.strip()) or text[0] in "#!":
            continue
        name, found, value = text.partition("=")
        name = name.strip()
        if not found or not name or " " in name:
            raise LogUnusable(f"{file}:{number}: a line must be NAME=VALUE, or a comment that begins with #")
        if name in values:
            raise LogUnusable(f"{file}:{number}: {name} stands here twice")
        values[name] = value.strip()
    check(values, str(file))
    return values
