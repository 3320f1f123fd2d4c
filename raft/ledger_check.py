"""Everything that must be true of a ledger state, checked the slow way: for tests and simulation.

In production the moves of raft/ledger_state.py check what they touch.
"""

from __future__ import annotations

from dedup.claims import Cancelled, Dead, Held, OpenClaim, Waiting
from dedup.ids import KEY_BYTES, Ids
from dedup.suspects import Suspect
from raft.ledger_state import LedgerCorrupt, LedgerState, TaskValue


def check_invariants(state: LedgerState) -> None:
    """LedgerCorrupt if anything contradicts."""
    numbers: dict[type[TaskValue], int] = {OpenClaim: 0, Suspect: 0, Waiting: 0, Dead: 0, Cancelled: 0}
    by_home: dict[tuple[int, int], int] = {}
    held = 0
    for ids, value in state.states.items():
        count = len(ids)
        numbers[type(value)] += count
        held += count if isinstance(value, Suspect) and value.held_by else 0
        _check_value(state, ids, value)
        home, key = state.home(value)
        by_home[id(home), key] = by_home.get((id(home), key), 0) + count
    _require(numbers == state.numbers, f"counters {state.numbers} must be {numbers}")
    _require(held == state.held, f"held={state.held} must be {held}")
    _check_indexes(state, by_home)
    _check_sessions(state)
    _check_schedules(state)


def _check_value(state: LedgerState, ids: Ids, value: TaskValue) -> None:
    where = f"{ids}: {value}"
    _require(all(not executed for _, executed in state.executed.spans(ids)), f"{where} is executed too")
    _require(0 <= value.fence <= state.index, f"{where} has a fence from after index {state.index}")
    _require(all(start + count <= state.next_id for start, count in ids.runs), f"{where} is not allocated")
    _require(all(len(key) == KEY_BYTES for key in ids.keys), f"{where} has a malformed key")
    if isinstance(value, OpenClaim):
        _require(value.session in state.sessions, f"{where} is claimed by a session that is not live")
        _require(value.attempt >= 1 and value.fence >= 1, f"{where} has no attempt or fence")
    elif isinstance(value, Suspect):
        _require(value.since_ms <= state.now_ms, f"{where} is from after now_ms={state.now_ms}")
        _require(value.session <= state.last_session, f"{where} names a session that never was")
        _require(value.session not in state.sessions or value.why == "doubt", f"{where} has a live session")
    else:
        _require(value.at_ms <= state.now_ms, f"{where} is from after now_ms={state.now_ms}")


def _check_indexes(state: LedgerState, by_home: dict[tuple[int, int], int]) -> None:
    indexes: list[Held] = [*state.open.values(), *state.suspects.values(), state.retiring]
    for held in indexes:
        total = 0
        for key in held.numbers():
            count = held.count_under(key)
            total += count
            found = sum(number for _, number, _ in state.under(held, key))
            expected = by_home.pop((id(held), key), 0)
            _require(
                count == found == expected > 0,
                f"number {key}: {count} counted, {found} listed, {expected} there",
            )
        _require(total == held.count, f"an index counts {held.count} ids and holds {total}")
    _require(not by_home, "some ids are in no index")
    _require(all(held.count for held in state.suspects.values()), "an empty index of suspects is kept")


def _check_sessions(state: LedgerState) -> None:
    _require(set(state.sessions) == set(state.open), "each live session must have its index of claims")
    _require(
        state.session_of == {session.node: number for number, session in state.sessions.items()},
        "a node must have at most one live session",
    )
    for number, session in state.sessions.items():
        _require(number == session.session <= state.last_session, f"session {number} is out of order")
        _require(session.expires_ms > state.now_ms, f"session {number} should have lapsed")
        _require(
            state.nodes[session.node].incarnation == session.incarnation,
            f"{session.node} has a newer incarnation",
        )


def _check_schedules(state: LedgerState) -> None:
    for name, schedule in state.schedules.items():
        _require(schedule.revision <= state.index, f"schedule {name} is from after index {state.index}")
        _require(schedule.fired_ms >= 0 and schedule.since_ms >= 0, f"schedule {name} has no times")
    _require(len(state.firings) <= state.settings.firings_max, "there are more firings than firings_max")
    for (name, at_ms), firing in state.firings.items():
        _require((name, at_ms) == (firing.name, firing.at_ms), f"{firing} is kept as another one")
        now = state.schedules.get(name)
        _require(
            now is None or now.revision != firing.revision or at_ms <= now.fired_ms,
            f"schedule {name} fired for {at_ms}, and its last time is {now.fired_ms if now else 0}",
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise LedgerCorrupt(message)
