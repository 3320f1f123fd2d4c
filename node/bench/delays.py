"""Delayed tasks on three nodes: how fast they are taken, how late they start, what a cancel costs, how much room.

Lateness is taken in the handler, by the monotonic clock to which the due time was translated when it was submitted;
so it holds the worker's queue, the claim by Raft, and all else. On a machine with two cores that all of it
shares, a rate of 1,000 a second is no idle cluster.
"""

from __future__ import annotations

import random
import time

from dedup.ids import TaskId
from node.bench import app as bench_app
from node.bench.app import START, STARTS
from node.bench.latency import read_starts
from node.bench.measure import Plan, Row, percentile, spread
from node.bench.nodes import Nodes
from node.bench.processes import memory
from node.cli.output import CliError
from oncekeeper import Client
from oncekeeper.envelope import TaskBatch

WAIT_S_MAX = 180.0
HOUR_MS, YEAR_MS = 3_600_000, 365 * 86_400_000
PER_S, AT_ONCE = 1_000, 100_000
CANCELS, SOME_IDS = 300, 3_000
INSERT_STEP = 10_000
RESTART_LEAD_MS, RESTART_MS, RESTART_STEP_MS = 6_000, 25_000, 10
POLL_S, LOOK_S = 0.01, 0.1
MB = 1 << 20


def delays(plan: Plan, nodes: Nodes) -> list[Row]:
    client = Client(nodes.cluster.dir)
    try:
        return [
            _steady(plan, client),
            _same_second(plan, client),
            *_pending(plan, nodes, client),
        ]
    finally:
        client.close()


def _send(client: Client, due_ms: int, numbers: range) -> None:
    due_ns = time.monotonic_ns() + due_ms * 1_000_000 - time.time_ns()
    bodies = [b'{"number":%d,"sent_ns":%d}' % (number, due_ns) for number in numbers]
    client.send("bench.start_io", bodies, due_ms=due_ms)


def _late_ms(before: int, count: int) -> list[float]:
    path = bench_app.home() / STARTS
    deadline = time.monotonic() + WAIT_S_MAX
    while not path.exists() or path.stat().st_size // START.size < before + count:
        if time.monotonic() > deadline:
            raise CliError(f"not all of {count} delayed tasks have started after {WAIT_S_MAX:g} s")
        time.sleep(0.05)
    return [(started - due) / 1e6 for _, due, started in read_starts(path)[before : before + count]]


def _before() -> int:
    path = bench_app.home() / STARTS
    return path.stat().st_size // START.size if path.exists() else 0


def _steady(plan: Plan, client: Client) -> Row:
    """Ten tasks every ten milliseconds; submitted before, each ten with a due time of their own."""
    before, count = _before(), int(plan.latency_s * PER_S)
    lead_ms = 4_000 + count  # what a send takes, and then some
    begin_ms = time.time_ns() // 1_000_000 + lead_ms
    for number in range(0, count, 10):
        _send(client, begin_ms + number, range(number, number + 10))
    late = _late_ms(before, count)
    p50, p99, early = percentile(late, 0.5), percentile(late, 0.99), sum(each < -1 for each in late)
    return Row(
        "delays",
        f"lateness at {PER_S:,} due a second",
        "p50 ≤ 3 ms, p99 ≤ 10 ms, early 0",
        f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, early {early}",
        p50 <= 3 and p99 <= 10 and not early,
        samples=spread(late),
    )


