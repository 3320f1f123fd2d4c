"""Apply never raises, whatever the bytes or the values of well-typed commands, and breaks no invariant."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.ids import Ids
from raft import commands as words
from raft.codec import CodecError, decode_proposal, encode_proposal
from raft.commands import (
    Advance,
    AllocateIds,
    Answered,
    Cancel,
    Claim,
    Command,
    DeleteSchedule,
    Fact,
    Fire,
    Heartbeat,
    Hold,
    Join,
    Launched,
    Leave,
    PauseSchedule,
    Proposal,
    PutClass,
    PutQueue,
    PutSchedule,
    Rejected,
    Result,
    Revive,
    Rule,
    Settle,
    Settlement,
    Timetable,
    Verdict,
)
from raft.ledger import Ledger

# pytest would take names that start with Test for its own, so ``words.Testify`` is not imported by name.
# Small numbers collide with the state; the rest are the borders of what can be encoded, and beyond.
numbers = st.one_of(
    st.integers(-2, 40),
    st.sampled_from(
        [2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 1_048_576, 1_048_577]
    ),
)
texts = st.one_of(
    st.sampled_from(["n1", "n2", "t", "cpu", "short", ""]), st.text(max_size=5), st.just("x" * 300)
)
keys = st.one_of(st.sampled_from([b"a" * 16, b"b" * 16]), st.binary(max_size=20))
ids = st.builds(
    Ids,
    st.lists(st.tuples(numbers, numbers), max_size=4).map(tuple),
    st.lists(keys, max_size=4).map(tuple),
)
settlements = st.lists(
    st.builds(Settlement, numbers, ids, st.sampled_from(Result), numbers), max_size=3
).map(tuple)  # fmt: skip
testimonies = st.lists(st.builds(words.Testimony, numbers, ids, st.sampled_from(Fact)), max_size=3).map(tuple)
owners = st.sampled_from(["code", "hand", ""])
timetables = st.builds(
    Timetable,
    texts,
    texts,
    texts,
    texts,
    st.binary(max_size=4),
    numbers,
    st.sampled_from(["none", "all", "x"]),
)
commands: st.SearchStrategy[Command] = st.one_of(
    st.builds(Join, texts, numbers, numbers, st.booleans(), texts),
    st.builds(Heartbeat, numbers),
    st.builds(Leave, numbers),
    st.builds(Advance, texts, numbers),
    st.builds(AllocateIds, numbers),
    st.builds(Claim, numbers, ids, numbers),
    st.builds(Settle, numbers, settlements),
    st.builds(words.Testify, texts, numbers, testimonies),
    st.builds(Rule, ids, st.sampled_from(Verdict), texts, texts, numbers),
    st.builds(Cancel, ids, texts),
    st.builds(Revive, ids, texts),
    st.builds(Hold, ids, numbers),
    st.builds(PutQueue, texts, st.booleans(), texts),
    st.builds(PutClass, texts, texts, texts),
    st.builds(PutSchedule, texts, timetables, owners, texts, numbers),
    st.builds(DeleteSchedule, texts, owners, texts),
    st.builds(PauseSchedule, texts, st.booleans(), texts, numbers),
    st.builds(Fire, texts, numbers, numbers, st.booleans(), numbers),
    st.builds(Launched, texts, numbers),
)
proposals = st.builds(Proposal, numbers, numbers, st.lists(commands, max_size=4).map(tuple))


PUT = PutSchedule("t", Timetable("* * * * *", "", "t", "t", b"{}"), "hand", "t", 1)


def started() -> Ledger:
    """A ledger with two sessions (1 and 2), open claims, a suspect and a schedule."""
    ledger = Ledger(1)
    whole = (Join("n1", 1, 4000), Join("n2", 1, 4000), AllocateIds(40), PUT)
    ledger.apply_proposal(1, Proposal(7, 1, whole))
    doubt = Settlement(2, Ids(((1, 3),)), Result.DOUBT)
    ledger.apply_proposal(2, Proposal(7, 2, (Claim(1, Ids(((1, 10),), (b"a" * 16,))), Settle(1, (doubt,)))))
    return ledger


def counted(command: Command) -> int:
    match command:
        case Settle(_, parts) | words.Testify(_, _, parts):
            return sum(len(part.ids) for part in parts)
    batch: Any = getattr(command, "ids", ())
    return len(batch)


@settings(max_examples=300, deadline=None)
@given(st.lists(proposals, max_size=6))
def test_any_command_values_are_answered_and_never_raise(drawn: list[Proposal]) -> None:
    ledger = started()
    for index, proposal in enumerate(drawn, start=3):
        effects = ledger.apply_proposal(index, proposal)
        assert len(effects.answers) == len(proposal.commands)
        for command, answer in zip(proposal.commands, effects.answers, strict=True):
            if isinstance(answer, Answered) and not effects.repeated:
                assert sum(span.count for span in answer.spans) == counted(command)
    ledger.check_invariants()
    restored = Ledger(1)
    restored.restore(ledger.snapshot())
    assert restored.digest() == ledger.digest()


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda tail: b"\x01" + tail)))
def test_any_bytes_are_refused_or_applied_and_never_raise(payload: bytes) -> None:
    ledger = started()
    before = ledger.counts()
    effects = ledger.apply(3, payload)
    assert ledger.applied_index == 3
    try:
        decode_proposal(payload)
    except CodecError:
        assert isinstance(effects.answers[0], Rejected)
        assert ledger.counts() == before
    ledger.check_invariants()


@settings(max_examples=200, deadline=None)
@given(proposals, st.integers(0, 400), st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_applied_and_never_raises(
    proposal: Proposal, at: int, byte: int
) -> None:
    try:
        payload = bytearray(encode_proposal(proposal))
    except CodecError:
        return
    payload[at % len(payload)] = byte
    ledger = started()
    ledger.apply(3, bytes(payload))
    ledger.check_invariants()


@settings(max_examples=200, deadline=None)
@given(proposals)
def test_what_can_be_encoded_decodes_to_the_same(proposal: Proposal) -> None:
    try:
        payload = encode_proposal(proposal)
    except CodecError:
        return
    assert decode_proposal(payload) == proposal
