"""Which brokers a broker knows to be alive: one Metadata request, written out by hand.

So that a broker can be waited for, and looked at, without a client library: one of those connects in the
background, retries, and says late and in other words what is asked here. Kafka's protocol: https://kafka.apache.org/protocol
"""

from __future__ import annotations

import socket
import struct

METADATA = 3
METADATA_VERSION = 1  # an empty list of topics means none of them
BYTES_MAX = 1 << 20


class NoAnswer(Exception):
    """Nobody listens there, or not yet, or it is no broker."""


def alive_brokers(port: int, timeout_s: float = 2.0) -> set[int]:
    """The node ids that the broker at ``port`` of this machine would tell a client. Raises NoAnswer."""
    client = b"oncekeeper"
    body = struct.pack(f">hhih{len(client)}si", METADATA, METADATA_VERSION, 1, len(client), client, 0)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout_s) as link:
            link.settimeout(timeout_s)
            link.sendall(struct.pack(">i", len(body)) + body)
            (size,) = struct.unpack(">i", _read(link, 4))
            if not 8 <= size <= BYTES_MAX:
                raise NoAnswer(f"what listens at port {port} is no Kafka broker")
            return _brokers(_read(link, size))
    except OSError as error:
        raise NoAnswer(f"port {port}: {error}") from error
    except (struct.error, IndexError) as error:
        raise NoAnswer(f"what listens at port {port} does not answer as a Kafka broker: {error}") from error


def _read(link: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        more = link.recv(size - len(got))
        if not more:
            raise NoAnswer("the connection was closed")
        got += more
    return got


def _brokers(answer: bytes) -> set[int]:
    _, count = struct.unpack_from(">ii", answer)
    at = 8
    found = set()
    for _ in range(count):
        node, host_bytes = struct.unpack_from(">ih", answer, at)
        at += 6 + host_bytes + 4  # the port
        (rack_bytes,) = struct.unpack_from(">h", answer, at)
        at += 2 + max(rack_bytes, 0)
        found.add(node)
    return found
