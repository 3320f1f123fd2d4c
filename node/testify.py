"""What a restarted node tells the ledger about the claims that its former lives left behind.

The work journals of each life (node/workers/testimony.py) name claims and how far they came. What no journal
names was never handed to a worker, if the journals are complete; if they are not, it may have started, and
saying so lets the handler's check begin at once instead of waiting for a word that cannot come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dedup.ids import Ids
from dedup.runmap import RunMap
from dedup.suspects import SuspectRun
from node.workers.testimony import Evidence
from raft.commands import Fact, Testimony

IDS_MAX = 100_000  # of one Testify command


def lives(suspects: Iterable[SuspectRun], kept: Iterable[int]) -> dict[int, int]:
    """Which kept journals tell of which incarnation. A process that joined anew without a restart has gone on
    writing to the journals of its first incarnation: the newest ones that are not newer than the claim."""
    known = sorted(kept)
    found: dict[int, int] = {}
    for run in suspects:
        incarnation = run.suspect.incarnation
        before = [life for life in known if life <= incarnation]
        if before:
            found[incarnation] = before[-1]
    return found


def testimonies(
    suspects: Iterable[SuspectRun], evidence: Mapping[int, Evidence]
) -> list[tuple[Testimony, ...]]:
    """Everything there is to say about ``suspects``, in batches for Testify; evidence by incarnation."""
    marks: dict[int, RunMap[Fact]] = {}
    for life in evidence.values():
        for one in life.facts:
            marks.setdefault(one.fence, RunMap()).set(one.ids, one.fact)
    said: list[Testimony] = []
    for run in suspects:
        life_evidence = evidence.get(run.suspect.incarnation)
        unnamed = Fact.STARTED
        if life_evidence is not None and life_evidence.complete:
            unnamed = Fact.NEVER_STARTED
        at = 0
        for count, fact in marks.get(run.suspect.fence, RunMap[Fact]()).spans(run.ids):
            said.append(Testimony(run.suspect.fence, run.ids.part(at, count), fact or unnamed))
            at += count
    return list(_batches(_joined(said)))


def _joined(said: list[Testimony]) -> list[Testimony]:
    """Those of one fence and fact together: a Testify of thousands of keyed ids is one entry a group."""
    groups: dict[tuple[int, Fact], tuple[list[tuple[int, int]], list[bytes]]] = {}
    for one in said:
        runs, keys = groups.setdefault((one.fence, one.fact), ([], []))
        runs.extend(one.ids.runs)
        keys.extend(one.ids.keys)
    return [
        Testimony(fence, Ids(tuple(runs), tuple(keys)), fact)
        for (fence, fact), (runs, keys) in groups.items()
    ]


def _batches(said: list[Testimony]) -> Iterable[tuple[Testimony, ...]]:
    batch: list[Testimony] = []
    count = 0
    for one in said:
        if batch and count + len(one.ids) > IDS_MAX:
            yield tuple(batch)
            batch, count = [], 0
        batch.append(one)
        count += len(one.ids)
    if batch:
        yield tuple(batch)
