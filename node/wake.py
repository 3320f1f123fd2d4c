"""Nobody polls: who appends to the embedded log wakes the nodes by a datagram on loopback.

A datagram names the partitions that grew, two bytes each, little endian; an empty one says "look at all". It is
a hint and never more: a lost one costs the second until the node looks by itself, a forged one costs a look.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable

PARTITIONS_MAX = 512


class WakeListener(asyncio.DatagramProtocol):
    """Calls ``on_wake`` with the partitions that were named; None for all."""

    def __init__(self, on_wake: Callable[[frozenset[int] | None], None]) -> None:
        self._on_wake = on_wake

    def datagram_received(self, data: bytes, addr: object) -> None:
        if not data or len(data) % 2 or len(data) > 2 * PARTITIONS_MAX:
            self._on_wake(None)
            return
        self._on_wake(frozenset(struct.unpack(f"<{len(data) // 2}H", data)))


async def listen(port: int, on_wake: Callable[[frozenset[int] | None], None]) -> asyncio.DatagramTransport:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: WakeListener(on_wake), local_addr=("127.0.0.1", port)
    )
    return transport


class Waker:
    """Sends to the nodes of this machine."""

    def __init__(self, ports: Iterable[int]) -> None:
        self._addresses = [("127.0.0.1", port) for port in ports]
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def wake(self, partitions: Iterable[int]) -> None:
        numbers = sorted(set(partitions))[:PARTITIONS_MAX]
        data = struct.pack(f"<{len(numbers)}H", *numbers)
        for address in self._addresses:
            try:
                self._socket.sendto(data, address)
            except OSError:
                continue  # that node is down, or its buffer is full: it looks by itself within a second

    def close(self) -> None:
        self._socket.close()
