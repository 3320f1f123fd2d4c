"""How the cluster and its tasks stand: the sum of what each node reports of its own partitions.

When "idle" is said it is true. The argument: let T be the moment at which the ends of the log are read, after
all reports. A partition's report says: at my moment t < T every offset below my frontier was settled, or a
suspect. Ends only grow, so frontier = end(T) means that nothing was appended to this partition between t and
T. Together: at T everything that stands in the log was settled, whatever submitted what in the meantime (a
task that submits another and then settles is caught, because the other one's append moved an end). What was
submitted before the call is below the ends, so it cannot be missed.

What was settled or in doubt can come back to life without an append: a suspect by a ruling, a dead letter by a
retry. What was acknowledged before the call is in the ledger after the barrier at the start: such a task is
"retrying" there (or claimed, and then settled), even while it still lies aside and no partition has it. So the
ledger's own counts must be quiet too, and every report at least as new as that index.

A delayed task stands below its partition's position, in the log's store, whose counts are read before the ends: one
that was enqueued meanwhile has left the store and moved an end, and one that was handed on before a report is
counted until it has ended.

A log that cannot be reached leaves what the nodes say, with a note, and never "idle".
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from node.facade import LocalStatus, NodeFacade, PartitionStatus, Unavailable
from node.http.peers import ask_all
from node.http.wire import REFUSED, query_flag, reply, when
from oncekeeper.errors import LogUnusable
from oncekeeper.log.delayed import delays_of
from oncekeeper.log.port import TaskLog

BARRIER_MS = 1000


class Merged(msgspec.Struct, frozen=True):
    """Every partition once, by the report of its owner, and what is wrong with the picture."""

    owners: dict[int, LocalStatus]
    views: dict[int, PartitionStatus]
    contested: set[int]  # two nodes report it: it is changing hands


def merge(reports: list[LocalStatus]) -> Merged:
    owners: dict[int, LocalStatus] = {}
    views: dict[int, PartitionStatus] = {}
    contested: set[int] = set()
    for report in sorted(reports, key=lambda each: each.applied_index):
        for view in report.partitions:
            if view.partition in views:
                contested.add(view.partition)
            owners[view.partition], views[view.partition] = report, view
    return Merged(owners, views, contested)


async def fresh(node: NodeFacade) -> bool:
    """Catch up with all that was acknowledged; False where there is no quorum to ask."""
    try:
        await node.barrier(BARRIER_MS)
    except Unavailable:
        return False
    return True


async def get_status(node: NodeFacade, request: web.Request) -> web.Response:
    if query_flag(request, "local"):
        return reply(node.local_status())
    is_fresh = await fresh(node)
    need_index = node.ledger.applied_index
    answers, silent = await ask_all(node, "/v1/status?local=1")
    reports = [node.local_status()]
    for name, body in answers.items():
        try:
            reports.append(msgspec.convert(body, LocalStatus))
        except msgspec.ValidationError as error:
            silent[name] = f"its report cannot be read: {error}"  # another version, mid-upgrade
    # After the reports, not before: see above.
    try:
        kept, ends, committed = await node.with_log(_positions)
    except LogUnusable as error:
        # Who asks because something is wrong shall see the nodes, and what is wrong. It is not idle.
        trouble = f"the task log cannot be asked: {error}"
        reports[0] = msgspec.structs.replace(reports[0], notes=(*reports[0].notes, trouble))
        views = merge(reports).views
        kept = {}
        ends = {number: view.frontier for number, view in views.items()}
        committed = {number: view.position for number, view in views.items()}
        is_idle = False
    else:
        is_idle = is_fresh
    counts = node.ledger.counts()
    merged = merge(reports)
    partitions = [
        _partition(p, end, committed.get(p, 0), kept.get(p, 0), merged) for p, end in sorted(ends.items())
    ]
    totals = {name: sum(int(row[name]) for row in partitions) for name in ("waiting", "delayed", "running")}
    # The ledger lets it run and no partition has it: it lies aside, on its way back into the log.
    totals["waiting"] += max(0, counts.retrying - totals["waiting"] - totals["delayed"])
    quiet = (
        is_idle
        and not merged.contested
        and all(p in merged.views for p in ends)
        and all(owner.applied_index >= need_index for owner in merged.owners.values())
        and not any(totals.values())
        and not counts.claimed
        and not any(report.running for report in reports)
    )
    return reply(
        {
            "tasks": {
                **totals,
                "suspect": counts.suspect,
                "executed": counts.executed,
                "dead": counts.dead,
                "cancelled": counts.cancelled,
            },
            "held": counts.held,
            "idle": quiet,
            "fresh": is_fresh,
            "applied_index": need_index,
            "nodes": [summary(report) for report in sorted(reports, key=lambda each: each.node)],
            "partitions": partitions,
            "unreachable": sorted(silent),
            "paused_queues": sorted(name for name, one in node.ledger.queues.items() if one.paused),
        }
    )


def _positions(log: TaskLog) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    delays = delays_of(log)
    kept = delays.counts() if delays is not None else {}
    return kept, log.ends(), log.committed()


def _partition(partition: int, end: int, committed: int, kept: int, merged: Merged) -> dict[str, Any]:
    """``kept``: tasks in the log's store of delayed ones; of these the owner has some in hand, and counts them."""
    view = merged.views.get(partition)
    if view is None:
        # Nobody speaks for it: whatever is not known to be settled counts as waiting.
        view = PartitionStatus(partition, committed, committed)
        owner = None
    else:
        owner = merged.owners[partition].node
    unread = max(0, end - view.frontier)
    return {
        "partition": partition,
        "owner": owner,
        "position": view.position,
        "committed": committed,
        "frontier": view.frontier,
        "end": end,
        "waiting": view.waiting + unread,
        "delayed": view.delayed + max(0, kept - view.in_hand),
        "running": view.running,
        "suspect": view.suspect,
    }


