"""Invariants 10, 13 and 14: replicas that agree, a cluster that goes on, and counters that are true."""

from __future__ import annotations

from chaos import history as h
from chaos.checkers.life import State, lives
from chaos.history import History

S = 1_000_000_000
MIB = 1 << 20


def replicas_agree(history: History) -> list[str]:
    """10: equal index, equal digest."""
    wrong = []
    first: dict[int, h.Digest] = {}
    for each in history.digests:
        other = first.setdefault(each.index, each)
        if other.digest != each.digest:
            wrong.append(f"index {each.index}: {other.who} has {other.digest}, {each.who} has {each.digest}")
    return wrong


def one_leader_a_term(history: History) -> list[str]:
    """10: no term has two leaders (Raft's election safety, which everything else rests on)."""
    wrong = []
    first: dict[int, str] = {}
    for each in history.leaders:
        if each.leads and first.setdefault(each.term, each.node) != each.node:
            wrong.append(f"term {each.term}: {first[each.term]} led it, and {each.node} too")
    return wrong


def progress_after_healing(history: History) -> list[str]:
    """13: where progress was promised from some time on, tasks take effect within the bound."""
    wrong = []
    for promise in history.promises:
        found = sum(
            promise.since_ns <= each.t_ns <= promise.since_ns + promise.within_ns for each in history.effects
        )
        if found < promise.tasks:
            wrong.append(
                f"{found} tasks took effect within {promise.within_ns / S:g} s of the healing, "
                f"{promise.tasks} were promised"
            )
    return wrong


def every_fault_was_healed(history: History) -> list[str]:
    """13: no fault is left standing at the end, so that what was seen last is the healthy cluster."""
    standing: list[str] = []
    for each in history.faults:
        if each.kind == "FAULT":
            standing.append(each.name)
        elif each.name in standing:
            standing.remove(each.name)
    return [f"{name} was never healed" for name in standing]


def memory_is_bounded(history: History) -> list[str]:
    """13: no node ever held more RAM than the scenario allows."""
    most = max((promise.memory_bytes_max for promise in history.promises), default=0)
    worst: dict[str, int] = {}
    for each in history.memory:
        worst[each.node] = max(worst.get(each.node, 0), each.bytes)
    return [
        f"{node} held {found / MIB:.0f} MiB, {most / MIB:.0f} MiB are allowed"
        for node, found in sorted(worst.items())
        if most and found > most
    ]


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
