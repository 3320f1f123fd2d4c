"""What happened, as data: the history of a cluster under test.

Witnesses that do not know each other add to one history: the *clients* (what was acknowledged), the *sink* (what
took effect, recorded outside of the system), the *ledger's log* (what was decided, in the order of the Raft
index), the *nodes* (when they asked and were answered), and the *driver* (faults, leaders). Nothing here judges:
that is chaos/checkers's, by arithmetic alone, so a history that was written down can be judged again.

Decisions stand one an id, because invariants are about ids. Their order is (index, place in the entry). Times are
nanoseconds of CLOCK_BOOTTIME, which all processes of a machine share; 0 is unknown. chaos/lines.py writes a history
to ``history.jsonl`` and reads it again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import msgspec

from dedup.ids import TaskId
from raft.commands import Fact, Outcome, Result, Verdict

# --- what clients and the sink saw --------------------------------------------------------------------------------


class Submitted(msgspec.Struct, frozen=True):
    """``acknowledged``: False where the outcome is unknown to the client. ``policy``: the handler's on_doubt."""

    id: TaskId
    policy: str
    acknowledged: bool = True
    t_ns: int = 0
    due_ns: int = 0
    """Not to be started before; 0: at once."""


class SubmitFailed(msgspec.Struct, frozen=True):
    """A client was told that nothing was stored."""

    t_ns: int
    why: str


class Started(msgspec.Struct, frozen=True):
    """A handler was entered (recorded by itself, before anything else)."""

    id: TaskId
    fence: int
    pid: int
    t_ns: int = 0


class Effect(msgspec.Struct, frozen=True):
    """One line of the sink: this task, under this fence, did what it does."""

    id: TaskId
    fence: int
    pid: int
    t_ns: int = 0


class CancelTold(msgspec.Struct, frozen=True):
    """A client was told: this will never start."""

    id: TaskId
    t_ns: int = 0


# --- what the ledger decided --------------------------------------------------------------------------------------


class Claimed(msgspec.Struct, frozen=True):
    index: int
    id: TaskId
    fence: int
    attempt: int
    session: int
    t_ns: int = 0


class Settled(msgspec.Struct, frozen=True):
    """A settle that the ledger took (perhaps as testimony, perhaps for the second time)."""

    index: int
    id: TaskId
    fence: int
    result: Result
    t_ns: int = 0


class Suspected(msgspec.Struct, frozen=True):
    index: int
    id: TaskId
    fence: int
    node: str
    incarnation: int
    why: str
    t_ns: int = 0


class Testified(msgspec.Struct, frozen=True):
    index: int
    id: TaskId
    fence: int
    node: str
    fact: Fact
    t_ns: int = 0


class Ruled(msgspec.Struct, frozen=True):
    """A suspect was closed, or held for a human. ``by`` is "testimony" where the holder's own word closed it."""

    index: int
    id: TaskId
    fence: int
    verdict: Verdict
    by: str
    t_ns: int = 0


class Cancelled(msgspec.Struct, frozen=True):
    index: int
    id: TaskId
    t_ns: int = 0


class Revived(msgspec.Struct, frozen=True):
    index: int
    id: TaskId
    t_ns: int = 0


Decision = Claimed | Settled | Suspected | Testified | Ruled | Cancelled | Revived

# --- what the nodes asked and heard -------------------------------------------------------------------------------


class Operation(msgspec.Struct, frozen=True):
    """One id of a claim or settle as the node that asked saw it. ``outcome`` None: it was never answered."""

    process: str
    op: int
    kind: str
    """CLAIM or SETTLE."""
    id: TaskId
    session: int
    called_ns: int
    returned_ns: int = 0
    fence: int = 0
    """Of a settle: under which it was said. Of a claim: which was granted."""
    result: Result | None = None
    outcome: Outcome | None = None


class Lease(msgspec.Struct, frozen=True):
    """At ``t_ns`` the node learned that it may work until ``until_ns``, its own clock."""

    t_ns: int
    node: str
    session: int
    until_ns: int


# --- what was observed of the cluster -----------------------------------------------------------------------------


class Position(msgspec.Struct, frozen=True):
    """A committed position, in the order of observation."""

    partition: int
    committed: int
    t_ns: int = 0


class Digest(msgspec.Struct, frozen=True):
    """The digest of a replica's state after the entry ``index``. ``who`` is a node, or a replay of its journal."""

    who: str
    index: int
    digest: str
    t_ns: int = 0


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


class Kept(msgspec.Struct, frozen=True):
    """For how long an executed id is known, and for how long something may bring it back. 0: for ever."""

    dedup_ms: int
    log_ms: int
    delay_ms_max: int
    retries_ms_max: int


class Fault(msgspec.Struct, frozen=True):
    """``kind``: FAULT when it struck, HEAL when its healer had run. ``where``: nodes or links."""

    t_ns: int
    kind: str
    name: str
    where: tuple[str, ...] = ()


class Led(msgspec.Struct, frozen=True):
    """Seen to lead, from its own word. Ends when another is seen, or with the same node's ``leads`` False."""

    t_ns: int
    node: str
    term: int
    leads: bool = True


class Memory(msgspec.Struct, frozen=True):
    """What a node's process holds in RAM."""

    t_ns: int
    node: str
    bytes: int


class Promise(msgspec.Struct, frozen=True):
    """What is expected of progress: so many ``tasks`` take effect within ``within_ns`` of ``since_ns``."""

    since_ns: int
    within_ns: int
    tasks: int
    memory_bytes_max: int = 0


class History:
    def __init__(self) -> None:
        self.submitted: dict[TaskId, Submitted] = {}
        self.refused: list[SubmitFailed] = []
        self.starts: list[Started] = []
        self.effects: list[Effect] = []
        self.cancels: list[CancelTold] = []
        self.decisions: list[Decision] = []
        self.operations: list[Operation] = []
        self.leases: list[Lease] = []
        self.positions: list[Position] = []
        self.digests: list[Digest] = []
        self.counted: Counted | None = None
        self.placed: list[Placed] = []
        self.aside: set[TaskId] = set()
        self.kept: Kept | None = None
        self.faults: list[Fault] = []
        self.leaders: list[Led] = []
        self.memory: list[Memory] = []
        self.promises: list[Promise] = []
        self.sink_is_exact = True
        """False where the sink stands around foreign handlers: what was entered may have taken effect untold."""

    def submit(
        self,
        ids: Iterable[TaskId],
        policy: str,
        *,
        acknowledged: bool = True,
        t_ns: int = 0,
        due_ns: int = 0,
    ) -> None:
        for task_id in ids:
            known = self.submitted.get(task_id)
            # A second submit of the same id (a key, a repeated send) is the same task; one acknowledgement counts.
            if known is None or (acknowledged and not known.acknowledged):
                self.submitted[task_id] = Submitted(task_id, policy, acknowledged, t_ns, due_ns)

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
