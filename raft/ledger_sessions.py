"""Sessions and the ledger's clock.

A session is a node's lease. Time moves only by ``Advance``: the elapsed monotonic time of one timekeeper (the
leader), capped a step. The first ``Advance`` of another timekeeper only takes over and adds nothing, because the
time it measured may overlap with what its predecessor added, and a clock that runs too fast would lapse a lease
before its node has stopped. A clock that runs a little slow only makes a lapse later.
"""

from __future__ import annotations

from dedup.claims import Held
from raft.commands import (
    Advance,
    Advanced,
    Done,
    Gone,
    Heartbeat,
    Join,
    Joined,
    Leave,
    Renewed,
    SessionClosed,
    SessionOpened,
)
from raft.ledger_state import (
    LedgerState,
    NodeSeen,
    Session,
    check_name,
    check_number,
    check_text,
    reject,
)
from raft.ledger_suspects import suspect_claims

HTTP_BYTES_MAX = 256


def join(state: LedgerState, command: Join) -> Joined:
    settings = state.settings
    check_name("node", command.node)
    check_number("incarnation", command.incarnation, 0, 2**63 - 1)
    check_number(
        "timeout_ms", command.timeout_ms, settings.session_timeout_ms_min, settings.session_timeout_ms_max
    )
    check_text("http", command.http, HTTP_BYTES_MAX)
    seen = state.nodes.get(command.node)
    if seen is not None and command.incarnation < seen.incarnation:
        reject(f"incarnation={command.incarnation} of {command.node} must be at least {seen.incarnation}, "
               "which has joined")  # fmt: skip
    live = state.session_of.get(command.node)
    if live is None and len(state.sessions) >= settings.sessions_max:
        reject(f"node: {len(state.sessions)} sessions are live, as many as sessions_max allows")
    if live is not None and state.sessions[live].incarnation < command.incarnation:
        close(state, state.sessions[live], "replaced")
        live = None
    number = live if live is not None else max(state.index, state.last_session + 1)
    session = Session(
        session=number,
        node=command.node,
        incarnation=command.incarnation,
        timeout_ms=command.timeout_ms,
        expires_ms=state.now_ms + command.timeout_ms,
        consumes=command.consumes,
        http=command.http,
    )
    state.sessions[number] = session
    _remember_node(state, session)
    if live is None:
        state.last_session = number
        state.session_of[command.node] = number
        state.open[number] = Held()
        state.events.append(SessionOpened(number, command.node, command.incarnation))
    return Joined(number, state.now_ms)


def _remember_node(state: LedgerState, session: Session) -> None:
    state.nodes[session.node] = NodeSeen(session.incarnation, state.now_ms)
    if len(state.nodes) > state.settings.nodes_max:
        # The node that joined longest ago, of those without a session, may come back as any incarnation.
        gone = (node for node in state.nodes if node != session.node and node not in state.session_of)
        oldest = min(gone, key=lambda node: (state.nodes[node].joined_ms, node), default=None)
        if oldest is not None:
            del state.nodes[oldest]


def heartbeat(state: LedgerState, command: Heartbeat) -> Renewed | Gone:
    check_number("session", command.session, 0, 2**63 - 1)
    session = state.sessions.get(command.session)
    if session is None:
        return Gone(command.session)
    state.sessions[command.session] = Session(
        session.session,
        session.node,
        session.incarnation,
        session.timeout_ms,
        state.now_ms + session.timeout_ms,
        session.consumes,
        session.http,
    )
    return Renewed(state.now_ms)


def leave(state: LedgerState, command: Leave) -> Done | Gone:
    check_number("session", command.session, 0, 2**63 - 1)
    session = state.sessions.get(command.session)
    if session is None:
        return Gone(command.session)
    close(state, session, "left")
    return Done()


def close(state: LedgerState, session: Session, why: str) -> None:
    """End a session: it can settle nothing from here on, and what it holds becomes suspect."""
    del state.sessions[session.session]
    del state.session_of[session.node]
    state.events.append(SessionClosed(session.session, session.node, session.incarnation, why))
    suspect_claims(state, session, why)


def advance(state: LedgerState, command: Advance) -> Advanced:
    check_name("timekeeper", command.timekeeper)
    if command.elapsed_ms < 0:
        reject(f"elapsed_ms={command.elapsed_ms} must not be negative: ledger time only grows")
    if command.timekeeper != state.timekeeper:
        takes_over = state.timekeeper != ""
        state.timekeeper = command.timekeeper
        if takes_over:
            return Advanced(state.now_ms)
    before = state.now_ms
    state.now_ms = before + min(command.elapsed_ms, state.settings.advance_ms_max)
    for session in sorted(state.sessions.values(), key=lambda each: each.session):
        if session.expires_ms <= state.now_ms:
            close(state, session, "lapsed")
    state.tokens.retire(state.now_ms)
    if state.now_ms // 60_000 != before // 60_000:
        _retire(state, state.now_ms // 60_000)
    return Advanced(state.now_ms)


def _retire(state: LedgerState, minute: int) -> None:
    """Forget what was executed or closed so long ago that no log can deliver it again."""
    state.executed.retire(state.now_ms)
    for expired in state.retiring.numbers():
        if expired >= minute:
            return
        for part, count, value in list(state.under(state.retiring, expired)):
            state.forget(part, count, value)
