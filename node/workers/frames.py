"""Frames between a node and a worker process: four bytes of length (big-endian), then MessagePack.

Both ends belong to one node, but a worker runs foreign code that may scribble on its socket: the node bounds and
validates what it reads, and a worker that breaks the format is killed.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from node.workers.port import HandlerInfo, Report, Work

FRAME_BYTES_MAX = 32 * 1024 * 1024
WORK_BYTES_MAX = 16 * 1024 * 1024  # the bodies of one Work
WORK_COUNT_MAX = 65_536
REPORT_BYTES_MAX = 4 * 1024 * 1024  # results gathered before a report must be sent


class Job(msgspec.Struct, frozen=True, array_like=True, tag="job"):
    """A Work, and where the journal keeps its state bytes."""

    entry: int
    states_at: int
    work: Work


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Finish what was handed over, then leave."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    pid: int
    handlers: tuple[HandlerInfo, ...]
    error: str = ""  # the application cannot be loaded; the worker leaves


class Reported(msgspec.Struct, frozen=True, array_like=True, tag="reported"):
    reports: tuple[Report, ...]


Down = Job | Stop
Up = Hello | Reported

_encoder = msgspec.msgpack.Encoder()


class BrokenFrame(Exception):
    """The other end does not keep to the format."""


def encode(message: Down | Up) -> bytearray:
    buffer = bytearray(4)
    _encoder.encode_into(message, buffer, 4)
    buffer[:4] = (len(buffer) - 4).to_bytes(4, "big")
    return buffer


class Frames:
    """Cuts a byte stream into the payloads of frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= 4:
                length = int.from_bytes(buffer[at : at + 4], "big")
                if length > FRAME_BYTES_MAX:
                    raise BrokenFrame(f"a frame of {length} bytes exceeds frame_bytes_max={FRAME_BYTES_MAX}")
                if len(buffer) - at - 4 < length:
                    return
                payload = bytes(memoryview(buffer)[at + 4 : at + 4 + length])
                at += 4 + length
                yield payload
        finally:
            del buffer[:at]
