"""Whether a history keeps its promises: pure arithmetic over chaos/history.py, one function an invariant.

Each returns what is wrong, in sentences that name the id and the numbers; an empty list is the proof that there
was nothing to find in this history. The numbers of the functions are those of the invariants in the design's list.
The life of an id is followed by a state machine of its own, written from the design and not from the ledger's
code, so that the two check each other:

    new -> claimed -> executed | dead | waiting | suspect        suspect -> executed | waiting | dead
    new, waiting -> cancelled                                    dead, cancelled -> waiting (revived)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import assert_never

from chaos import history as h
from chaos.history import History
from dedup.ids import TaskId, id_text
from raft.commands import Fact, Result, Verdict

Checker = Callable[[History], list[str]]


class State(Enum):
    NEW = "new"
    CLAIMED = "claimed"
    WAITING = "waiting"
    SUSPECT = "suspect"
    EXECUTED = "executed"
    DEAD = "dead"
    CANCELLED = "cancelled"


TERMINAL = (State.EXECUTED, State.DEAD, State.CANCELLED)


@dataclass
class Life:
    """What became of one id, decision by decision, and what in that was not allowed."""

    id: TaskId
    state: State = State.NEW
    fence: int = 0
    fences: list[int] = field(default_factory=list)
    reruns: int = 0  # permissions to run again after a run that may have taken effect
    revivals: int = 0
    by: str = ""  # what closed it, where a ruling did
    suspected_at: int = 0
    wrong: list[str] = field(default_factory=list)
    _dead_by_word: int = 0

    def on(self, decision: h.Decision) -> None:
        match decision:
            case h.Claimed():
                self._claimed(decision)
            case h.Settled(index, _, fence, result):
                self._settled(index, fence, result)
            case h.Suspected(index, _, fence):
                if self.state is not State.CLAIMED or fence != self.fence:
                    self._bad(decision, "is no open claim")
                self.state, self.suspected_at = State.SUSPECT, index
            case h.Testified(_, _, fence):
                if self.state is not State.SUSPECT or fence != self.fence:
                    self._bad(decision, "is no suspect")
            case h.Ruled(index, _, fence, verdict, by):
                if self.state is not State.SUSPECT or fence != self.fence:
                    self._bad(decision, "is no suspect")
                self._ruled(index, verdict, by)
            case h.Cancelled():
                if self.state not in (State.NEW, State.WAITING):
                    self._bad(decision, "had started or ended")
                self.state = State.CANCELLED
            case h.Revived():
                if self.state not in (State.DEAD, State.CANCELLED):
                    self._bad(decision, "was neither dead nor cancelled")
                self.state = State.WAITING
                self.revivals += 1
            case _:
                assert_never(decision)

    def _bad(self, decision: h.Decision, why: str) -> None:
        self.wrong.append(f"{id_text(self.id)}: {decision} of what {why} (it is {self.state.value})")

    def _claimed(self, claim: h.Claimed) -> None:
        if self.state is State.CLAIMED and claim.fence == self.fence:
            return  # the same session asked again, and heard the same
        if self.state not in (State.NEW, State.WAITING):
            self._bad(claim, "may not be claimed")
        if claim.fence != claim.index:
            self._bad(claim, "has another fence than its entry")
        self.state, self.fence = State.CLAIMED, claim.fence
        self.fences.append(claim.fence)

    def _settled(self, index: int, fence: int, result: Result) -> None:
        if self.state is State.SUSPECT and fence == self.fence and result is Result.DEAD:
            self._dead_by_word = index  # the testimony that follows says "failed", and this was the last try
        if self.state is not State.CLAIMED:
            return  # said again, or as testimony: the events that follow tell what it changed
        if fence != self.fence:
            self.wrong.append(f"{id_text(self.id)}: settled under {fence}, claimed under {self.fence}")
        match result:
            case Result.DONE:
                self.state = State.EXECUTED
            case Result.DEAD:
                self.state = State.DEAD
            case Result.RETRY:
                self.state = State.WAITING
                self.reruns += 1
            case Result.RELEASED:
                self.state = State.WAITING
            case Result.DOUBT:
                pass  # Suspected follows

    def _ruled(self, index: int, verdict: Verdict, by: str) -> None:
        if verdict is Verdict.HELD:
            return
        self.by = by
        if verdict is Verdict.EXECUTED:
            self.state = State.EXECUTED
        elif self._dead_by_word == index:
            self.state = State.DEAD
        else:
            self.state = State.WAITING
            self.reruns += 1


def lives(history: History) -> dict[TaskId, Life]:
    found: dict[TaskId, Life] = {}
    for task_id, decisions in history.by_id().items():
        life = found[task_id] = Life(task_id)
        for decision in decisions:
            life.on(decision)
    return found


# --- the invariants -----------------------------------------------------------------------------------------------


def each_acknowledged_task_ends_once(history: History) -> list[str]:
    """1: each acknowledged submit reaches exactly one terminal state (a suspect that a human must rule is none)."""
    wrong = []
    known = lives(history)
    for submitted in history.submitted.values():
        life = known.get(submitted.id)
        state = life.state if life is not None else State.NEW
        if submitted.acknowledged and state not in TERMINAL:
            wrong.append(f"{id_text(submitted.id)} ({submitted.policy}): acknowledged, and is {state.value}")
    return wrong


def effects_are_as_many_as_allowed(history: History) -> list[str]:
    """2: with a sound check exactly one effect; else at most one more than the rulings that permitted another."""
    wrong = []
    known, effects = lives(history), history.effects_by_id()
    for submitted in history.submitted.values():
        life = known.get(submitted.id) or Life(submitted.id)
        count = len(effects.get(submitted.id, ()))
        executed = life.state is State.EXECUTED
        told = executed and life.by not in ("", "testimony", "check")  # a policy or a human said so, unseen
        least = 1 if executed and not told else 0
        most = 1 + life.revivals
        if submitted.policy == "check":
            most = 1
        elif submitted.policy in ("rerun", "hold"):
            most += life.reruns
        if life.state in (State.CANCELLED, State.NEW):
            most = 0
        if not least <= count <= most:
            wrong.append(
                f"{id_text(submitted.id)} ({submitted.policy}): {count} effects, {least} to {most} are right; "
                f"it is {life.state.value}, claimed under {life.fences}, {life.reruns} reruns"
            )
    return wrong


def claims_and_settles_are_linear(history: History) -> list[str]:
    """3 and 9: every decision fits the state that the ones before left; fences grow; suspects rerun by evidence."""
    wrong = []
    for life in lives(history).values():
        wrong += life.wrong
        wrong += [
            f"{id_text(life.id)}: fence {later} after {earlier}"
            for earlier, later in pairwise(life.fences)
            if later <= earlier
        ]
    return wrong


def effects_happen_under_committed_claims(history: History) -> list[str]:
    """4 and 5: who made an effect had been granted this id under this fence, and nobody twice under one."""
    wrong = []
    granted = {(d.id, d.fence) for d in history.decisions if isinstance(d, h.Claimed)}
    seen: set[tuple[TaskId, int]] = set()
    for effect in history.effects:
        under = (effect.id, effect.fence)
        if under not in granted:
            wrong.append(
                f"{id_text(effect.id)}: an effect under fence {effect.fence}, which was never granted"
            )
        if under in seen:
            wrong.append(f"{id_text(effect.id)}: two effects under fence {effect.fence}")
        seen.add(under)
    return wrong


def positions_pass_nothing_open(history: History) -> list[str]:
    """6: below the committed position all is terminal or durably aside."""
    wrong = []
    known, committed = lives(history), history.committed()
    for placed in history.placed:
        if placed.offset >= committed.get(placed.partition, 0) or placed.id in history.aside:
            continue
        state = known[placed.id].state if placed.id in known else State.NEW
        if state not in TERMINAL:
            wrong.append(
                f"{id_text(placed.id)}: passed by position {committed[placed.partition]} of partition "
                f"{placed.partition} at offset {placed.offset}, and is {state.value}"
            )
    return wrong


def positions_never_go_back(history: History) -> list[str]:
    """7."""
    wrong = []
    highest: dict[int, int] = defaultdict(int)
    for each in history.positions:
        if each.committed < highest[each.partition]:
            wrong.append(f"partition {each.partition}: from {highest[each.partition]} to {each.committed}")
        highest[each.partition] = max(highest[each.partition], each.committed)
    return wrong


def one_testimony_each(history: History) -> list[str]:
    """9: a suspect is closed once by its holder's word, and "started" is never followed by "never started"."""
    wrong = []
    words: dict[tuple[TaskId, int], list[Fact]] = defaultdict(list)
    for each in history.decisions:
        if isinstance(each, h.Testified):
            words[each.id, each.fence].append(each.fact)
    for (task_id, fence), facts in words.items():
        closing = [fact for fact in facts if fact is not Fact.STARTED]
        if len(closing) > 1 or (Fact.NEVER_STARTED in facts and Fact.STARTED in facts):
            wrong.append(f"{id_text(task_id)} under {fence}: testified {[fact.name for fact in facts]}")
    return wrong


