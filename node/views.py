"""What the coordinator is given and what it shows: settings, the ledger's reads, and its counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from dedup.ids import Ids
from dedup.suspects import Suspect
from raft.commands import Span


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """Bounds of a node's work. What is full pauses what feeds it: ready tasks pause reading."""

    node: str
    horizon_ms: int = 50  # claimed ahead, where doubt costs a check (node/flow.py)
    rerun_horizon_ms: int = 200  # claimed ahead, where doubt costs a rerun
    claim_max: int = 32_768  # tasks of one kind claimed and not ended
    work_ms: int = 20  # running time of one Work
    work_tasks_max: int = 1_024
    proposals_max: int = 2
    ready_max: int = 65_536  # tasks read and not claimed; beyond, reading pauses
    read_max: int = 8_192  # tasks of one read
    window_max: int = 500_000  # unsettled tasks of one partition; beyond, reading it pauses
    held_look_ms: int = 100  # how often to look again at what another holds
    testimony_wait_ms: int = 1_500  # how long a suspect waits for its holder's word
    check_tries: int = 5  # checks that cannot tell, before a human is asked
    check_retry_ms: int = 500
    delays: bool = False  # whether the log keeps delayed tasks; else they wait in memory
    lost_attempts_max: int = 20  # attempts lost with worker or node, beyond the handler's retries


class LedgerReads(Protocol):
    """What the coordinator reads of this node's replica of the ledger."""

    def classify(self, ids: Ids) -> Sequence[Span]:
        """What a claim would be answered, without claiming."""
        ...

    def suspicions(self, ids: Ids) -> Sequence[tuple[int, Suspect | None]]:
        """Run-length, over the order of the ids."""
        ...

    def paused_queues(self) -> frozenset[str]: ...


class PartitionView(msgspec.Struct, frozen=True):
    """A partition as its owner sees it (node/facade.py: PartitionStatus has the same fields)."""

    partition: int
    position: int
    frontier: int
    waiting: int = 0
    delayed: int = 0
    running: int = 0
    suspect: int = 0
    in_hand: int = 0
