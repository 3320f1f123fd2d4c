"""Whether a history keeps its promises: pure arithmetic over chaos/history.py.

Each checker returns what is wrong, in sentences that name the id and the numbers; an empty list is the proof that
there was nothing to find in this history. INVARIANTS numbers them as the design does; where a witness gave no times
(a history without nodes' own records), the checkers that need them have nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chaos.checkers.claims import (
    claims_and_settles_are_linear,
    effects_happen_under_committed_claims,
    late_effects,
    no_effect_after_the_claim_was_lost,
    old_fences_are_rejected,
    starts_follow_their_claims,
    zombies,
)
from chaos.checkers.doubt import (
    no_suspect_waits_where_evidence_exists,
    one_testimony_each,
    testimony_tells_the_truth,
)
from chaos.checkers.life import TERMINAL, Life, State, lives
from chaos.checkers.linear import claims_and_settles_are_linearizable
from chaos.checkers.positions import (
    executed_ids_outlive_what_could_bring_them_back,
    positions_never_go_back,
    positions_pass_nothing_open,
)
from chaos.checkers.replicas import (
    counters_are_true,
    every_fault_was_healed,
    memory_is_bounded,
    one_leader_a_term,
    progress_after_healing,
    replicas_agree,
)
from chaos.checkers.tasks import (
    cancelled_tasks_never_start,
    delayed_tasks_are_never_early,
    each_acknowledged_task_ends_once,
    effects_are_as_many_as_allowed,
    nothing_runs_that_nobody_submitted,
    what_was_acknowledged_survives,
)
from chaos.history import History

__all__ = [
    "ALL",
    "INVARIANTS",
    "TERMINAL",
    "Checker",
    "Found",
    "Invariant",
    "Life",
    "State",
    "each_acknowledged_task_ends_once",
    "judge",
    "late_effects",
    "lives",
    "violations",
    "zombies",
]

Checker = Callable[[History], list[str]]


@dataclass(frozen=True)
class Invariant:
    number: int
    claim: str
    checkers: tuple[Checker, ...]


INVARIANTS = (
    Invariant(
        1,
        "each acknowledged task ends, once",
        (each_acknowledged_task_ends_once, nothing_runs_that_nobody_submitted),
    ),
    Invariant(2, "no effect is lost or doubled", (effects_are_as_many_as_allowed,)),
    Invariant(
        3,
        "claims and settles are linearizable, fences grow",
        (claims_and_settles_are_linear, claims_and_settles_are_linearizable),
    ),
    Invariant(
        4,
        "work starts under a committed claim and a lease",
        (effects_happen_under_committed_claims, starts_follow_their_claims),
    ),
    Invariant(5, "old fences are rejected", (old_fences_are_rejected, no_effect_after_the_claim_was_lost)),
    Invariant(6, "positions pass nothing open", (positions_pass_nothing_open,)),
    Invariant(7, "positions never go back", (positions_never_go_back,)),
    Invariant(
        8,
        "executed ids outlive what could bring them back",
        (executed_ids_outlive_what_could_bring_them_back,),
    ),
    Invariant(
        9,
        "doubt is settled by evidence, once",
        (one_testimony_each, testimony_tells_the_truth, no_suspect_waits_where_evidence_exists),
    ),
    Invariant(10, "replicas agree, terms have one leader", (replicas_agree, one_leader_a_term)),
    Invariant(11, "what was acknowledged survives", (what_was_acknowledged_survives,)),
    Invariant(
        12,
        "cancelled tasks never start, delayed ones are never early",
        (cancelled_tasks_never_start, delayed_tasks_are_never_early),
    ),
    Invariant(
        13,
        "it goes on after healing, in bounded memory",
        (progress_after_healing, every_fault_was_healed, memory_is_bounded),
    ),
    Invariant(14, "counters are true", (counters_are_true,)),
)

ALL: tuple[Checker, ...] = tuple(checker for invariant in INVARIANTS for checker in invariant.checkers)


@dataclass(frozen=True)
class Found:
    """The verdict on one invariant; ``wrong`` is empty where it holds."""

    invariant: Invariant
    wrong: tuple[str, ...]


def judge(history: History, without: tuple[Checker, ...] = ()) -> list[Found]:
    """Every invariant's verdict; ``without`` leaves checkers out."""
    return [
        Found(
            invariant,
            tuple(
                sentence
                for checker in invariant.checkers
                if checker not in without
                for sentence in checker(history)
            ),
        )
        for invariant in INVARIANTS
    ]


def violations(history: History, checkers: tuple[Checker, ...] = ALL) -> dict[str, list[str]]:
    """By checker, only those that found something."""
    found = {checker.__name__: checker(history) for checker in checkers}
    return {name: wrong for name, wrong in found.items() if wrong}
