"""Bytes of the ledger: proposals as they travel and rest in the journal, and the envelope of a snapshot.

A proposal is one version byte and then MessagePack, decoded straight into the types of raft/commands.py: a
byte string either is a well-typed ``Proposal`` or a ``CodecError`` that says why not. Nothing is unpickled,
no class path is in the bytes, and no length in the input is believed before it is compared with a bound.

A snapshot is ``magic, version, length, CRC32C, body``; what the body means is its owner's matter.
"""

from __future__ import annotations

import struct

import google_crc32c
import msgspec

from raft.commands import Proposal

PROPOSAL_VERSION = 1
PROPOSAL_BYTES_MAX = 32 * 1024 * 1024  # 1,048,576 keyed ids are 18 MiB

SNAPSHOT_VERSION = 1
_SNAPSHOT_MAGIC = b"OKsnap"
_SNAPSHOT_HEAD = struct.Struct(">6sBQI")
SNAPSHOT_BYTES_MAX = 8 * 1024**3

_VERSION_BYTE = bytes((PROPOSAL_VERSION,))
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Proposal] = msgspec.msgpack.Decoder(Proposal)


class CodecError(ValueError):
    """These bytes (or this value) are not what they should be; the text says what is wrong."""


def encode_proposal(proposal: Proposal) -> bytes:
    """The bytes of ``proposal``; CodecError when a number does not fit 64 bits or the whole is too large."""
    try:
        data = _VERSION_BYTE + _encoder.encode(proposal)
    except (OverflowError, UnicodeEncodeError, TypeError) as error:
        raise CodecError(f"the proposal cannot be encoded: {error}") from None
    if len(data) > PROPOSAL_BYTES_MAX:
        raise CodecError(f"the proposal has {len(data)} bytes; at most {PROPOSAL_BYTES_MAX} are allowed")
    return data


def decode_proposal(data: bytes) -> Proposal:
    """The proposal that these bytes are; CodecError says why they are none."""
    if not data:
        raise CodecError("the proposal is empty: its first byte must be the format version")
    if len(data) > PROPOSAL_BYTES_MAX:
        raise CodecError(f"the proposal has {len(data)} bytes; at most {PROPOSAL_BYTES_MAX} are allowed")
    if data[0] != PROPOSAL_VERSION:
        raise CodecError(f"proposal format {data[0]} is unknown: this program reads {PROPOSAL_VERSION}")
    try:
        return _decoder.decode(memoryview(data)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Input that nests too deep or holds bad UTF-8 is bad input like any other, and is refused as such.
        raise CodecError(f"not a proposal: {_short(error)}") from None


def seal_snapshot(body: bytes) -> bytes:
    """``body`` in an envelope by which ``open_snapshot`` notices a torn or damaged copy."""
    return _SNAPSHOT_HEAD.pack(_SNAPSHOT_MAGIC, SNAPSHOT_VERSION, len(body), google_crc32c.value(body)) + body


def open_snapshot(data: bytes) -> bytes:
    """The body of a sealed snapshot; CodecError when it is torn, damaged, foreign or of another version."""
    if len(data) < _SNAPSHOT_HEAD.size:
        raise CodecError(f"a snapshot of {len(data)} bytes is torn: its head alone has {_SNAPSHOT_HEAD.size}")
    magic, version, length, crc = _SNAPSHOT_HEAD.unpack_from(data)
    if magic != _SNAPSHOT_MAGIC:
        raise CodecError("not a ledger snapshot: the magic bytes are missing")
    if version != SNAPSHOT_VERSION:
        raise CodecError(f"snapshot format {version} is unknown: this program reads {SNAPSHOT_VERSION}")
    body = data[_SNAPSHOT_HEAD.size :]
    if length > SNAPSHOT_BYTES_MAX or length != len(body):
        raise CodecError(f"a torn snapshot: the head names {length} bytes of body, {len(body)} are here")
    if google_crc32c.value(body) != crc:
        raise CodecError("a damaged snapshot: the checksum (CRC32C) does not match")
    return body


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 200 else text[:200] + "…"
