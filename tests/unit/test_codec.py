from __future__ import annotations

import pytest

from dedup.ids import Ids
from raft.codec import (
    PROPOSAL_BYTES_MAX,
    CodecError,
    decode_proposal,
    encode_proposal,
    open_snapshot,
    seal_snapshot,
)
from raft.commands import Claim, Fire, Heartbeat, Join, Proposal, Result, Settle, Settlement

PROPOSAL = Proposal(
    2**64 - 1,
    1,
    (
        Join("n1", 3, 4000, False, "127.0.0.1:1"),
        Claim(7, Ids(((1, 1000),), (b"k" * 16,)), 2),
        Settle(7, (Settlement(9, Ids(((1, 3),)), Result.RETRY, 250),)),
        Fire("daily", 3, 1),
    ),
)


def test_a_proposal_comes_back_as_it_went() -> None:
    assert decode_proposal(encode_proposal(PROPOSAL)) == PROPOSAL


def test_a_batch_of_neighbours_travels_in_a_few_bytes() -> None:
    assert len(encode_proposal(Proposal(1, 1, (Claim(7, Ids(((1, 1_000_000),))),)))) < 30


def test_the_bytes_of_version_1_are_what_they_were() -> None:
    assert encode_proposal(Proposal(5, 6, (Heartbeat(7),))).hex() == "0193050691" + "92a14807"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\x02\x93\x01\x01\x90", "format 2 is unknown"),
        (b"\x01", "not a proposal"),
        (b"\x01\x93\x01\x01", "not a proposal"),
        (b"\x01\x93\x01\x01\x91\x92\xa1?\x07", "not a proposal"),
        (b"\x01\x93\x01\x01\x91\x92\xa1H\xa1x", "not a proposal"),
        (b"\x01\x93\x01\x01\x90tail", "not a proposal"),
        (b"\x01" + b"\x91" * 100_000, "not a proposal"),
        (b"\x01\xdd\xff\xff\xff\xff", "not a proposal"),
        (bytes(PROPOSAL_BYTES_MAX + 1), "at most"),
    ],
)
def test_what_is_no_proposal_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        decode_proposal(data)


def test_a_number_of_more_than_64_bits_is_refused_before_it_travels() -> None:
    with pytest.raises(CodecError, match="cannot be encoded"):
        encode_proposal(Proposal(1, 1, (Heartbeat(2**64),)))


def test_a_sealed_snapshot_opens() -> None:
    assert open_snapshot(seal_snapshot(b"body")) == b"body"
    assert open_snapshot(seal_snapshot(b"")) == b""


def test_every_torn_or_damaged_snapshot_is_refused() -> None:
    sealed = seal_snapshot(b"the body of a snapshot")
    for length in range(len(sealed)):
        with pytest.raises(CodecError):
            open_snapshot(sealed[:length])
    with pytest.raises(CodecError):
        open_snapshot(sealed + b"x")
    for at in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[at] ^= 1
        with pytest.raises(CodecError):
            open_snapshot(bytes(damaged))
