"""One durable ledger command: proposed, synced by a majority, applied at the proposer.

Three replicas with the ledger on them, in processes of their own (node/bench/replica.py); what is timed is
``Proposer.propose`` of an AllocateIds: encoding, links (mutual TLS, as a new cluster has them), two of three disks
and the local apply; no HTTP.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from node.bench.measure import Plan, Row, percentile, rounded, spread
from node.bench.replica import Setup
from node.certs import CertFiles, make_all
from node.cli.output import CliError
from node.cluster import free_ports
from node.supervisor import child_environment

COMMAND_P50_MS, COMMAND_P99_MS = 2.0, 10.0
GAP_S = 0.002
READY_S_MAX = 30.0
NAMES = ("r1", "r2", "r3")


class ReplicaProcess:
    def __init__(self, setup: Setup) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "node.bench.replica", msgspec.json.encode(setup).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
            text=True,
        )

    def ask(self, what: str, **arguments: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise CliError(f"a replica ended with {self._process.wait()}")
        return json.loads(line)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def commands(plan: Plan, bare: dict[str, float]) -> list[Row]:
    ports = dict(zip(NAMES, free_ports(len(NAMES)), strict=True))
    cluster_id, secret = secrets.token_hex(16), secrets.token_hex(32)
    certs = CertFiles(plan.home / "replicas" / "certs")
    make_all(certs, cluster_id, dict.fromkeys(NAMES, ()))
    processes: list[ReplicaProcess] = []
    rows = []
    try:
        for name in NAMES:
            home: Path = plan.home / "replicas" / name
            home.mkdir(parents=True)
            processes.append(
                ReplicaProcess(Setup(name, cluster_id, secret, ports, str(home), str(certs.dir)))
            )
        leader = _leader(processes)
        follower = processes[(processes.index(leader) + 1) % len(processes)]
        for role, process in (("leader", leader), ("follower", follower)):
            process.ask("commands", count=50, gap_s=0)
            ms = process.ask("commands", count=plan.commands, gap_s=GAP_S)
            p50, p99 = percentile(ms, 0.5), percentile(ms, 0.99)
            rows.append(
                Row(
                    "command",
                    f"one durable ledger command, from the {role}",
                    f"p50 ≤ {COMMAND_P50_MS:g} ms, p99 ≤ {COMMAND_P99_MS:g} ms",
                    f"p50 {p50:.2f} ms, p99 {p99:.2f} ms",
                    p50 <= COMMAND_P50_MS and p99 <= COMMAND_P99_MS,
                    f"one journal append and fdatasync: {1000 / bare['journal_syncs_s']:.2f} ms",
                    {"ms": rounded(ms), **spread(ms)},
                )
            )
    finally:
        for process in processes:
            process.stop()
    return rows


def _leader(processes: list[ReplicaProcess]) -> ReplicaProcess:
    deadline = time.monotonic() + READY_S_MAX
    while time.monotonic() < deadline:
        roles = [process.ask("role") for process in processes]
        if "leader" in roles and all(roles):
            return processes[roles.index("leader")]
        time.sleep(0.02)
    raise CliError(f"three replicas have no leader after {READY_S_MAX:g} s")
