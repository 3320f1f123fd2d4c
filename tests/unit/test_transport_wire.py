"""The codec: what was encoded comes back, and nothing else is taken for a message."""

from __future__ import annotations

import os
import pickle
import random
import struct

import msgspec
import pytest

from raft import wire
from raft.wire import (
    AppendEntries,
    AppendReply,
    FrameReader,
    Malformed,
    Message,
    Ping,
    PreVote,
    PreVoteRequest,
    Propose,
    ProposeRefused,
    SnapshotChunk,
    SnapshotReply,
    Stale,
    Vote,
    VoteRequest,
)

MESSAGES: list[Message] = [
    AppendEntries(3, 2, 1, 1, [(2, b"\1"), (3, b"\0" * 20)], True),
    AppendReply(3, 9, 0),
    SnapshotChunk(3, 2, 9, 2, 100, 7, 10, b"data"),
    SnapshotReply(3, 9, 14),
    VoteRequest(3, 9, 2),
    Vote(3),
    PreVoteRequest(4, 9, 2),
    PreVote(4),
    Stale(8),
    Propose(3, [wire.command(wire.PAYLOAD, 1, 2, b"x")]),
    ProposeRefused(3, [bytes(16)]),
    Ping(),
]


def body(message: Message) -> bytes:
    return wire.encode(message)[5:]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_as_it_was(message: Message):
    assert wire.decode(body(message)) == message


def test_frames_come_back_whole_however_the_stream_is_cut():
    stream = b"".join(wire.encode(message) for message in MESSAGES)
    for size in (1, 2, 3, 7, 64, len(stream)):
        reader, seen = FrameReader(wire.FRAME_BYTES_MAX), []
        for at in range(0, len(stream), size):
            reader.feed(stream[at : at + size])
            while (part := reader.next()) is not None:
                seen.append(wire.decode(part))
        assert seen == MESSAGES


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (struct.pack(">IB", 0, 1), "frame length 0"),
        (struct.pack(">IB", wire.FRAME_BYTES_MAX + 1, 1), "frame length"),
        (struct.pack(">IB", 0xFFFFFFFF, 1), "frame length"),
        (struct.pack(">IB", 9, 2), "frame format 2"),
        (pickle.dumps(os.getcwd, 2), "frame length"),
    ],
)
def test_an_impossible_frame_head_is_refused_before_its_body_is_awaited(data: bytes, what: str):
    reader = FrameReader(wire.FRAME_BYTES_MAX)
    reader.feed(data)
    with pytest.raises(Malformed, match=what):
        reader.next()


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (AppendEntries(3, 2, 1, 1, [(4, b"x")], True), "entry of term 4 after 1 in an append of term 3"),
        (AppendEntries(3, 2, 1, 1, [(3, b"x"), (2, b"x")], True), "entry of term 2 after 3"),
        (AppendEntries(3, 2, 1, 1, [(3, b"")], True), "empty command"),
        (AppendReply(3, -1, 0), "out of range"),
        (Stale(2**63), "out of range"),
        (SnapshotChunk(3, 2, 9, 2, 5, 7, 3, b"data"), "ends behind the snapshot's size=5"),
        (Propose(3, [b"short"]), "command of 5 bytes"),
    ],
)
def test_numbers_that_cannot_be_are_refused(message: Message, what: str):
    with pytest.raises(Malformed, match=what):
        wire.decode(body(message))


def test_random_and_damaged_bytes_are_messages_or_malformed_and_nothing_else():
    chance = random.Random(5)
    for _ in range(20_000):
        data = bytearray(body(chance.choice(MESSAGES)))
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            message = wire.decode(data)
        except Malformed:
            continue
        assert isinstance(message, msgspec.Struct)


def test_a_frame_above_the_limit_is_not_sent():
    with pytest.raises(ValueError, match="above frame_bytes_max"):
        wire.encode(SnapshotChunk(1, 1, 1, 1, 2**23, 0, 0, bytes(2**23)))


def test_the_largest_command_and_a_batch_before_it_fit_a_frame():
    entries = [(1, bytes(wire.APPEND_BYTES)), (1, bytes(wire.ENTRY_BYTES_MAX))]
    assert len(wire.encode(AppendEntries(1, 1, 1, 1, entries, False))) < wire.FRAME_BYTES_MAX
