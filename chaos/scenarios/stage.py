"""What a scenario plays on: the nodes, the load, and a notebook of what it saw.

Three kinds of findings, kept apart: invariants (chaos/checkers), *expectations* of this very scenario (the old
leader confirms nothing), and *bounds* in time, which say how long something took beside how long it may take. A
bound that is missed on a busy machine is told as such; it is never widened, and it is no wrong result.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from chaos import history as h
from chaos.faults import Fault, now_ns
from chaos.history import History
from chaos.scenarios.load import Kind, Load
from chaos.scenarios.nodes import Nodes, eventually
from chaos.sink import RECORD
from chaos.traps import set_trap
from dedup.ids import Ids, TaskId, id_text
from raft.commands import Outcome

MS = 1_000_000
S = 1_000_000_000
PROGRESS_S = 30.0
MEMORY_BYTES_MAX = 1 << 30


@dataclass(frozen=True)
class Bound:
    what: str
    took_ms: float | None  # None: it did not happen
    bound_ms: float

    @property
    def met(self) -> bool:
        return self.took_ms is not None and self.took_ms <= self.bound_ms


@dataclass
class Stage:
    nodes: Nodes
    load: Load
    kinds: tuple[Kind, ...]
    random: random.Random
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    afterwards: list[Callable[[History], list[str]]] = field(default_factory=list)
    """Expectations that need the whole history."""
    strikes: list[tuple[str, int, int]] = field(default_factory=list)
    """(fault, struck, healed) in ns: of each it is told how soon claims were granted again."""
    resume_bound_ms: float = 0
    """Claims must be granted again so soon after the strike; 0: while it stands they need not."""

    # --- work -----------------------------------------------------------------------------------------------

    def effects(self) -> int:
        return self.nodes.sink.size()

    def flow(self, tasks: int = 40, seconds: float = PROGRESS_S) -> None:
        """Until so many more moments (starts and effects) are in the sink."""
        before = self.effects()
        wanted = before + 2 * tasks * RECORD.size
        eventually(f"{tasks} more tasks take effect", lambda: self.effects() >= wanted, seconds)

    def hold(self, seconds: float) -> None:
        """The fault stands for this long. What happens meanwhile is in the history."""
        time.sleep(seconds)

    def kind(self, handler: str) -> Kind:
        """The handler of our own application, or of a foreign one that which is nearest: checked, or the first."""
        if self.nodes.is_own:
            policies = {"careful": "hold", "at_most": "skip", "again": "rerun"}
            return Kind(f"chaos.{handler}", policies.get(handler, "check"))
        return next((each for each in self.kinds if each.policy == "check"), self.kinds[0])

    def trap(self, handler: str, place: str, deed: str) -> TaskId:
        """Submit a task that this will befall, once."""

        def allocated() -> int:
            status, answer = self.nodes.post("/v1/ids", {"count": 1})
            return int(answer["start"]) if status == 200 else 0

        number = eventually("an id is allocated", allocated)
        set_trap(self.nodes.home, id_text(number), place, deed)
        self.load.submit(self.kind(handler), ids=Ids(((number, 1),)))
        return number

    def taken(self, task_id: TaskId, seconds: float = PROGRESS_S) -> None:
        """Until the trap has sprung."""
        trap = self.nodes.home / "traps" / id_text(task_id)
        eventually(f"task {id_text(task_id)} is caught", lambda: not trap.exists(), seconds)

    # --- faults -----------------------------------------------------------------------------------------------

    @contextmanager
    def during(self, fault: Fault) -> Iterator[int]:
        """The fault stands in the block; when it struck, in ns."""
        struck = 0
        try:
            with self.nodes.faults.standing(fault) as struck:
                yield struck
        finally:
            if struck:
                self.strikes.append((fault.name, struck, now_ns()))

    def strike_for(self, fault: Fault, seconds: float) -> None:
        with self.during(fault):
            self.hold(seconds)

    # --- findings -----------------------------------------------------------------------------------------------

    def expect(self, true: bool, otherwise: str) -> None:
        if not true:
            self.wrong.append(otherwise)

    def within(self, what: str, bound_s: float, look: Callable[[], object], since: float) -> None:
        """Look until it is true, however long it takes; tell how long after ``since`` (monotonic) that was."""
        eventually(what, lambda: bool(look()), pause_s=0.02)
        self.bounds.append(Bound(what, (time.monotonic() - since) * 1000, bound_s * 1000))

    def confirms_nothing(self, node: str, since_ns: int, until_ns: int) -> None:
        """What this node asked after ``since_ns`` was not granted before ``until_ns``."""

        def look(history: History) -> list[str]:
            return [
                f"{each.process} heard {each.outcome.name} for {id_text(each.id)} while it was cut off"
                for each in history.operations
                if each.process.startswith(f"{node}/")
                and each.outcome in (Outcome.GRANTED, Outcome.SETTLED)
                and since_ns < each.called_ns
                and each.returned_ns < until_ns
            ]

        self.afterwards.append(look)

    def no_submit_fails(self) -> None:
        self.afterwards.append(
            lambda history: (
                [f"a submit failed: {each.why}" for each in history.refused]
                + [
                    f"a submit's outcome was unknown: {id_text(each.id)}"
                    for each in history.submitted.values()
                    if not each.acknowledged
                ]
            )
        )

    def finish(self, history: History) -> None:
        """What can be said only now."""
        for name, struck, healed in self.strikes:
            after_ms = first_grant_ms(history, struck)
            healed_ms = first_grant_ms(history, healed)
            self.notes.append(
                f"{name}: claims were granted {_ms(after_ms)} after the strike, {_ms(healed_ms)} after healing"
            )
            if self.resume_bound_ms:
                self.bounds.append(
                    Bound(f"claims are granted again after {name}", after_ms, self.resume_bound_ms)
                )
        self.notes.append(f"the slowest submit took {_ms(self.load.slowest_ns / MS)}")
        for look in self.afterwards:
            self.wrong += look(history)

    def promise(self, tasks: int) -> None:
        self.nodes.history.promises.append(h.Promise(now_ns(), int(PROGRESS_S * S), tasks, MEMORY_BYTES_MAX))


def first_grant_ms(history: History, since_ns: int) -> float | None:
    """From ``since_ns`` to the first grant that was asked for after it: nothing that was on its way counts."""
    answers = [
        each.returned_ns
        for each in history.operations
        if each.kind == "CLAIM" and each.outcome is Outcome.GRANTED and each.called_ns > since_ns
    ]
    return (min(answers) - since_ns) / MS if answers else None


def _ms(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f} ms"