def no_suspect_waits_where_evidence_exists(history: History) -> list[str]:
    """9: what may be decided without a human was decided."""
    return [
        f"{id_text(life.id)}: a suspect since index {life.suspected_at}, and its policy needs no human"
        for life in lives(history).values()
        if life.state is State.SUSPECT
        and life.id in history.submitted
        and history.submitted[life.id].policy != "hold"
    ]


def replicas_agree(history: History) -> list[str]:
    """10: equal index, equal digest."""
    wrong = []
    first: dict[int, h.Digest] = {}
    for each in history.digests:
        other = first.setdefault(each.index, each)
        if other.digest != each.digest:
            wrong.append(f"index {each.index}: {other.who} has {other.digest}, {each.who} has {each.digest}")
    return wrong


def cancelled_tasks_never_start(history: History) -> list[str]:
    """12: of an acknowledged cancel nothing was claimed, and nothing took effect."""
    known, effects = lives(history), history.effects_by_id()
    wrong = []
    for told in history.cancels:
        life = known.get(told.id)
        if life is None or life.state is not State.CANCELLED:
            wrong.append(f"{id_text(told.id)}: told cancelled, and is {life.state.value if life else 'new'}")
        if told.id in effects:
            wrong.append(f"{id_text(told.id)}: told cancelled, and took effect")
    return wrong


def counters_are_true(history: History) -> list[str]:
    """14: what people are shown is what happened."""
    if history.counted is None:
        return []
    states = [life.state for life in lives(history).values()]
    true = h.Counted(
        executed=states.count(State.EXECUTED),
        dead=states.count(State.DEAD),
        cancelled=states.count(State.CANCELLED),
        suspect=states.count(State.SUSPECT),
    )
    return [] if true == history.counted else [f"shown {history.counted}, the history has {true}"]


ALL: tuple[Checker, ...] = (
    each_acknowledged_task_ends_once,
    effects_are_as_many_as_allowed,
    claims_and_settles_are_linear,
    effects_happen_under_committed_claims,
    positions_pass_nothing_open,
    positions_never_go_back,
    one_testimony_each,
    no_suspect_waits_where_evidence_exists,
    replicas_agree,
    cancelled_tasks_never_start,
    counters_are_true,
)


def violations(history: History, checkers: tuple[Checker, ...] = ALL) -> dict[str, list[str]]:
    """By checker, only those that found something."""
    found = {checker.__name__: checker(history) for checker in checkers}
    return {name: wrong for name, wrong in found.items() if wrong}
