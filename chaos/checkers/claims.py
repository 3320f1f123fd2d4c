"""Invariants 3, 4 and 5: claims, their fences, and who may act under them."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from chaos import history as h
from chaos.checkers.life import lives
from chaos.history import History
from dedup.ids import TaskId, id_text
from raft.commands import Outcome, Verdict

MS = 1_000_000


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


def starts_follow_their_claims(history: History) -> list[str]:
    """4: a handler is entered only after its claim was committed, and inside the lease of the claim's session."""
    wrong = []
    heard: dict[tuple[TaskId, int], h.Operation] = {}
    for each in sorted(history.operations, key=lambda one: one.returned_ns):
        if each.kind == "CLAIM" and each.outcome is Outcome.GRANTED and each.returned_ns:
            heard.setdefault((each.id, each.fence), each)  # asked again, a session hears the same fence again
    ends = _lease_ends(history)
    for start in history.starts:
        claim = heard.get((start.id, start.fence))
        if claim is None or not start.t_ns:
            continue  # nobody recorded when it was granted; that it was is another checker's
        if start.t_ns < claim.returned_ns:
            wrong.append(
                f"{id_text(start.id)}: started {(claim.returned_ns - start.t_ns) / MS:.1f} ms before "
                f"its claim under {start.fence} was answered"
            )
        until = [until for t_ns, until in ends.get((claim.process, claim.session), ()) if t_ns <= start.t_ns]
        if until and start.t_ns > max(until):
            wrong.append(
                f"{id_text(start.id)}: started {(start.t_ns - max(until)) / MS:.1f} ms after the lease of "
                f"session {claim.session} had ended"
            )
    return wrong


def _lease_ends(history: History) -> dict[tuple[str, int], list[tuple[int, int]]]:
    ends: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for lease in history.leases:
        ends[lease.node, lease.session].append((lease.t_ns, lease.until_ns))
    return ends


def no_effect_after_the_claim_was_lost(history: History) -> list[str]:
    """5: once a claim was made a suspect nothing takes effect under its fence: work had been stopped before."""
    return [
        f"{id_text(id_)}: took effect under fence {fence} {late_ns / MS:.1f} ms after that claim was lost"
        for id_, fence, late_ns in late_effects(history)
    ]


def late_effects(history: History) -> list[tuple[TaskId, int, int]]:
    """(id, fence, how late in ns) of every effect under a claim that was a suspect already.

    Evidence may still find it: it does harm only if the suspect was closed before."""
    return _effects_after(history, h.Suspected)


def zombies(history: History) -> list[tuple[TaskId, int, int]]:
    """(id, fence, how late in ns) of every effect under a claim after it was ruled what became of it."""
    return _effects_after(history, h.Ruled)


def _effects_after(
    history: History, kind: type[h.Suspected] | type[h.Ruled]
) -> list[tuple[TaskId, int, int]]:
    since: dict[tuple[TaskId, int], int] = {}
    for each in history.decisions:
        if isinstance(each, kind) and each.t_ns and getattr(each, "verdict", None) is not Verdict.HELD:
            since.setdefault((each.id, each.fence), each.t_ns)
    return [
        (effect.id, effect.fence, effect.t_ns - since[effect.id, effect.fence])
        for effect in history.effects
        if effect.t_ns and effect.t_ns > since.get((effect.id, effect.fence), effect.t_ns)
    ]


def old_fences_are_rejected(history: History) -> list[str]:
    """5: a settle that the ledger took names the fence of the open claim or of the suspect that it left."""
    wrong = []
    highest: dict[TaskId, int] = {}
    for each in history.decisions:
        if isinstance(each, h.Claimed):
            highest[each.id] = max(highest.get(each.id, 0), each.fence)
        elif isinstance(each, h.Settled) and each.fence < highest.get(each.id, 0):
            wrong.append(
                f"{id_text(each.id)}: at index {each.index} a settle under fence {each.fence} was taken, "
                f"after fence {highest[each.id]} was granted"
            )
    return wrong
