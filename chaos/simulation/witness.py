"""What is true in a simulation: it sees everything at once, and judges while it runs and after.

While it runs, the *canonical log* is whatever any replica applied first at an index: another entry, another order
or another digest there is a violation, whoever says it. Decisions make each id's life (chaos/checkers/life.py);
a start, an effect, a position or an answer to a client that does not fit the lives at that very moment is a
violation. After the run the whole history goes through all of chaos/checkers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chaos import history as h
from chaos.checkers.life import TERMINAL, Life, State
from chaos.history import History
from chaos.replay import _decisions as decisions_of
from chaos.simulation.postponing import Promises
from chaos.simulation.timetables import Timetables
from dedup.ids import Ids, TaskId, id_text
from node.workers.port import Work
from oncekeeper.log.delayed import Place
from oncekeeper.log.memory import MemoryLog
from raft import commands as c
from raft.ledger import Ledger

if TYPE_CHECKING:
    from chaos.simulation.loop import Scheduler
    from chaos.simulation.machine import Machine
    from chaos.simulation.process import Process

DIGEST_EVERY = 64
LEDGER_AHEAD_MS = 4000.0
"""By how much ledger time may gain on true time within a run: what was in flight over slow links, and drift."""


@dataclass(frozen=True)
class Violation:
    invariant: int
    what: str
    ids: tuple[TaskId, ...] = ()


class Violated(Exception):
    """Ends a run."""


class Witness:
    def __init__(self, scheduler: Scheduler, log: MemoryLog, late_ms: int) -> None:
        self.scheduler = scheduler
        self.history = History()
        self.violations: list[Violation] = []
        self.lives: dict[TaskId, Life] = {}
        self.events: list[tuple[int, str, str, TaskId | None, str]] = []
        """(t_ns, process, kind, id, text): for people, in order."""
        self.canonical: dict[int, bytes] = {}
        self.highest = 0
        self.digests: dict[int, tuple[str, bytes]] = {}
        self.cancelled: set[TaskId] = set()
        self.promises = Promises(self)
        self.timetables = Timetables(self, late_ms)
        self.retry_due_ms: dict[TaskId, int] = {}
        self.reached: set[str] = set()
        """What happened at least once: for the report of what a batch of seeds covers."""
        self._log = log
        self.processes: dict[str, Process] = {}
        self._most_slack_ms = 0.0
        self._tokens: set[tuple[int, int]] = set()
        self._words: set[tuple[TaskId, int, int]] = set()
        self._ledger_ms = 0
        self._reached: dict[int, int] = {}
        """What each life of a node has applied so far."""
        self.proposers: dict[int, float] = {}
        """When the life of each proposer began."""
        self._measured_ms: Counter[int] = Counter()
        self.happened: Callable[..., None] = lambda kind, *args: None
        """For whoever aims faults by what is decided (cluster.py)."""

    @property
    def t_ns(self) -> int:
        return int(self.scheduler.now * 1e9)

    # --- telling ------------------------------------------------------------------------------------------------

    def note(self, process: str, kind: str, task_id: TaskId | None = None, text: str = "") -> None:
        self.events.append((self.t_ns, process, kind, task_id, text))

    def violated(self, invariant: int, what: str, *ids: TaskId) -> None:
        self.violations.append(Violation(invariant, what, ids))
        self.note("witness", "VIOLATION", ids[0] if ids else None, f"invariant {invariant}: {what}")
        self.scheduler.clear()

    def life(self, task_id: TaskId) -> Life:
        life = self.lives.get(task_id)
        if life is None:
            life = self.lives[task_id] = Life(task_id)
        return life

    # --- the ledger's log ---------------------------------------------------------------------------------------

    def applied(
        self, node: str, index: int, payload: bytes, effects: c.Effects, ledger: Ledger, life: int
    ) -> None:
        self._reached[life] = index
        known = self.canonical.get(index)
        if known is not None:
            if known != payload:
                self.violated(
                    11, f"{node} applies another entry at index {index} than was applied there before"
                )
        else:
            self.canonical[index] = payload
            if index < self.highest:
                self.violated(11, f"{node} applies index {index} for the first time, after {self.highest}")
            self.highest = max(self.highest, index)
            if not effects.repeated:
                self._once(effects)
                self._measured(effects.proposal)
                self._decided(effects, ledger)
                self.timetables.on(effects)
            self._time_passed(ledger.now_ms)
        if index % DIGEST_EVERY == 0:
            self.digest(node, index, ledger)

    def restored(self, node: str, life: int, index: int) -> None:
        """A snapshot takes a node forward, or it would answer by what it knew before."""
        reached = self._reached.get(life, 0)
        if index < reached:
            self.violated(11, f"{node} goes back to a snapshot of index {index}, having applied {reached}")
        self._reached[life] = index

    def _measured(self, proposal: c.Proposal) -> None:
        """A leader adds to ledger time what it measured, and nobody can measure more than has passed."""
        for command in proposal.commands:
            born = self.proposers.get(proposal.proposer)
            if not isinstance(command, c.Advance) or born is None:
                continue
            self._measured_ms[proposal.proposer] += command.elapsed_ms
            told, passed = self._measured_ms[proposal.proposer], (self.scheduler.now - born) * 1000
            if told > passed * 1.01 + 5:
                text = f"{command.timekeeper} has measured {told} ms of ledger time, and lives for {passed:.0f} ms"
                self.violated(4, text)

    def _once(self, effects: c.Effects) -> None:
        """What is asked again under its token is not applied again; words of witnesses count once."""
        proposal = effects.proposal
        token = (proposal.proposer, proposal.sequence)
        if proposal.commands and token in self._tokens:
            self.violated(3, f"the proposal {token} is applied a second time, at index {effects.index}")
        self._tokens.add(token)
        said = [command.incarnation for command in proposal.commands if isinstance(command, c.Testify)]
        rules = [command for command in proposal.commands if isinstance(command, c.Rule) and command.fence]
        for event in effects.events:
            if isinstance(event, c.Testified):
                self.happened("testified", event.node, event)
            if isinstance(event, c.Testified) and len(said) == len(proposal.commands) == 1:
                for task_id in event.ids:
                    word = (task_id, event.fence, said[0])
                    if word in self._words:
                        self.violated(
                            9, f"{id_text(task_id)}: incarnation {said[0]} testifies twice", task_id
                        )
                    self._words.add(word)
            alone = len(rules) == len(proposal.commands) == 1
            if isinstance(event, c.Resolved) and alone and event.fence != rules[0].fence:
                text = f"a ruling on fence {rules[0].fence} closes the suspect of fence {event.fence}"
                self.violated(5, text, *event.ids)

    def digest(self, node: str, index: int, ledger: Ledger) -> None:
        digest = ledger.digest()
        first = self.digests.setdefault(index, (node, digest))
        self.history.digests.append(h.Digest(node, index, digest.hex(), self.t_ns))
        if first[1] != digest:
            self.violated(10, f"at index {index} the state of {node} differs from that of {first[0]}")

    def _time_passed(self, now_ms: int) -> None:
        if now_ms < self._ledger_ms:
            self.violated(4, f"ledger time went back from {self._ledger_ms} to {now_ms} ms")
        self._ledger_ms = now_ms
        slack = self.scheduler.now * 1000 - now_ms
        # How far true time was ahead of the ledger's at most: from there on it may lose no more than the margin.
        self._most_slack_ms = max(self._most_slack_ms, slack)
        if slack < self._most_slack_ms - LEDGER_AHEAD_MS - 0.02 * self.scheduler.now * 1000:
            gained = self._most_slack_ms - slack
            self.violated(4, f"ledger time gained {gained:.0f} ms on true time: leases end early")

    def _decided(self, effects: c.Effects, ledger: Ledger) -> None:
        t_ns = self.t_ns
        delays = {
            (task_id, settlement.fence): settlement.delay_ms
            for command in effects.proposal.commands
            if isinstance(command, c.Settle)
            for settlement in command.settlements
            if settlement.result is c.Result.RETRY and settlement.delay_ms
            for task_id in settlement.ids
        }
        for decision in decisions_of(effects):
            self.history.decisions.append(decision)
            life = self.life(decision.id)
            if isinstance(decision, h.Cancelled | h.Revived):
                self.retry_due_ms.pop(decision.id, None)
            if isinstance(decision, h.Revived):
                self.cancelled.discard(
                    decision.id
                )  # whenever its canceller hears: somebody wants it after all
                self.promises.revived(decision.id)
            if isinstance(decision, h.Claimed):
                due = self.retry_due_ms.pop(decision.id, 0)
                if life.state is State.WAITING and ledger.now_ms < due:
                    text = f"claimed at {ledger.now_ms} ms of ledger time; its retry is due at {due}"
                    self.violated(12, f"{id_text(decision.id)}: {text}", decision.id)
            if isinstance(decision, h.Settled):
                self._retried(decision, life, ledger.now_ms, delays.get((decision.id, decision.fence), 0))
            wrong = len(life.wrong)
            life.on(decision)
            self.events.append(
                (t_ns, "ledger", type(decision).__name__.upper(), decision.id, _text(decision))
            )
            self.reached.add(type(decision).__name__)
            if len(life.wrong) > wrong:
                self.violated(3, life.wrong[-1], decision.id)
        for command in effects.proposal.commands:
            if isinstance(command, c.Hold) and not command.hold_ms:
                for task_id in command.ids:  # it takes a retry's delay back
                    self.retry_due_ms.pop(task_id, None)
        for event in effects.events:
            if isinstance(event, c.SessionOpened | c.SessionClosed):
                why = f" {event.why}" if isinstance(event, c.SessionClosed) else ""
                self.reached.add(type(event).__name__ + why)
                if isinstance(event, c.SessionOpened):
                    self.happened("session opened", event.node)
                if isinstance(event, c.SessionClosed) and event.why == "lapsed":
                    self._lapsed(event)
                text = f"{event.node} session {event.session} incarnation {event.incarnation}{why}"
                self.note("ledger", type(event).__name__.upper(), None, f"{effects.index}: {text}")

    def _retried(self, settled: h.Settled, life: Life, now_ms: int, delay_ms: int) -> None:
        # Only what closes the claim: a late settle is fenced, and delays nobody.
        if settled.result is c.Result.RETRY and life.state is State.CLAIMED and life.fence == settled.fence:
            self.retry_due_ms[settled.id] = now_ms + delay_ms

    def _lapsed(self, event: c.SessionClosed) -> None:
        """A session may lapse only when its node, by its own clock, has stopped already."""
        process = self.processes.get(event.node)
        if process is None or not process.alive or process.service is None:
            return
        keeper = process.service.session
        left_ms = keeper.lease.left_ms(process.machine.clock.lease_ms())
        if keeper.session == event.session and left_ms > 0:
            text = f"session {event.session} of {event.node} lapsed, and its lease has {left_ms} ms left"
            self.violated(4, text)

    # --- the sink -----------------------------------------------------------------------------------------------

    def started(self, machine: Machine, work: Work, task_id: TaskId, due_ms: int) -> None:
        self.note(machine.name, "START", task_id, f"fence {work.fence} attempt {work.attempt}")
        self.history.starts.append(h.Started(task_id, work.fence, 0, self.t_ns))
        life = self.lives.get(task_id)
        if life is None or work.fence not in life.fences:
            self.violated(4, f"{id_text(task_id)} starts under fence {work.fence}, never granted", task_id)
        elif life.state is not State.CLAIMED or life.fence != work.fence:
            what = (
                f"starts on {machine.name} under fence {work.fence}, and is {life.state.value} ({life.fence})"
            )
            self.violated(4, f"{id_text(task_id)} {what}: its claim is gone", task_id)
        if task_id in self.cancelled:
            self.violated(
                12, f"{id_text(task_id)} starts, and a client was told that it is cancelled", task_id
            )
        if due_ms:
            clock, world = machine.clock, machine.world
            latest_ms = world.wall_peak_ms() if world.walls_jumped else clock.wall_ms()
            if latest_ms < due_ms:
                self.violated(12, f"{id_text(task_id)} starts {due_ms - latest_ms} ms early", task_id)

    def effect(self, machine: Machine, work: Work, task_id: TaskId, pid: int) -> None:
        self.note(machine.name, "EFFECT", task_id, f"fence {work.fence} pid {pid}")
        self.history.effects.append(h.Effect(task_id, work.fence, pid, self.t_ns))
        life = self.lives.get(task_id)
        if life is not None and (life.state is not State.CLAIMED or life.fence != work.fence):
            what = f"takes effect under fence {work.fence}, and is {life.state.value} ({life.fence})"
            self.violated(5, f"{id_text(task_id)} {what}: a zombie", task_id)

    # --- the task log -------------------------------------------------------------------------------------------

    def placed(self, partition: int, base: int, ids: Ids) -> None:
        for at, task_id in enumerate(ids):
            self.history.placed.append(h.Placed(partition, base + at, task_id))

    def committing(self, node: str, positions: dict[int, int]) -> None:
        """Called before the log takes them, so that the offsets that are passed can be looked up."""
        committed = self._log.committed()
        for partition, position in sorted(positions.items()):
            before = committed.get(partition, 0)
            if position < before:
                continue  # an owner of old; the log ignores it
            self.note(node, "COMMIT", None, f"partition {partition} from {before} to {position}")
            self.history.positions.append(h.Position(partition, position, self.t_ns))
            for placed in self.history.placed:
                if placed.partition == partition and before <= placed.offset < position:
                    self._passed(placed)

    def dropping(self, node: str, places: Iterable[Place]) -> None:
        """Called before the log forgets delayed tasks: they must have ended, or lie aside."""
        self.note(node, "DROP", None, f"{len(list(places))} places")
        for place in places:
            for placed in self.history.placed:
                here = placed.partition == place.partition
                if here and place.offset <= placed.offset < place.offset + place.count:
                    life = self.lives.get(placed.id)
                    state = life.state if life is not None else State.NEW
                    elsewhere = self._log.find_aside(_ids(placed.id)) or self._stands_again(placed)
                    if state not in TERMINAL and not elsewhere:
                        self.violated(6, f"{id_text(placed.id)} is dropped, and is {state.value}", placed.id)
                    self.reached.add("delayed tasks dropped")

    def _stands_again(self, passed: h.Placed) -> bool:
        """It was appended again, and that place is not passed, or kept."""
        committed = self._log.committed()
        return any(
            other.id == passed.id
            and other is not passed
            and (
                other.offset >= committed[other.partition]
                or self._log.delays.holds(other.partition, other.offset, other.offset + 1)
            )
            for other in self.history.placed
        )

    def _passed(self, placed: h.Placed) -> None:
        life = self.lives.get(placed.id)
        state = life.state if life is not None else State.NEW
        if state in TERMINAL and state is not State.DEAD:
            return
        if state not in TERMINAL and self._log.delays.holds(
            placed.partition, placed.offset, placed.offset + 1
        ):
            self.reached.add("delayed tasks kept")
            return
        aside = bool(self._log.find_aside(_ids(placed.id)))
        if state not in TERMINAL and not aside and not self._stands_again(placed):
            self.violated(
                6,
                f"{id_text(placed.id)} at offset {placed.offset} of partition {placed.partition} is passed, and is "
                f"{state.value}",
                placed.id,
            )
        if state is State.DEAD and not aside:
            self.violated(6, f"{id_text(placed.id)} is dead, and its message is not aside", placed.id)


def _ids(task_id: TaskId) -> Ids:
    return Ids((), (task_id,)) if isinstance(task_id, bytes) else Ids(((task_id, 1),))


def _text(decision: Any) -> str:
    fields = [
        f"{name} {getattr(decision, name)}"
        for name in decision.__struct_fields__
        if name not in ("id", "t_ns")
    ]
    return ", ".join(fields)
