"""Gathering a run's history from its witnesses, when all is done and every node runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from chaos import history as h
from chaos.replay import Incomplete, apply_all, replay
from chaos.scenarios.nodes import Nodes
from chaos.sink import CLOSED, EFFECT
from dedup.executed import RETENTION_MS
from dedup.ids import Ids, parse_id
from node.config import load_config
from oncekeeper.log.embedded import open_log
from oncekeeper.log.port import Fetched
from raft.commands import Answered, Claim, Settle

LOOKS = 3
READ_TASKS = 10_000
RETRIES_MS = 31_000  # five, the first after a second, doubling: what a handler has that says nothing else


class Said(msgspec.Struct):
    """A line of node/witness.py."""

    t_ns: int
    process: str
    kind: str
    op: int = 0
    index: int = 0
    session: int = 0
    until_ms: int = 0
    payload: bytes = b""
    command: Claim | Settle | None = None
    answer: Answered | None = None


def gather(nodes: Nodes, status: dict[str, Any]) -> None:
    """Complete ``nodes.history``."""
    history = nodes.history
    tasks = status["tasks"]
    history.counted = h.Counted(tasks["executed"], tasks["dead"], tasks["cancelled"], tasks["suspect"])
    _sink(nodes)
    said = [line for node in nodes.names for line in _said(nodes.witness_path(node))]
    history.operations = list(_operations(said))
    history.leases = [
        h.Lease(each.t_ns, each.process, each.session, each.until_ms * 1_000_000)
        for each in said
        if each.kind == "lease"
    ]
    _digests(nodes)
    _decisions(nodes, said)
    _log(nodes)
    nodes.look_at_positions()


def _sink(nodes: Nodes) -> None:
    for moment in nodes.sink.read():
        task_id = parse_id(moment.id_text)
        if moment.what == EFFECT:
            nodes.history.effects.append(h.Effect(task_id, moment.fence, moment.pid, moment.t_ns))
        elif moment.what != CLOSED:
            nodes.history.starts.append(h.Started(task_id, moment.fence, moment.pid, moment.t_ns))


def _said(path: Path) -> Iterator[Said]:
    decode = msgspec.json.Decoder(Said).decode
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                yield decode(line)
            except msgspec.DecodeError:
                continue  # cut short by a full disk: the account has a hole there


def applied_by(path: Path) -> set[int]:
    """The indices that a node applied one by one; not those that a snapshot brought."""
    return {each.index for each in _said(path) if each.kind == "applied"}


def _operations(said: list[Said]) -> Iterator[h.Operation]:
    calls = {(e.process, e.op, type(e.command)): e for e in said if e.kind == "call"}
    for each in said:
        if each.kind == "return":
            call = calls.pop((each.process, each.op, type(each.command)), None)
            if call is not None:
                yield from _answered(call, each)
    for call in calls.values():
        yield from _parts(call)


def _answered(call: Said, told: Said) -> Iterator[h.Operation]:
    assert told.answer is not None
    at = 0
    every = list(_parts(call))
    for span in told.answer.spans:
        for op in every[at : at + span.count]:
            yield msgspec.structs.replace(
                op, returned_ns=told.t_ns, outcome=span.outcome, fence=op.fence or span.fence
            )
        at += span.count


def _parts(call: Said) -> Iterator[h.Operation]:
    match call.command:
        case Claim(session, ids):
            for task_id in ids:
                yield h.Operation(call.process, call.op, "CLAIM", task_id, session, call.t_ns)
        case Settle(session, settlements):
            for each in settlements:
                for task_id in each.ids:
                    yield h.Operation(
                        call.process,
                        call.op,
                        "SETTLE",
                        task_id,
                        session,
                        call.t_ns,
                        fence=each.fence,
                        result=each.result,
                    )
        case None:
            pass


def _digests(nodes: Nodes) -> None:
    """The running replicas' own, several looks each; the replay is held against them."""
    for _ in range(LOOKS):
        for node in nodes.names:
            answer = nodes.ask(node, "/v1/node?digest=1", 10.0)
            if answer is not None:
                nodes.history.digests.append(
                    h.Digest(node, int(answer["ledger_index"]), str(answer["ledger_digest"]))
                )


def _decisions(nodes: Nodes, said: list[Said]) -> None:
    history = nodes.history
    config = json.loads((nodes.cluster.dir / "cluster.json").read_text())
    newest = {each.who: each.index for each in history.digests}
    node = max(newest, key=lambda each: newest[each])
    digests_at = frozenset(each.index for each in history.digests)
    payloads = _payloads(history, said)
    try:
        decisions, digests, ledger = replay(
            nodes.raft_dir(node),
            nodes.folder / "replay",
            cluster_id=config["cluster_id"],
            bloom_seed=config["bloom_seed"],
            upto=newest[node],
            digests_at=digests_at,
        )
        who = f"replay of {node}'s journal"
    except Incomplete:
        # Snapshots shortened it. The nodes' accounts have every entry since the first.
        decisions, digests, ledger = apply_all(
            sorted((index, each.payload) for index, each in payloads.items()),
            bloom_seed=config["bloom_seed"],
            upto=newest[node],
            digests_at=digests_at,
        )
        who = "replay of what was applied"
    ledger.check_invariants()
    history.digests += [h.Digest(who, index, digest) for index, digest in digests.items()]
    times = {index: each.t_ns for index, each in payloads.items()}
    history.decisions = [msgspec.structs.replace(each, t_ns=times.get(each.index, 0)) for each in decisions]


def _payloads(history: h.History, said: list[Said]) -> dict[int, Said]:
    """The first application of each index. Two nodes that applied different entries there are told as digests."""
    first: dict[int, Said] = {}
    for each in sorted((e for e in said if e.kind == "applied"), key=lambda e: e.t_ns):
        other = first.setdefault(each.index, each)
        if other.payload != each.payload:
            history.digests += [
                h.Digest(f"{e.process}'s entry", each.index, e.payload.hex()) for e in (other, each)
            ]
    return first


def _log(nodes: Nodes) -> None:
    history = nodes.history
    log = open_log(nodes.cluster.dir, cluster_id=nodes.cluster.cluster_id)
    try:
        for partition, end in log.ends().items():
            at = 0
            while at < end and (items := log.read(partition, at, READ_TASKS, 64 << 20)):
                for item in items:
                    at = item.end
                    if isinstance(item, Fetched):
                        history.placed += _placed(item.partition, item.base, item.batch.ids)
        for kind in ("dead", "suspect"):
            after = 0
            while page := log.aside(kind, after, 1000):
                after = page[-1][0]
                history.aside |= {task.id for _, task in page}
    finally:
        log.close()
    settings = load_config(nodes.cluster.config_path(nodes.names[0]))
    history.kept = h.Kept(RETENTION_MS, settings.log_keep_ms, 0, RETRIES_MS)


def _placed(partition: int, base: int, ids: Ids) -> list[h.Placed]:
    return [h.Placed(partition, base + at, task_id) for at, task_id in enumerate(ids)]
