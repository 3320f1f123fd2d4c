"""Invariants 1, 2, 11 and 12: what became of the tasks, as clients and the sink saw it."""

from __future__ import annotations

from chaos import history as h
from chaos.checkers.life import TERMINAL, Life, State, lives
from chaos.history import History
from dedup.ids import id_text
from raft.commands import Outcome

MS = 1_000_000


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


def nothing_runs_that_nobody_submitted(history: History) -> list[str]:
    """1: an effect, and a claim, is of a task that somebody submitted (or may have submitted)."""
    if not history.submitted:
        return []
    strangers = {each.id for each in history.effects} - history.submitted.keys()
    return [
        f"{id_text(each)}: took effect, and nobody submitted it" for each in sorted(strangers, key=id_text)
    ]


def effects_are_as_many_as_allowed(history: History) -> list[str]:
    """2: with a sound check exactly one effect; else at most one more than the rulings that permitted another."""
    wrong = []
    known, effects = lives(history), history.effects_by_id()
    entered = set() if history.sink_is_exact else {each.id for each in history.starts}
    for submitted in history.submitted.values():
        life = known.get(submitted.id) or Life(submitted.id)
        count = len(effects.get(submitted.id, ()))
        least, most = _allowed(life, submitted.policy)
        if submitted.id in entered:
            least = 0
        if not least <= count <= most:
            wrong.append(
                f"{id_text(submitted.id)} ({submitted.policy}): {count} effects, {least} to {most} are right; "
                f"it is {life.state.value}, claimed under {life.fences}, {life.reruns} reruns"
            )
    return wrong


def _allowed(life: Life, policy: str) -> tuple[int, int]:
    executed = life.state is State.EXECUTED
    told = executed and life.by not in ("", "testimony", "check")  # a policy or a human said so, unseen
    least = 1 if executed and not told else 0
    most = 1 + life.revivals
    if policy == "check":
        most = 1
    elif policy in ("rerun", "hold"):
        most += life.reruns
    if life.state is State.NEW:
        most = 0
    elif life.state is State.CANCELLED:
        # Cancelled while it waited for a rerun: the lost attempt may have taken effect all the same.
        most = life.reruns if policy in ("rerun", "hold") else 0
    return least, most


def what_was_acknowledged_survives(history: History) -> list[str]:
    """11: an acknowledged submit is in the log or in the ledger, an acknowledged claim or settle in the ledger."""
    wrong = []
    known = lives(history)
    if history.placed:
        there = {placed.id for placed in history.placed} | history.aside
        wrong += [
            f"{id_text(each.id)}: acknowledged, and neither in the log nor in the ledger"
            for each in history.submitted.values()
            if each.acknowledged and each.id not in there and each.id not in known
        ]
    granted = {(d.id, d.fence) for d in history.decisions if isinstance(d, h.Claimed)}
    settled = {(d.id, d.fence) for d in history.decisions if isinstance(d, h.Settled)}
    for each in history.operations:
        if each.outcome is Outcome.GRANTED and (each.id, each.fence) not in granted:
            wrong.append(f"{id_text(each.id)}: {each.process} was granted fence {each.fence}, which is gone")
        if each.outcome is Outcome.SETTLED and (each.id, each.fence) not in settled:
            wrong.append(f"{id_text(each.id)}: {each.process} settled under {each.fence}, which is gone")
    return wrong


def cancelled_tasks_never_start(history: History) -> list[str]:
    """12: of an acknowledged cancel nothing was claimed, and nothing took effect."""
    known, effects = lives(history), history.effects_by_id()
    started = {each.id for each in history.starts}
    wrong = []
    for told in history.cancels:
        life = known.get(told.id)
        if life is None or life.state is not State.CANCELLED:
            wrong.append(f"{id_text(told.id)}: told cancelled, and is {life.state.value if life else 'new'}")
        if told.id in effects or told.id in started:
            what = "took effect" if told.id in effects else "started"
            wrong.append(f"{id_text(told.id)}: told cancelled, and {what}")
    return wrong


def delayed_tasks_are_never_early(history: History) -> list[str]:
    """12: nothing starts, and nothing takes effect, before it is due."""
    wrong = []
    due = {each.id: each.due_ns for each in history.submitted.values() if each.due_ns}
    moments: list[h.Started | h.Effect] = [*history.starts, *history.effects]
    for each in moments:
        early_ns = due.get(each.id, 0) - each.t_ns
        if each.t_ns and early_ns > 0:
            what = "started" if isinstance(each, h.Started) else "took effect"
            wrong.append(f"{id_text(each.id)}: {what} {early_ns / MS:.1f} ms before it was due")
    return wrong
