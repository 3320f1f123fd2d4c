"""Invariants 6, 7 and 8: positions in the log, and how long what was executed is known."""

from __future__ import annotations

from collections import defaultdict

from chaos.checkers.life import TERMINAL, State, lives
from chaos.history import History
from dedup.ids import id_text


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
    """7: a committed position of a partition is never below one that was seen before."""
    wrong = []
    highest: dict[int, int] = defaultdict(int)
    for each in history.positions:
        if each.committed < highest[each.partition]:
            wrong.append(f"partition {each.partition}: from {highest[each.partition]} to {each.committed}")
        highest[each.partition] = max(highest[each.partition], each.committed)
    return wrong


def executed_ids_outlive_what_could_bring_them_back(history: History) -> list[str]:
    """8: dedup retention ≥ log retention + longest delay + retries."""
    kept = history.kept
    if kept is None or kept.dedup_ms == 0:
        return []
    needed_ms = kept.log_ms + kept.delay_ms_max + kept.retries_ms_max
    if kept.log_ms and kept.dedup_ms >= needed_ms:
        return []
    return [
        f"an executed id is known for {kept.dedup_ms} ms; the log ({kept.log_ms} ms, 0 is for ever), delays "
        f"({kept.delay_ms_max} ms) and retries ({kept.retries_ms_max} ms) may bring it back later"
    ]
