"""What is written down of brokers: ``kafka.json`` of their directory, and from it each broker's properties.

``kafka.json`` says who they are and where they listen, and is written once, last: a directory that has it is whole.
The properties are made from it anew at every start, so that a directory can be moved, or given another port.

The listener PLAIN is the brokers' own and the administrator's, without credentials; all listen on loopback alone.
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from node.cluster import ClusterError, free_ports, write_atomically

FILE = "kafka.json"
FORMAT = 1
PLAIN, CONTROLLER = "PLAIN", "CONTROLLER"
PROXIED, SASL, TLS, SASL_TLS = "PROXIED", "SASL", "TLS", "SASL_TLS"
PROTOCOLS = {
    PLAIN: "PLAINTEXT",
    CONTROLLER: "PLAINTEXT",
    PROXIED: "PLAINTEXT",
    SASL: "SASL_PLAINTEXT",
    TLS: "SSL",
    SASL_TLS: "SASL_SSL",
}
BROKERS = (1, 3)
# The least that brokers for trying out need, and sessions short enough to see a loss soon. A broker that was killed
# is refused by the controllers until its own former session has lapsed: that is most of what its restart takes.
SETTINGS = {
    "auto.create.topics.enable": "false",
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",
    "group.consumer.heartbeat.interval.ms": "500",
    "group.consumer.min.heartbeat.interval.ms": "500",
    "group.consumer.min.session.timeout.ms": "3000",
    "group.consumer.session.timeout.ms": "6000",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "log.cleaner.dedupe.buffer.size": "16777216",  # compaction in a small heap
    "offsets.topic.num.partitions": "4",
    "share.coordinator.state.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
}
REPLICATED = ("offsets.topic.replication.factor", "transaction.state.log.replication.factor",
              "share.coordinator.state.topic.replication.factor", "default.replication.factor")  # fmt: skip
IN_SYNC = ("transaction.state.log.min.isr", "share.coordinator.state.topic.min.isr", "min.insync.replicas")


class KafkaError(ClusterError):
    """The brokers cannot be used as asked; the message says why and what to do."""


class TlsFiles(msgspec.Struct, frozen=True):
    """PEM files: the broker's private key and certificates in one, and whom it trusts."""

    key_and_certificates: str
    authority: str


class BrokerPlan(msgspec.Struct, frozen=True):
    directory_id: str
    ports: dict[str, int]
    advertised: dict[str, int] = {}
    """Where clients of a listener are sent instead of its own port: to a proxy in front of it."""


class Plan(msgspec.Struct, frozen=True):
    """``kafka.json``."""

    format: int
    cluster_id: str
    brokers: dict[int, BrokerPlan]
    users: dict[str, str] = {}
    settings: dict[str, str] = {}
    tls: TlsFiles | None = None


def kafka_uuid() -> str:
    """As Kafka writes them: base64 for URLs, without padding, and never like an option of a command."""
    while True:
        made = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not made.startswith("-"):
            return made


def make_plan(
    brokers: int,
    port: int,
    listeners: Iterable[str],
    users: Mapping[str, str],
    settings: Mapping[str, str],
    tls: TlsFiles | None,
) -> Plan:
    """``port`` is the first broker's, the next ones follow; 0: free ones. All others are free ones."""
    if brokers not in BROKERS:
        raise KafkaError(f"brokers={brokers} must be {' or '.join(map(str, BROKERS))}")
    names = [PLAIN, CONTROLLER, *listeners]
    free = iter(free_ports(brokers * len(names)))
    plans = {}
    for number in range(1, brokers + 1):
        ports = {name: next(free) for name in names}
        plans[number] = BrokerPlan(kafka_uuid(), ports)
    plan = Plan(FORMAT, kafka_uuid(), plans, dict(users), dict(settings), tls)
    return with_port(plan, port) if port else plan


def with_port(plan: Plan, port: int) -> Plan:
    """Another port for clients. The controllers keep theirs: it stands in what they replicate."""
    if not 1 <= port <= 65_535 - len(plan.brokers) + 1:
        raise KafkaError(f"port={port} must be from 1 to {65_535 - len(plan.brokers) + 1}")
    brokers = {
        number: msgspec.structs.replace(each, ports=each.ports | {PLAIN: port + number - 1})
        for number, each in plan.brokers.items()
    }
    return msgspec.structs.replace(plan, brokers=brokers)


