"""One replica with the ledger on it and nothing else, driven by lines on standard input (see commands.py).

Run as ``python -m node.bench.replica CONFIG_JSON``.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from node.certs import CertFiles
from node.proposer import Proposer
from raft.commands import AllocateIds
from raft.ledger import Ledger
from raft.replica import Replica, ReplicaConfig
from raft.tls import client_context, server_context


class Setup(msgspec.Struct, frozen=True):
    name: str
    cluster_id: str
    secret: str
    ports: dict[str, int]
    directory: str
    certs: str


def say(word: object) -> None:
    sys.stdout.write(json.dumps(word) + "\n")
    sys.stdout.flush()


async def command_ms(proposer: Proposer, count: int, gap_s: float) -> list[float]:
    """Single commands, one after another."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        await proposer.propose((AllocateIds(1),))
        found.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(gap_s)
    return found


async def main(setup: Setup) -> None:
    files = CertFiles(Path(setup.certs))
    certs = (files.authority, files.certificate(setup.name), files.key(setup.name))
    replica = Replica(
        ReplicaConfig(
            node_id=setup.name,
            cluster_id=setup.cluster_id,
            secret=bytes.fromhex(setup.secret),
            listen=("127.0.0.1", setup.ports[setup.name]),
            peers={name: ("127.0.0.1", port) for name, port in setup.ports.items() if name != setup.name},
            data_dir=Path(setup.directory),
            server_ssl=server_context(*certs),
            client_ssl=client_context(*certs),
        ),
        Ledger(1),
    )
    await replica.start()
    proposer = Proposer(replica, secrets.randbits(64))
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    # The end of standard input is the end of the bench: nothing stays behind.
    while line := await lines.readline():
        asked: dict[str, Any] = json.loads(line)
        if asked["do"] == "role":
            status = replica.status()
            say(status.role if status.ready else "")
        else:
            say(await command_ms(proposer, asked["count"], asked["gap_s"]))
    await replica.stop()


if __name__ == "__main__":
    given = msgspec.json.decode(sys.argv[1], type=Setup)
    try:
        import uvloop
    except ImportError:
        asyncio.run(main(given))
    else:
        uvloop.run(main(given))