def _same_second(plan: Plan, client: Client) -> Row:
    count = min(AT_ONCE, plan.tasks)
    before = _before()
    begin_ms = time.time_ns() // 1_000_000 + 15_000
    for number in range(0, count, 1000):
        _send(client, begin_ms + number * 1000 // count, range(number, number + 1000))
    late = _late_ms(before, count)
    started_s = max(late) / 1000 + 1
    early = sum(each < -1 for each in late)
    return Row(
        "delays",
        f"{count:,} due in the same second: all started",
        "within 3 s, early 0",
        f"within {started_s:.1f} s, early {early}",
        started_s <= 3 and not early,
        samples=spread(late),
    )


def _pending(plan: Plan, nodes: Nodes, client: Client) -> list[Row]:
    """Single tasks that are due at random times of a year, kept; then cancels and a restart."""
    count, draw = plan.pending, random.Random(1)
    taken_s, some_ids = _insert(nodes, client, count, draw)
    of = "its index" if plan.is_kafka else "the log"
    disk = nodes.cluster.node_dir(next(iter(nodes.pids))) if plan.is_kafka else nodes.cluster.dir / "log"
    size = sum(path.stat().st_size for path in disk.iterdir() if path.is_file())
    resident = max(memory(pid).rss for pid in nodes.pids.values()) / MB
    cancel_ms = []
    for task_id in draw.sample(some_ids, min(CANCELS, len(some_ids))):
        asked = time.monotonic()
        client.cancel(task_id)
        cancel_ms.append((time.monotonic() - asked) * 1000)
    p99 = percentile(cancel_ms, 0.99)
    rate = count / taken_s
    return [
        Row(
            "delays",
            f"{count:,} single tasks, due over a year: appended and kept",
            "≥ 40,000/s",
            f"{rate:,.0f}/s",
            rate >= 40_000,
        ),
        Row(
            "delays",
            f"{count:,} pending: resident of the largest node; disk of {of}",
            "≤ 300 MB",
            f"{resident:.0f} MB; {size / count:.0f} bytes a task",
            resident <= 300,
        ),
        Row(
            "delays",
            f"cancel of one among {count:,}, over HTTP",
            "p99 ≤ 10 ms",
            f"p50 {percentile(cancel_ms, 0.5):.1f} ms, p99 {p99:.1f} ms",
            p99 <= 10,
            samples=spread(cancel_ms),
        ),
        _restart(nodes, client, count),
    ]


def _insert(nodes: Nodes, client: Client, count: int, draw: random.Random) -> tuple[float, list[TaskId]]:
    """Seconds until all are kept by the nodes, and some of their ids."""
    before = nodes.kept()[0]
    now_ms = time.time_ns() // 1_000_000
    some: list[TaskId] = []
    began = moved = time.monotonic()
    for begin in range(0, count, INSERT_STEP):
        taken = client._ids.take(min(INSERT_STEP, count - begin))
        some += list(taken.part(0, min(len(taken), max(1, SOME_IDS * INSERT_STEP // count))))
        singles = [
            TaskBatch(
                queue="default",
                handler="bench.start_io",
                ids=taken.part(at, 1),
                bodies=(b'{"number":0,"sent_ns":0}',),
                due_ms=now_ms + draw.randrange(HOUR_MS, YEAR_MS),
                submitted_ms=now_ms,
            )
            for at in range(len(taken))
        ]
        client._append(singles, taken)
        client.wake()
    standing = (-1, -1)
    while (found := nodes.kept()) != (before + count, 0):
        if found != standing:
            standing, moved = found, time.monotonic()
        elif time.monotonic() - moved > WAIT_S_MAX:
            kept, unread = found
            raise CliError(
                f"{kept - before:,} of {count:,} tasks are kept, {unread:,} not read, for {WAIT_S_MAX:g} s"
            )
        time.sleep(LOOK_S)
    return time.monotonic() - began, some


def _restart(nodes: Nodes, client: Client, pending: int) -> Row:
    """Tasks fall due all the time; a node is killed, started again, and takes its partitions back.

    Until it is back the others hold them, after its session's end; what counts is what falls due once it has
    partitions again.
    """
    before = _before()
    begin_ms = time.time_ns() // 1_000_000 + RESTART_LEAD_MS
    numbers = range(0, RESTART_MS, RESTART_STEP_MS)
    for number in numbers:
        _send(client, begin_ms + number, range(number, number + 1))
    name = next(iter(nodes.pids))
    time.sleep(max(0.0, begin_ms / 1000 + 1 - time.time()))
    killed = time.monotonic_ns()
    nodes.kill(name)
    nodes.start(name)
    joined = _joined(nodes, name)
    _late_ms(before, len(numbers))
    found = read_starts(bench_app.home() / STARTS)[before : before + len(numbers)]
    late = [(started - due) / 1e9 for _, due, started in found if due > joined]
    away = max((started - due) / 1e9 for _, due, started in found if killed <= due <= joined)
    if not late:
        raise CliError(f"{name} took longer than {RESTART_MS / 1000:g} s to join: nothing is left to be late")
    return Row(
        "delays",
        f"a node is killed and started again, {pending:,} pending, a third of them its own: the latest start "
        "of what falls due from its joining on",
        "≤ 2 s",
        f"{max(late):.2f} s; joined after {(joined - killed) / 1e9:.1f} s, the latest until then {away:.1f} s",
        max(late) <= 2,
        samples=spread(late),
    )


def _joined(nodes: Nodes, name: str) -> int:
    """The monotonic time, in ns, at which a node that was started owns partitions."""
    wanted = nodes.cluster.peers[name].http
    deadline = time.monotonic() + WAIT_S_MAX
    while time.monotonic() < deadline:
        asked = time.monotonic_ns()
        answers = dict(nodes.api.ask_each("/v1/status?local=1"))
        row = answers[wanted]
        if row is not None and row["partitions"]:
            return asked
        nodes.refuse_ends()
        time.sleep(POLL_S)
    raise CliError(f"{name} owns no partition after {WAIT_S_MAX:g} s")