def write_plan(directory: Path, plan: Plan) -> None:
    write_atomically(directory / FILE, msgspec.json.format(msgspec.json.encode(plan)).decode() + "\n", 0o600)


def read_plan(directory: Path) -> Plan:
    path = directory / FILE
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=Plan)
    except (FileNotFoundError, NotADirectoryError):
        raise KafkaError(
            f"{directory}: holds no Kafka brokers (no {FILE}); make them with: "
            f"oncekeeper kafka up --dir {directory}"
        ) from None
    except (OSError, msgspec.DecodeError) as error:
        raise KafkaError(f"{path}: cannot be read: {error}") from error
    if plan.format != FORMAT:
        raise KafkaError(f"{path}: format={plan.format}, and this version of Oncekeeper reads {FORMAT}")
    if len(plan.brokers) not in BROKERS or any(
        not {PLAIN, CONTROLLER} <= set(each.ports) <= set(PROTOCOLS) for each in plan.brokers.values()
    ):
        raise KafkaError(f"{path}: does not say where {' or '.join(map(str, BROKERS))} brokers listen")
    return plan


def properties(plan: Plan, number: int, data: Path) -> str:
    """The broker's ``server.properties``."""
    own = plan.brokers[number]
    controllers = [f"127.0.0.1:{each.ports[CONTROLLER]}" for each in plan.brokers.values()]
    replicas = len(plan.brokers)
    values = {
        "process.roles": "broker,controller",
        "node.id": str(number),
        "log.dirs": str(data),
        "controller.quorum.bootstrap.servers": ",".join(controllers),
        "controller.listener.names": CONTROLLER,
        "inter.broker.listener.name": PLAIN,
        "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in own.ports.items()),
        "advertised.listeners": ",".join(
            f"{name}://127.0.0.1:{own.advertised.get(name, port)}" for name, port in own.ports.items()
        ),
        "listener.security.protocol.map": ",".join(f"{name}:{PROTOCOLS[name]}" for name in own.ports),
        **dict.fromkeys(REPLICATED, str(replicas)),
        **dict.fromkeys(IN_SYNC, str(replicas // 2 + 1)),
        **SETTINGS,
        **_credentials(plan, own),
        **plan.settings,
    }
    return "".join(f"{key}={_escaped(value)}\n" for key, value in values.items())


def _credentials(plan: Plan, own: BrokerPlan) -> dict[str, str]:
    values = {}
    if plan.users:
        login = "org.apache.kafka.common.security.plain.PlainLoginModule required"
        users = " ".join(f"user_{name}={_quoted(word)}" for name, word in plan.users.items())
        for name in own.ports:
            if PROTOCOLS[name].startswith("SASL"):
                listener = f"listener.name.{name.lower()}"
                values[f"{listener}.sasl.enabled.mechanisms"] = "PLAIN"
                values[f"{listener}.plain.sasl.jaas.config"] = f"{login} {users};"
        # Who comes by PLAIN may do all, and users what no ACL speaks of: a test forbids what it wants forbidden.
        values["authorizer.class.name"] = "org.apache.kafka.metadata.authorizer.StandardAuthorizer"
        values["allow.everyone.if.no.acl.found"] = "true"
        values["super.users"] = "User:ANONYMOUS"
    if plan.tls is not None:
        for name in own.ports:
            if PROTOCOLS[name].endswith("SSL"):
                listener = f"listener.name.{name.lower()}"
                values[f"{listener}.ssl.keystore.type"] = "PEM"
                values[f"{listener}.ssl.keystore.location"] = plan.tls.key_and_certificates
                values[f"{listener}.ssl.truststore.type"] = "PEM"
                values[f"{listener}.ssl.truststore.location"] = plan.tls.authority
    return values


def _quoted(word: str) -> str:
    """As a value of a JAAS configuration."""
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _escaped(value: str) -> str:
    """As java.util.Properties reads it: Latin letters, and UTF-16 for all else."""
    units = value.encode("utf-16-be")
    codes = [int.from_bytes(units[at : at + 2]) for at in range(0, len(units), 2)]
    return "".join(chr(code) if 0x20 <= code < 0x7F and code != 0x5C else f"\\u{code:04x}" for code in codes)
