"""One replica in this process, on a real disk: what a node does with it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from raft.journal import JournalRefused
from raft.replica import PAYLOAD_BYTES_MAX, Applied, Refused, Replica, ReplicaConfig, ReplicaStatus, Unknown
from tests.support.raft_cluster import free_ports
from tests.support.raft_machine import TallyMachine


def config(directory: Path, **changes: Any) -> ReplicaConfig:
    settings: dict[str, Any] = {
        "node_id": "n1",
        "cluster_id": "0" * 31 + "1",
        "secret": b"s" * 32,
        "listen": ("127.0.0.1", free_ports(1)[0]),
        "peers": {},
        "data_dir": directory,
    }
    return ReplicaConfig(**(settings | changes))


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))  # type: ignore[arg-type]


def test_a_restarted_replica_has_what_it_acknowledged(tmp_path: Path):
    async def scenario() -> None:
        first = Replica(config(tmp_path), TallyMachine())
        await first.start()
        assert await first.propose(b"x") == Applied(3, 1)
        assert await first.barrier()
        await first.stop()
        assert first.status().role == "stopped"
        assert await first.propose(b"y") == Refused("the replica is not running")
        seen: list[tuple[int, bytes, int]] = []
        machine = TallyMachine()
        second = Replica(config(tmp_path), machine, on_applied=lambda *applied: seen.append(applied))
        await second.start()
        assert await second.barrier()
        assert (machine.counts, seen) == ({b"x": 1}, [(3, b"x", 1)])
        await second.stop()

    run(scenario)


def test_a_machine_that_raises_stops_the_replica_and_its_reason_is_told(tmp_path: Path):
    async def scenario() -> None:
        machine, fatal, statuses = TallyMachine(), [], []
        machine.fail_on = b"poison"
        replica = Replica(config(tmp_path), machine, on_fatal=fatal.append, on_status=statuses.append)
        await replica.start()
        assert isinstance(await replica.propose(b"fine"), Applied)
        outcome = await replica.propose(b"poison")
        assert isinstance(outcome, Unknown)
        assert "the state machine failed on the entry at index 4" in outcome.reason
        assert [str(error) for error in fatal] == [replica.status().fatal]
        assert isinstance(await replica.propose(b"after"), Refused)
        assert await replica.barrier() is False
        last: ReplicaStatus = statuses[-1]
        assert last.role == "stopped"
        await replica.stop()

    run(scenario)


def test_a_listener_that_raises_stops_the_replica_too(tmp_path: Path):
    async def scenario() -> None:
        fatal: list[BaseException] = []

        def miss(index: int, payload: bytes, result: object) -> None:
            raise KeyError("bug")

        replica = Replica(config(tmp_path), TallyMachine(), on_applied=miss, on_fatal=fatal.append)
        await replica.start()
        replica.submit(b"x")
        while not fatal:
            await asyncio.sleep(0.005)
        assert isinstance(fatal[0], KeyError)

    run(scenario)


def test_a_payload_above_the_limit_is_refused_and_one_at_it_is_applied(tmp_path: Path):
    async def scenario() -> None:
        replica = Replica(config(tmp_path), TallyMachine())
        await replica.start()
        assert isinstance(await replica.propose(bytes(PAYLOAD_BYTES_MAX)), Applied)
        refused = await replica.propose(bytes(PAYLOAD_BYTES_MAX + 1))
        assert refused == Refused(
            f"payload of {PAYLOAD_BYTES_MAX + 1} bytes is above payload_bytes_max={PAYLOAD_BYTES_MAX}"
        )
        await replica.stop()

    run(scenario)


def test_without_a_leader_a_proposal_is_refused_at_its_deadline_and_surely_never_applied(tmp_path: Path):
    async def scenario() -> None:
        lonely = config(tmp_path, peers={"n2": ("127.0.0.1", free_ports(1)[0])})
        replica = Replica(lonely, TallyMachine())
        await replica.start()
        assert await replica.propose(b"x", timeout_ms=50) == Refused("no leader was reached in time")
        assert await replica.barrier(timeout_ms=30) is False
        status = replica.status()
        assert (status.has_quorum, status.leader, status.ready, status.last_index) == (False, None, False, 1)
        await replica.stop()

    run(scenario)


def test_a_taken_port_is_an_error_and_leaves_the_store_closed(tmp_path: Path):
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            replica = Replica(config(tmp_path, listen=taken.getsockname()), TallyMachine())
            with pytest.raises(OSError, match="address already in use"):
                await replica.start()
        again = Replica(config(tmp_path), TallyMachine())
        await again.start()
        assert isinstance(await again.propose(b"x"), Applied)
        await again.stop()

    run(scenario)


def test_the_store_of_another_cluster_is_refused(tmp_path: Path):
    async def scenario() -> None:
        first = Replica(config(tmp_path), TallyMachine())
        await first.start()
        await first.stop()
        with pytest.raises(JournalRefused):
            await Replica(config(tmp_path, cluster_id="f" * 32), TallyMachine()).start()

    run(scenario)


def test_an_abandoned_proposal_harms_nobody(tmp_path: Path):
    async def scenario() -> None:
        machine = TallyMachine()
        replica = Replica(config(tmp_path), machine)
        await replica.start()
        assert await replica.barrier()
        replica.submit(b"x").cancel()
        assert await replica.barrier()
        assert machine.counts == {b"x": 1}
        await replica.stop()

    run(scenario)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"role": "king"}, "role='king' must be 'voter' or 'observer'"),
        ({"peers": {"n1": ("127.0.0.1", 1)}}, "peers must not name the node itself"),
        ({"role": "observer"}, "an observer needs voters"),
        ({"peers": {"n2": ("h", 1)}, "observers": ("n2",)}, "a node is one of both"),
        ({"secret": b"short"}, "secret has 5 bytes"),
        ({"node_id": ""}, "must have 1 to 64 bytes"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str
):
    with pytest.raises(ValueError, match=rule):
        config(tmp_path, **changes)
