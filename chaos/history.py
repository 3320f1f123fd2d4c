"""What happened, as data: the history of a cluster under test.

Three witnesses that do not know each other add to one history: the *clients* (what was acknowledged), the *sink*
(what took effect, recorded outside of the system), and the *ledger's log* (what was decided, in the order of the
Raft index). Nothing here judges: that is chaos/checkers.py's, by arithmetic alone, so a history that was written
down can be judged again.

Decisions stand one an id, because invariants are about ids. Their order is (index, place in the entry).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import msgspec

from dedup.ids import TaskId
from raft.commands import Fact, Result, Verdict

# --- what clients and the sink saw --------------------------------------------------------------------------------


class Submitted(msgspec.Struct, frozen=True):
    """``acknowledged``: False where the outcome is unknown to the client. ``policy``: the handler's on_doubt."""

    id: TaskId
    policy: str
    acknowledged: bool = True


class Effect(msgspec.Struct, frozen=True):
    """One line of the sink: this task, under this fence, did what it does."""

    id: TaskId
    fence: int
    pid: int


class CancelTold(msgspec.Struct, frozen=True):
    """A client was told: this will never start."""

    id: TaskId


# --- what the ledger decided --------------------------------------------------------------------------------------


class Claimed(msgspec.Struct, frozen=True):
    index: int
    id: TaskId
    fence: int
    attempt: int
    session: int


class Settled(msgspec.Struct, frozen=True):
    """A settle that the ledger took (perhaps as testimony, perhaps for the second time)."""

    index: int
    id: TaskId
    fence: int
    result: Result


class Suspected(msgspec.Struct, frozen=True):
    index: int
    id: TaskId
    fence: int
    node: str
    incarnation: int
    why: str


class Testified(msgspec.Struct, frozen=True):
    index: int
    id: TaskId
    fence: int
    node: str
    fact: Fact


class Ruled(msgspec.Struct, frozen=True):
    """A suspect was closed, or held for a human. ``by`` is "testimony" where the holder's own word closed it."""

    index: int
    id: TaskId
    fence: int
    verdict: Verdict
    by: str


class Cancelled(msgspec.Struct, frozen=True):
    index: int
    id: TaskId


class Revived(msgspec.Struct, frozen=True):
    index: int
    id: TaskId


Decision = Claimed | Settled | Suspected | Testified | Ruled | Cancelled | Revived

# --- what was observed of the cluster -----------------------------------------------------------------------------


class Position(msgspec.Struct, frozen=True):
    """A committed position, in the order of observation."""

    partition: int
    committed: int


class Digest(msgspec.Struct, frozen=True):
    """The digest of a replica's state after the entry ``index``. ``who`` is a node, or a replay of its journal."""

    who: str
    index: int
    digest: str


class Counted(msgspec.Struct, frozen=True):
    """What people are shown while the cluster is idle."""

    executed: int
    dead: int
    cancelled: int
    suspect: int


class Placed(msgspec.Struct, frozen=True):
    """A task in the log."""

    partition: int
    offset: int
    id: TaskId


class History:
    def __init__(self) -> None:
        self.submitted: dict[TaskId, Submitted] = {}
        self.effects: list[Effect] = []
        self.cancels: list[CancelTold] = []
        self.decisions: list[Decision] = []
        self.positions: list[Position] = []
        self.digests: list[Digest] = []
        self.counted: Counted | None = None
        self.placed: list[Placed] = []
        self.aside: set[TaskId] = set()

    def submit(self, ids: Iterable[TaskId], policy: str, *, acknowledged: bool = True) -> None:
        for task_id in ids:
            known = self.submitted.get(task_id)
            # A second submit of the same id (a key, a repeated send) is the same task; one acknowledgement counts.
            if known is None or (acknowledged and not known.acknowledged):
                self.submitted[task_id] = Submitted(task_id, policy, acknowledged)

    def by_id(self) -> Mapping[TaskId, list[Decision]]:
        found: dict[TaskId, list[Decision]] = defaultdict(list)
        for decision in self.decisions:
            found[decision.id].append(decision)
        return found

    def effects_by_id(self) -> Mapping[TaskId, list[Effect]]:
        found: dict[TaskId, list[Effect]] = defaultdict(list)
        for effect in self.effects:
            found[effect.id].append(effect)
        return found

    def committed(self) -> dict[int, int]:
        """The last position that was observed of each partition."""
        return {each.partition: each.committed for each in self.positions}
