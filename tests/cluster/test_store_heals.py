"""A damaged store is never believed: the replica comes back without a vote, and learns anew from its peers."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from raft.journal import JournalDamaged
from raft.replica import Applied, Replica, ReplicaConfig
from raft.store import open_store

CLUSTER = secrets.token_hex(16)
SECRET = secrets.token_bytes(32)


class Words:
    """A state machine that remembers what it was told, in order."""

    def __init__(self) -> None:
        self.words: list[bytes] = []

    def apply(self, index: int, payload: bytes) -> int:
        self.words.append(payload)
        return index

    def snapshot(self) -> bytes:
        return b"\n".join(self.words)

    def restore(self, data: bytes) -> None:
        self.words = data.split(b"\n") if data else []


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, ReplicaConfig]:
    with ExitStack() as stack:
        ports = {}
        for name in ("n1", "n2", "n3"):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            ports[name] = listener.getsockname()[1]
    return {
        name: ReplicaConfig(
            node_id=name,
            cluster_id=CLUSTER,
            secret=SECRET,
            listen=("127.0.0.1", port),
            peers={other: ("127.0.0.1", ports[other]) for other in ports if other != name},
            data_dir=tmp_path / name,
        )
        for name, port in ports.items()
    }


async def until(claim: str, condition: object, timeout_s: float = 30.0) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # type: ignore[operator]
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {claim}") from None


async def say(replica: Replica, words: list[bytes]) -> None:
    for word in words:
        assert isinstance(await replica.propose(word, timeout_ms=20_000), Applied)


async def start_all(configs: dict[str, ReplicaConfig]) -> dict[str, Replica]:
    replicas = {name: Replica(config, Words()) for name, config in configs.items()}
    for replica in replicas.values():
        await replica.start()
    return replicas


def flip_a_bit_in_the_middle(directory: Path) -> None:
    segment = max((directory / "journal").glob("*.segment"), key=lambda path: path.stat().st_size)
    data = bytearray(segment.read_bytes())
    data[len(data) // 3] ^= 0x10
    segment.write_bytes(data)


def delete_the_journal(directory: Path) -> None:
    shutil.rmtree(directory / "journal")


@pytest.mark.parametrize("damage", [flip_a_bit_in_the_middle, delete_the_journal])
def test_a_replica_with_a_damaged_or_lost_journal_learns_anew_and_votes_again_only_then(
    configs: dict[str, ReplicaConfig], damage: object
) -> None:
    async def scenario() -> None:
        replicas = await start_all(configs)
        await say(replicas["n1"], [b"%d" % number for number in range(200)])
        await replicas["n3"].stop()
        damage(configs["n3"].data_dir)  # type: ignore[operator]

        # With one more down, the healed replica must not help to make a majority: it may have forgotten a vote.
        await replicas["n2"].stop()
        await until("n1 is no leader without a majority", lambda: not replicas["n1"].is_leader)
        healed = replicas["n3"] = Replica(configs["n3"], Words())
        await healed.start()
        await asyncio.sleep(2.0)
        assert not any(replicas[name].is_leader for name in ("n1", "n3"))

        replicas["n2"] = Replica(configs["n2"], Words())
        await replicas["n2"].start()
        await until("n3 has learnt everything", lambda: len(healed.machine.words) == 200)  # type: ignore[attr-defined]
        await until("n3 is ready", lambda: healed.status().ready)
        # It has caught up; and now both others must have taken an entry of its own making (raft/engine_rejoin.py).
        await until("n3 votes again", lambda: healed._engine is not None and healed._engine.votes)

        await replicas["n1"].stop()
        await say(healed, [b"after"])  # n2 and n3 are a majority now: its vote counts again
        assert healed.machine.words[-1] == b"after"  # type: ignore[attr-defined]
        for name in ("n2", "n3"):
            await replicas[name].stop()

    asyncio.run(scenario())


def test_a_cluster_of_one_refuses_a_damaged_journal(configs: dict[str, ReplicaConfig]) -> None:
    alone = ReplicaConfig(
        node_id="n1",
        cluster_id=CLUSTER,
        secret=SECRET,
        listen=configs["n1"].listen,
        peers={},
        data_dir=configs["n1"].data_dir,
    )

    async def scenario() -> None:
        replica = Replica(alone, Words())
        await replica.start()
        await say(replica, [b"%d" % number for number in range(50)])
        await replica.stop()

    asyncio.run(scenario())
    flip_a_bit_in_the_middle(alone.data_dir)
    with pytest.raises(JournalDamaged, match="segment"):
        open_store(alone)


def test_empty_stores_of_a_cluster_that_never_began_are_new_ones(configs: dict[str, ReplicaConfig]) -> None:
    for _ in range(2):  # opened, and the power failed before anything was written
        journal, _ = open_store(configs["n1"])
        assert not journal.rejoining
        journal.close()
    assert not (configs["n1"].data_dir / "initialised").exists()


def test_all_journals_lost_at_once_and_nobody_votes(configs: dict[str, ReplicaConfig]) -> None:
    """Going on would lose what was acknowledged: the cluster stands still, and says why."""

    async def scenario() -> None:
        replicas = await start_all(configs)
        await say(replicas["n1"], [b"acknowledged"])
        for name, replica in replicas.items():
            await until(f"{name} is ready", lambda replica=replica: replica.status().ready)
            await replica.stop()
            delete_the_journal(configs[name].data_dir)
        replicas = await start_all(configs)
        await asyncio.sleep(2.0)
        assert not any(replica.is_leader for replica in replicas.values())
        for replica in replicas.values():
            await replica.stop()

    asyncio.run(scenario())
