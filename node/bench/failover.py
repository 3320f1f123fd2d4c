"""The leader is killed again and again: how long until claims go on, seen from outside.

Two clocks start with the kill:

- *claims*: tasks are submitted at a steady pace, before, during and after. The first task that was submitted
  after the kill and has started proves a claim that was granted after the kill, since nothing can be claimed
  before it is submitted, and no claim is granted without a leader;
- *command*: both surviving nodes are asked for ids all the time; the first answer is a command that a majority
  has on its disks.
"""

from __future__ import annotations

import threading
import time
from itertools import count

from node.bench import app as bench_app
from node.bench.app import STARTS
from node.bench.latency import read_starts
from node.bench.measure import Plan, Row, percentile, rounded, spread
from node.bench.nodes import Nodes
from node.cli.connection import connect_directory
from node.cli.output import CliError
from node.config import Address
from oncekeeper import Client

CLAIMS_P50_S, CLAIMS_MAX_S = 0.5, 2.0
TRICKLE_S = 0.005
STEADY_S = 0.3  # between "all are ready" and the next kill
RECOVER_S_MAX = 30.0


class Trickle:
    """Submits single tasks at a steady pace, whatever happens to the nodes: the log needs none of them."""

    def __init__(self, nodes: Nodes) -> None:
        self._client = Client(nodes.cluster.dir)
        # Ids ahead of need: asking a dead leader for them would stop the trickle.
        self._client._ids.take(60_000)
        self.submitted = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trickle")
        bench_app.app.use(self._client)

    def __enter__(self) -> Trickle:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        bench_app.app.use(None)
        self._client.close()

    def _run(self) -> None:
        due = time.monotonic()
        for number in count():
            due = max(due + TRICKLE_S, time.monotonic())
            if self._stop.wait(due - time.monotonic()):
                return
            bench_app.start_io.submit(number, time.monotonic_ns())
            self.submitted = number + 1


def failover(plan: Plan, nodes: Nodes) -> list[Row]:
    path = bench_app.home() / STARTS
    claims_s, command_s = [], []
    with Trickle(nodes):
        for _ in range(plan.kills):
            nodes.ready()
            time.sleep(STEADY_S)
            leader = next(row["node"] for row in nodes.rows() if row.get("role") == "leader")
            claims, command = _kill(nodes, leader, len(read_starts(path)))
            claims_s.append(claims)
            command_s.append(command)
            nodes.start(leader)
    p50, worst = percentile(claims_s, 0.5), max(claims_s)
    return [
        Row(
            "failover",
            f"leader kill -9 → a task claimed after it starts, {plan.kills} kills",
            f"p50 ≤ {CLAIMS_P50_S:g} s, max ≤ {CLAIMS_MAX_S:g} s",
            f"p50 {p50:.3f} s, max {worst:.3f} s",
            p50 <= CLAIMS_P50_S and worst <= CLAIMS_MAX_S,
            "",
            {"s": rounded(claims_s), **spread(claims_s)},
        ),
        Row(
            "failover",
            f"leader kill -9 → the next ledger command is accepted, {plan.kills} kills",
            "",
            f"p50 {percentile(command_s, 0.5):.3f} s, max {max(command_s):.3f} s",
            None,
            "",
            {"s": rounded(command_s), **spread(command_s)},
        ),
    ]


def _kill(nodes: Nodes, leader: str, started_before: int) -> tuple[float, float]:
    """Seconds until a claim went through, and until a command was accepted."""
    survivors = [peer.http for name, peer in nodes.cluster.peers.items() if name != leader]
    accepted: list[float] = []
    over = threading.Event()
    go = threading.Event()
    asking = [
        threading.Thread(target=_ask_ids, args=(nodes, address, go, over, accepted)) for address in survivors
    ]
    for thread in asking:
        thread.start()
    nodes.kill(leader)
    killed_ns = time.monotonic_ns()
    go.set()
    try:
        claims = _first_start(killed_ns, started_before)
        if not over.wait(RECOVER_S_MAX):
            raise CliError(f"no ledger command was accepted within {RECOVER_S_MAX:g} s of the leader's end")
    finally:
        over.set()
        for thread in asking:
            thread.join()
    return claims, min(accepted) - killed_ns / 1e9


def _first_start(killed_ns: int, skip: int) -> float:
    path = bench_app.home() / STARTS
    deadline = time.monotonic() + RECOVER_S_MAX
    while time.monotonic() < deadline:
        fresh = [started for _, sent, started in read_starts(path)[skip:] if sent > killed_ns]
        if fresh:
            return (min(fresh) - killed_ns) / 1e9
        time.sleep(0.01)
    raise CliError(f"no task was claimed within {RECOVER_S_MAX:g} s of the leader's end")


def _ask_ids(
    nodes: Nodes, address: Address, go: threading.Event, over: threading.Event, accepted: list[float]
) -> None:
    api = connect_directory(nodes.cluster.dir)
    api.keep_only([address])
    list(api.ask_each("/v1/health"))  # the connection stands before the kill
    go.wait()
    while not over.is_set():
        try:
            api.post("/v1/ids", {"count": 1})
        except CliError:
            time.sleep(0.005)
            continue
        accepted.append(time.monotonic())
        over.set()
