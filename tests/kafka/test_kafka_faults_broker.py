"""The broker killed, unreachable, or heard and not answering, under load; each whole history is judged.

RELIABILITY 27 to 29. The cluster and its clients reach the broker by a proxy; who looks at the log does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from chaos.toxiproxy import DOWN, UP
from dedup.ids import keyed_id
from node.cli.output import CliError
from oncekeeper.client import Client
from oncekeeper.errors import ClusterUnreachable, SubmitFailed, UnknownSubmit
from tests.support.kafka_broker import ProxiedKafka, proxied
from tests.support.real_cluster import eventually
from tests.support.real_kafka import GROUP_SESSION, KafkaCluster, Load, working

UNREACHABLE_S = 20.0
# A send is given up after 10 s; a question to the log after 5 to 8. What would take librdkafka by itself 45 s and
# more must not, on the slowest machine either.
ANSWER_S = 35.0
LOCAL_ANSWER_S = 15.0  # of a node that is asked of itself alone


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxiedKafka]:
    with proxied(tmp_path_factory.mktemp("broker"), settings=GROUP_SESSION) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(broker: ProxiedKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with working(folder, broker.bootstrap, direct=broker.direct) as running:
        yield running


def test_a_broker_that_is_killed_and_started_again_under_load_costs_no_task(
    cluster: KafkaCluster, broker: ProxiedKafka
) -> None:
    with Load(cluster) as load:
        cluster.progress(200)
        broker.broker.kill()
        eventually("submitters notice", lambda: load.told, 60)
        broker.broker.start()
        cluster.progress(200)
    cluster.judge(load)
    assert all(seconds < ANSWER_S for _, seconds in load.told), load.told


@contextmanager
def silence(broker: ProxiedKafka, *directions: str) -> Iterator[None]:
    """Connections stand, and nothing comes through."""
    for direction in directions:
        broker.proxy.add(f"silent-{direction}", "timeout", direction, {"timeout": 0})
    try:
        yield
    finally:
        broker.proxy.heal()


def test_while_the_broker_is_unreachable_everything_says_so_soon_and_afterwards_all_goes_on(
    cluster: KafkaCluster, broker: ProxiedKafka
) -> None:
    slowest: dict[str, float] = {}
    with Load(cluster) as load:
        cluster.progress(200)
        with silence(broker, UP, DOWN):
            until = time.monotonic() + UNREACHABLE_S
            leader = cluster.leader()
            cluster.kill(leader)
            assert cluster.leader() != leader, "elections need no broker"
            cluster.start(leader)
            cluster.wait_up()  # a node without a log votes, leads, and has a session
            submit_by_http(cluster, slowest)
            while not slowest.keys() >= ASKED.keys() or time.monotonic() < until:
                for node in cluster.nodes:
                    ask_all(cluster, node, slowest)
            eventually("it is told what is wrong", lambda: any(cluster.notes().values()), 60)
            eventually("submitters are told", lambda: load.told, 60)
        cluster.progress(200)
    print({what: f"{seconds:.1f} s" for what, seconds in slowest.items()}, len(load.told))
    cluster.judge(load)
    assert all(isinstance(error, (SubmitFailed, UnknownSubmit)) for error, _ in load.told), load.told
    assert all(seconds < ANSWER_S for _, seconds in load.told), load.told
    assert max(slowest.values()) < ANSWER_S, slowest
    local = {what: seconds for what, seconds in slowest.items() if what in LOCAL}
    assert max(local.values()) < LOCAL_ANSWER_S, local
    eventually("nothing is wrong any more", lambda: not any(cluster.notes().values()), 60)


LOCAL = {"health": "/v1/health", "node": "/v1/node", "local status": "/v1/status?local=1"}
ASKED = LOCAL | {"nodes": "/v1/nodes", "status": "/v1/status", "handlers": "/v1/handlers"}


def submit_by_http(cluster: KafkaCluster, slowest: dict[str, float]) -> None:
    """A node that cannot store says so, and whether it knows that nothing was stored."""
    key = "sent-while-the-broker-was-away"
    cluster.history.submit([keyed_id("default", key)], "check", acknowledged=False)
    node = msgspec.structs.replace(cluster.client.cluster, urls=cluster.client.cluster.urls[:1])
    message = {"handler": "real.once", "body": {"name": key}, "key": key}
    began = time.monotonic()
    with Client(node) as client, pytest.raises(ClusterUnreachable, match="kafka://"):
        client.request("POST", "/v1/tasks", json=message, timeout_s=2 * ANSWER_S)
    slowest["submit by HTTP"] = time.monotonic() - began


def ask_all(cluster: KafkaCluster, node: str, slowest: dict[str, float]) -> None:
    """Every question is answered, or refused with what is wrong."""
    for what, path in ASKED.items():
        began = time.monotonic()
        try:
            cluster.api(node).get(path)
        except CliError as error:
            if what in LOCAL:
                raise AssertionError(f"{what}: {error}") from error
        slowest[what] = max(slowest.get(what, 0.0), time.monotonic() - began)


def test_what_was_stored_and_not_acknowledged_is_sent_again_and_runs_once(
    cluster: KafkaCluster, broker: ProxiedKafka
) -> None:
    with Load(cluster) as load:
        cluster.progress(100)
        with silence(broker, DOWN):
            eventually(
                "a submit ends unknown",
                lambda: any(isinstance(error, UnknownSubmit) for error, _ in load.told),
                60,
            )
        cluster.progress(100)
    cluster.judge(load)
    unknown = [error.ids for error, _ in load.told if isinstance(error, UnknownSubmit)]
    places: dict[object, int] = {}
    for placed in cluster.history.placed:
        places[placed.id] = places.get(placed.id, 0) + 1
    twice = [task_id for ids in unknown for task_id in ids if places[task_id] > 1]  # type: ignore[attr-defined]
    assert twice, "the broker had stored what it could not acknowledge"
    assert cluster.effects_of(twice) == [1] * len(twice)
