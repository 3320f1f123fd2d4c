"""What replicas say to each other, as bytes.

A frame is ``length (4 bytes, big endian) | format (1 byte) | body``, where length counts format and body. The body
is one MessagePack value of a closed set of shapes: nothing that arrives can name a class or run code. Lengths are
bounded before a byte is stored; whatever does not decode raises ``Malformed``, and the connection that sent it is
closed by its owner.

Terms and indices are Raft's (Ongaro, dissertation, figure 3.1); ``PreVote`` is its section 9.6. A *token* is the 16
bytes that name a forwarded command (origin and sequence), so that a refusal needs no payload.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

FORMAT: Final = 1
FRAME_BYTES_MAX: Final = 4 * 1024 * 1024
HANDSHAKE_FRAME_BYTES_MAX: Final = 1024
ENTRY_BYTES_MAX: Final = 2 * 1024 * 1024
"""A single command; with its neighbours (APPEND_BYTES) it must fit a frame."""
APPEND_BYTES: Final = 1024 * 1024
SNAPSHOT_CHUNK_BYTES: Final = 1024 * 1024

_HEAD: Final = struct.Struct(">IB")
INDEX_MAX: Final = 2**63 - 1


class Malformed(Exception):
    """Bytes that are no message of this format; the message says which rule they break."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """Dialler's first word."""

    cluster_id: str
    node_id: str
    role: str
    to: str  # whom it means to reach: a wrong address map must not join strangers
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag="challenge"):
    """The acceptor's answer, and its proof of the secret."""

    node_id: str
    role: str
    nonce: bytes
    proof: bytes


class Proof(msgspec.Struct, frozen=True, array_like=True, tag="proof"):
    """The dialler's proof of the secret."""

    proof: bytes


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="i"):
    """Keeps a quiet link known to be alive."""


