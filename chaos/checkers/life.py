"""The life of one id, decision by decision: a state machine written from the design and not from the ledger's code.

The two thereby check each other:

    new -> claimed -> executed | dead | waiting | suspect        suspect -> executed | waiting | dead
    new, waiting -> cancelled                                    dead, cancelled -> waiting (revived)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import assert_never

from chaos import history as h
from chaos.history import History
from dedup.ids import TaskId, id_text
from raft.commands import Result, Verdict


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
                if self.state is State.WAITING and self.revivals:
                    return  # said again, and heard the same
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
