"""The ledger's log as history: read a copy of a node's Raft journal, and apply it to a ledger of our own.

What the nodes decided is thereby seen by a witness that took no part: every grant, settle, suspicion, testimony
and ruling in the order of the Raft index, and the digest that each replica must have shown at each index.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from chaos import history as h
from dedup.ids import Ids
from raft import commands as c
from raft.journal import Journal
from raft.ledger import Ledger
from raft.wire import PAYLOAD, TOKEN_END


class Incomplete(Exception):
    """The journal was trimmed by a snapshot: the first part of the history is gone."""


def replay(
    raft_dir: Path, scratch: Path, *, cluster_id: str, bloom_seed: int, upto: int, digests_at: frozenset[int]
) -> tuple[list[h.Decision], dict[int, str], Ledger]:
    """Decisions up to the index ``upto``, digests at some indices, and the ledger at the end.

    ``raft_dir`` may be that of a running node, as long as ``upto`` was applied there: a copy is read, in
    ``scratch``, which must not exist. Opening cuts what is torn at the copy's end.
    """
    shutil.copytree(raft_dir / "journal", scratch, ignore=shutil.ignore_patterns("*.lock"))
    journal = Journal.open(scratch, cluster_id=cluster_id)
    try:
        entries = list(journal[:])
    finally:
        journal._destroy()
        shutil.rmtree(scratch)
    if entries and entries[0][1] > 2:
        raise Incomplete(f"{raft_dir}: the journal begins at index {entries[0][1]}")
    payloads = ((i, command[TOKEN_END:] if command[0] == PAYLOAD else None) for command, i, _ in entries)
    return apply_all(payloads, bloom_seed=bloom_seed, upto=upto, digests_at=digests_at)


def apply_all(
    entries: Iterable[tuple[int, bytes | None]], *, bloom_seed: int, upto: int, digests_at: frozenset[int]
) -> tuple[list[h.Decision], dict[int, str], Ledger]:
    """As ``replay``, of (index, payload) in order; a payload of None is an entry without one."""
    ledger = Ledger(bloom_seed)
    decisions: list[h.Decision] = []
    digests: dict[int, str] = {}
    for index, payload in entries:
        if index > upto:
            break
        if payload is not None:
            effects = ledger.apply(index, payload)
            if not effects.repeated:
                decisions += _decisions(effects)
        if index in digests_at:
            digests[index] = ledger.digest().hex()
    return decisions, digests, ledger


def _decisions(effects: c.Effects) -> Iterator[h.Decision]:
    index = effects.index
    for command, answer in zip(effects.proposal.commands, effects.answers, strict=True):
        if not isinstance(answer, c.Answered):
            continue
        match command:
            case c.Claim(session, ids):
                for part, span in _parts(ids, answer):
                    if span.outcome is c.Outcome.GRANTED:
                        for task_id in part:
                            yield h.Claimed(index, task_id, span.fence, span.detail, session)
            case c.Settle(_, settlements):
                yield from _settled(index, settlements, answer)
            case c.Revive(ids):
                for part, span in _parts(ids, answer):
                    if span.outcome is c.Outcome.SETTLED:
                        yield from (h.Revived(index, task_id) for task_id in part)
            case _:
                pass  # the rest is told by events
    for event in effects.events:
        match event:
            case c.Suspected(ids, fence, node, incarnation, why):
                yield from (h.Suspected(index, task_id, fence, node, incarnation, why) for task_id in ids)
            case c.Testified(ids, fence, node, fact):
                yield from (h.Testified(index, task_id, fence, node, fact) for task_id in ids)
            case c.Resolved(ids, fence, verdict, by, _):
                yield from (h.Ruled(index, task_id, fence, verdict, by) for task_id in ids)
            case c.Deleted(ids):
                yield from (h.Cancelled(index, task_id) for task_id in ids)
            case _:
                pass


def _settled(index: int, settlements: tuple[c.Settlement, ...], answer: c.Answered) -> Iterator[h.Settled]:
    every = [(settlement, task_id) for settlement in settlements for task_id in settlement.ids]
    at = 0
    for span in answer.spans:
        for settlement, task_id in every[at : at + span.count]:
            # LAPSED: taken as testimony, from a session that is gone.
            if span.outcome in (c.Outcome.SETTLED, c.Outcome.LAPSED):
                yield h.Settled(index, task_id, settlement.fence, settlement.result)
        at += span.count


def _parts(ids: Ids, answer: c.Answered) -> Iterator[tuple[Ids, c.Span]]:
    at = 0
    for span in answer.spans:
        yield ids.part(at, span.count), span
        at += span.count