class AppendEntries(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    term: int
    commit_index: int
    prev_index: int
    prev_term: int
    entries: list[tuple[int, bytes]]  # (term, command), for prev_index + 1, prev_index + 2, ...
    beat: bool  # answer even if there are no entries


class AppendReply(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """``match`` > 0: equal to the leader's log up to there, and synced. ``next_index`` > 0: send from there.

    ``learning``: by a voter that lost its journal and is no voter yet. Nothing may be committed by its word.
    """

    term: int
    match: int
    next_index: int
    learning: bool = False


class SnapshotChunk(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """Empty ``data`` asks how far the receiver is, and is a heartbeat."""

    term: int
    commit_index: int
    index: int
    index_term: int
    size: int
    checksum: int
    offset: int
    data: bytes


class SnapshotReply(msgspec.Struct, frozen=True, array_like=True, tag="S"):
    term: int
    index: int
    offset: int  # the byte wanted next; the snapshot's size: all is here and is being stored


class VoteRequest(msgspec.Struct, frozen=True, array_like=True, tag="v"):
    term: int
    last_index: int
    last_term: int


class Vote(msgspec.Struct, frozen=True, array_like=True, tag="V"):
    term: int


class PreVoteRequest(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    term: int  # the term it would stand for
    last_index: int
    last_term: int


class PreVote(msgspec.Struct, frozen=True, array_like=True, tag="P"):
    term: int


class Stale(msgspec.Struct, frozen=True, array_like=True, tag="o"):
    """The sender's term is old; here is the present one."""

    term: int


class Propose(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """Commands for the leader of exactly this term; any other refuses, so they cannot surface in a later term."""

    term: int
    commands: list[bytes]


class ProposeRefused(msgspec.Struct, frozen=True, array_like=True, tag="C"):
    """Surely not appended."""

    term: int
    tokens: list[bytes]


Handshake = Hello | Challenge | Proof
Message = (
    AppendEntries | AppendReply | SnapshotChunk | SnapshotReply | VoteRequest | Vote | PreVoteRequest
    | PreVote | Stale | Propose | ProposeRefused | Ping
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_messages: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_handshakes: msgspec.msgpack.Decoder[Handshake] = msgspec.msgpack.Decoder(Handshake)


def encode(message: Message | Handshake) -> bytes:
    """The whole frame of a message; ValueError if it is longer than a receiver would take."""
    frame = bytearray(_HEAD.size)
    _encoder.encode_into(message, frame, _HEAD.size)
    length = len(frame) - 4
    if length > FRAME_BYTES_MAX:
        raise ValueError(f"frame of {length} bytes is above frame_bytes_max={FRAME_BYTES_MAX}")
    _HEAD.pack_into(frame, 0, length, FORMAT)
    return bytes(frame)


def decode(body: bytes | bytearray) -> Message:
    """The message in a frame's body; Malformed if it is none, or a number in it is out of range."""
    try:
        message = _messages.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"no message: {error}") from error
    _check_ranges(message)
    return message


def decode_handshake(body: bytes | bytearray) -> Handshake:
    try:
        return _handshakes.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"no handshake: {error}") from error


def _check_ranges(message: Message) -> None:
    # Written out, not reflective: this runs for every message.
    if isinstance(message, Ping):
        return
    numbers = [message.term]
    if isinstance(message, AppendEntries):
        numbers += (message.commit_index, message.prev_index, message.prev_term)
        previous = message.prev_term
        for term, command in message.entries:
            if not previous <= term <= message.term:
                raise Malformed(f"entry of term {term} after {previous} in an append of term {message.term}")
            if not command:
                raise Malformed("empty command")
            previous = term
    elif isinstance(message, AppendReply):
        numbers += (message.match, message.next_index)
    elif isinstance(message, SnapshotChunk):
        numbers += (message.commit_index, message.index, message.index_term, message.size, message.checksum)
        numbers.append(message.offset)
        if message.offset + len(message.data) > message.size:
            raise Malformed(f"chunk ends behind the snapshot's size={message.size}")
    elif isinstance(message, SnapshotReply):
        numbers += (message.index, message.offset)
    elif isinstance(message, VoteRequest | PreVoteRequest):
        numbers += (message.last_index, message.last_term)
    elif isinstance(message, Propose):
        for command in message.commands:
            if not TOKEN_END <= len(command) <= ENTRY_BYTES_MAX:
                raise Malformed(f"command of {len(command)} bytes")
    if min(numbers) < 0 or max(numbers) > INDEX_MAX:
        raise Malformed(f"a number in {type(message).__name__} is out of range")


class FrameReader:
    """Cuts a byte stream into frame bodies. Holds at most one frame beyond what was fed."""

    def __init__(self, frame_bytes_max: int) -> None:
        self.frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()
        self._at = 0

    def feed(self, data: bytes) -> None:
        if self._at:
            del self._buffer[: self._at]
            self._at = 0
        self._buffer += data

    def next(self) -> bytearray | None:
        """The next whole body, or None until more is fed. Malformed for a length or format that cannot be."""
        buffer, at = self._buffer, self._at
        if len(buffer) - at < _HEAD.size:
            return None
        length, version = _HEAD.unpack_from(buffer, at)
        if not 1 <= length <= self.frame_bytes_max:
            raise Malformed(f"frame length {length} is not in 1..{self.frame_bytes_max}")
        if version != FORMAT:
            raise Malformed(f"frame format {version} is not {FORMAT}")
        end = at + 4 + length
        if len(buffer) < end:
            return None
        self._at = end
        return buffer[at + _HEAD.size : end]


# --- commands in the log ----------------------------------------------------------------------------------------

PAYLOAD: Final = 0
"""First byte of a command that the machine applies. The library's own numbering: 1 is a leader's no-op."""
NO_OP: Final = 1
TOKEN_END: Final = 17

_COMMAND: Final = struct.Struct(">BQQ")


def command(kind: int, origin: int, sequence: int, payload: bytes = b"") -> bytes:
    """A log entry's bytes: kind, the token (origin, sequence), payload."""
    return _COMMAND.pack(kind, origin, sequence) + payload


def token(command_bytes: bytes) -> bytes:
    return command_bytes[1:TOKEN_END]


def token_numbers(command_bytes: bytes) -> tuple[int, int]:
    """(origin, sequence) of a command; (0, 0) for a no-op without a token."""
    if len(command_bytes) < TOKEN_END:
        return 0, 0
    _, origin, sequence = _COMMAND.unpack_from(command_bytes)
    return origin, sequence