def summary(report: LocalStatus) -> dict[str, Any]:
    """A row of the nodes table."""
    return {
        "node": report.node,
        "up": True,
        "pid": report.pid,
        "role": report.role,
        "leader": report.leader,
        "term": report.term,
        "applied_index": report.applied_index,
        "incarnation": report.incarnation,
        "session": report.session,
        "lease_left_ms": report.lease_left_ms,
        "takes_work": report.takes_work,
        "partitions": [view.partition for view in report.partitions],
        "running": report.running,
        "tasks_settled": report.tasks_settled,
        "workers": report.workers,
        "refused": report.refused,
        "notes": list(report.notes),
    }


def describe_node(node: NodeFacade) -> dict[str, Any]:
    who = msgspec.to_builtins(node.identity)
    return {**who, "started": when(node.identity.started_ms), **summary(node.local_status())}


def _refused_http(request: web.Request) -> dict[str, Any]:
    refused = request.app[REFUSED]
    return {"refused_http": dict(refused)}


async def get_node(node: NodeFacade, request: web.Request) -> web.Response:
    described = describe_node(node) | _refused_http(request)
    if query_flag(request, "digest"):
        # In one breath with the index: replicas that applied as much must show the same.
        described |= {"ledger_index": node.ledger.applied_index, "ledger_digest": node.ledger.digest().hex()}
    return reply(described)


async def get_nodes(node: NodeFacade, request: web.Request) -> web.Response:
    answers, silent = await ask_all(node, "/v1/node")
    rows = [describe_node(node) | _refused_http(request)]
    rows += [body for body in answers.values() if isinstance(body, dict)]
    rows += [
        {"node": name, "up": False, "http": node.peers.get(name), "error": why}
        for name, why in silent.items()
    ]
    rows.sort(key=lambda row: str(row.get("node")))
    sessions = {
        session.node: {"session": number, "incarnation": session.incarnation, "consumes": session.consumes}
        for number, session in sorted(node.ledger.sessions.items())
    }
    return reply({"nodes": rows, "sessions": sessions, "unreachable": sorted(silent)})


async def get_health(node: NodeFacade, request: web.Request) -> web.Response:
    """For probes, without a token: that it lives, and nothing that a stranger could use."""
    return reply({"ok": True, "takes_work": node.local_status().takes_work})
