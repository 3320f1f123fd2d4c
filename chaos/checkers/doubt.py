"""Invariant 9: suspects, the evidence about them, and what closes them."""

from __future__ import annotations

from collections import defaultdict

from chaos import history as h
from chaos.checkers.life import State, lives
from chaos.history import History
from dedup.ids import TaskId, id_text
from raft.commands import Fact


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


def testimony_tells_the_truth(history: History) -> list[str]:
    """9: under a fence that "never started" nothing started or acted; one that "finished" had its effect."""
    started = {(each.id, each.fence) for each in history.starts}
    acted = {(each.id, each.fence) for each in history.effects}
    wrong = []
    for each in history.decisions:
        if not isinstance(each, h.Testified):
            continue
        under = (each.id, each.fence)
        if each.fact is Fact.NEVER_STARTED and (under in started or under in acted):
            wrong.append(f"{id_text(each.id)} under {each.fence}: testified never started, and it had")
        if each.fact is Fact.FINISHED and under not in acted and history.starts:
            wrong.append(f"{id_text(each.id)} under {each.fence}: testified finished, without an effect")
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
