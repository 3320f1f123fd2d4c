"""The whole ledger as canonical bytes, and back.

Equal ledgers give equal bytes: every table is written in an order that follows from its content. The indexes and
counters beside the map of states are not written but built again from it. A snapshot names the settings it lived
under, since they decide answers: replicas with unequal ones would drift apart in silence.
"""

from __future__ import annotations

import msgspec

from dedup.claims import Held
from dedup.executed import ExecutedSet
from dedup.ids import KEY_BYTES, RANGE_ID_MAX, Ids
from raft.codec import CodecError
from raft.ledger_state import (
    Firing,
    HandlerClass,
    LedgerSettings,
    LedgerState,
    NodeSeen,
    QueueSetting,
    Schedule,
    Session,
    TaskValue,
)
from raft.ledger_tokens import ProposerRow


class _Body(msgspec.Struct, frozen=True, array_like=True):
    bloom_seed: int
    settings: LedgerSettings
    index: int
    now_ms: int
    timekeeper: str
    next_id: int
    last_session: int
    sessions: tuple[Session, ...]
    nodes: tuple[tuple[str, NodeSeen], ...]
    queues: tuple[tuple[str, QueueSetting], ...]
    classes: tuple[tuple[str, HandlerClass], ...]
    schedules: tuple[tuple[str, Schedule], ...]
    proposers: tuple[ProposerRow, ...]
    values: tuple[TaskValue, ...]
    """Each distinct value of the map of states once, in the order of its first id."""
    runs: tuple[tuple[int, int, int], ...]
    """The map's runs, ascending: (start, count, which value)."""
    keyed: tuple[tuple[tuple[bytes, ...], int], ...]
    """The map's keys, ascending: (keys, which value)."""
    executed: bytes
    firings: tuple[Firing, ...] = ()
    """Last, and it may be wanting: snapshots of before there were any still read."""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Body] = msgspec.msgpack.Decoder(_Body)


def state_bytes(state: LedgerState) -> bytes:
    """The canonical bytes of the state."""
    values: dict[TaskValue, int] = {}
    runs: list[tuple[int, int, int]] = []
    keyed: list[tuple[tuple[bytes, ...], int]] = []
    for ids, value in state.states.items():
        number = values.setdefault(value, len(values))
        runs += [(start, count, number) for start, count in ids.runs]
        if ids.keys:
            keyed.append((ids.keys, number))
    body = _Body(
        bloom_seed=state.bloom_seed,
        settings=state.settings,
        index=state.index,
        now_ms=state.now_ms,
        timekeeper=state.timekeeper,
        next_id=state.next_id,
        last_session=state.last_session,
        sessions=tuple(state.sessions[number] for number in sorted(state.sessions)),
        nodes=tuple(sorted(state.nodes.items())),
        queues=tuple(sorted(state.queues.items())),
        classes=tuple(sorted(state.classes.items())),
        schedules=tuple(sorted(state.schedules.items())),
        proposers=state.tokens.rows(),
        values=tuple(values),
        runs=tuple(runs),
        keyed=tuple(keyed),
        executed=state.executed.snapshot(),
        firings=tuple(firing for _, firing in sorted(state.firings.items())),
    )
    return _encoder.encode(body)


def state_from(data: bytes, bloom_seed: int, settings: LedgerSettings) -> LedgerState:
    """The state that these bytes are; CodecError when they are none, or one of another cluster or settings."""
    try:
        body = _decoder.decode(data)
        executed = ExecutedSet.restore(body.executed)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:  # ValueError: UnicodeDecodeError too
        # The checksum held, so these bytes were written so: by a program of another format, or a wrong one.
        raise CodecError(f"the snapshot does not hold a ledger: {error}") from None
    if body.bloom_seed != bloom_seed:
        raise CodecError(
            f"bloom_seed={body.bloom_seed} of the snapshot must be {bloom_seed}: it is another cluster's"
        )
    _check_settings(body.settings, settings)
    state = LedgerState(bloom_seed, settings)
    state.index = body.index
    state.now_ms = body.now_ms
    state.timekeeper = body.timekeeper
    state.next_id = body.next_id
    state.last_session = body.last_session
    state.nodes = dict(body.nodes)
    state.queues = dict(body.queues)
    state.classes = dict(body.classes)
    state.schedules = dict(body.schedules)
    state.firings = {(firing.name, firing.at_ms): firing for firing in body.firings}
    state.tokens.load(body.proposers)
    state.executed = executed
    for session in body.sessions:
        state.sessions[session.session] = session
        state.session_of[session.node] = session.session
        state.open[session.session] = Held()
    try:
        _load_states(state, body)
    except (IndexError, KeyError) as error:
        raise CodecError(f"the snapshot contradicts itself: {error!r} is named and not there") from None
    except (ValueError, OverflowError) as error:
        raise CodecError(f"the snapshot contradicts itself: {error}") from None
    return state


def _load_states(state: LedgerState, body: _Body) -> None:
    runs: list[list[tuple[int, int]]] = [[] for _ in body.values]
    keys: list[list[bytes]] = [[] for _ in body.values]
    for start, count, number in body.runs:  # in the map's own order, so that each is an append
        if not (start >= 1 and 1 <= count <= RANGE_ID_MAX - start + 1):
            raise ValueError(f"run ({start}, {count}) holds what are no ids")
        state.states.set(Ids(((start, count),)), body.values[number])
        runs[number].append((start, count))
    for some, number in body.keyed:
        if any(len(key) != KEY_BYTES for key in some):
            raise ValueError(f"a key must have {KEY_BYTES} bytes")
        state.states.set(Ids((), some), body.values[number])
        keys[number] += some
    for number, value in enumerate(body.values):
        ids = Ids(tuple(runs[number]), tuple(keys[number]))
        state.enter(ids, len(ids), value)


def _check_settings(theirs: LedgerSettings, ours: LedgerSettings) -> None:
    for name in LedgerSettings.__struct_fields__:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            raise CodecError(f"{name}={mine} must be {other}, under which this ledger was written: "
                             "replicas with unequal settings would drift apart")  # fmt: skip
