"""Rows 3, 12 and 13 of the defect table, on real sockets: the library's part.

Ours is in tests/unit/test_transport_links.py.
"""

from __future__ import annotations

import pickle
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pysyncobj.tcp_connection
import pytest
from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.tcp_connection import CONNECTION_STATE, TcpConnection

from tests.support.raft_bomb import bomb, went_off
from tests.support.raft_cluster import eventually, free_ports


def frame(pickled: bytes) -> bytes:
    data = zlib.compress(pickled, 3)
    return struct.pack("i", len(data)) + data


@pytest.fixture
def stock() -> Iterator[tuple[SyncObj, int]]:
    port, *others = free_ports(3)
    node = SyncObj(
        f"127.0.0.1:{port}", [f"127.0.0.1:{other}" for other in others], SyncObjConf(autoTick=False)
    )
    yield node, port
    node.destroy()


def ticked(node: SyncObj, probe: Callable[[], Any]) -> Any:
    def once() -> Any:
        node.doTick(0.01)
        return probe()

    return eventually("ticks bring it about", once)


def test_stock_3_a_strangers_bytes_run_code(stock: tuple[SyncObj, int]):
    node, port = stock
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(frame(bomb()))
        assert ticked(node, went_off)


def test_stock_3_a_stranger_is_told_the_status_of_the_cluster(stock: tuple[SyncObj, int]):
    node, port = stock
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(frame(pickle.dumps(["status"], 2)))
        stranger.setblocking(False)
        got = bytearray()

        def answered() -> bool:
            try:
                got.extend(stranger.recv(65536))
            except BlockingIOError:
                return False
            return len(got) > 4

        assert ticked(node, answered)


def test_stock_3_a_length_without_bound_is_awaited(stock: tuple[SyncObj, int]):
    node, port = stock
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(struct.pack("i", 0x7FFFFFFF) + bytes(100_000))
        transport = node._SyncObj__transport
        ticked(node, lambda: transport._unknownConnections)
        (connection,) = transport._unknownConnections
        assert ticked(node, lambda: len(connection._TcpConnection__readBuffer) > 50_000)
        assert connection.state == CONNECTION_STATE.CONNECTED


def test_stock_12_what_a_full_socket_left_over_is_not_sent_when_it_drains():
    near, far = socket.socketpair()
    near.setblocking(False)
    interests: list[int] = []

    class Poller:
        def subscribe(self, descriptor: int, callback: object, mask: int) -> None:
            interests.append(mask)

        def unsubscribe(self, descriptor: int) -> None:
            pass

    connection = TcpConnection(Poller(), socket=near, timeout=100)
    connection._TcpConnection__processConnection(near.fileno(), 2)  # connected: now it waits for reads only
    interests.clear()
    message = [hash(str(number)) for number in range(500_000)]
    connection.send(message)
    assert connection.getSendBufferSize() > 0
    assert interests == []  # nobody waits for the socket to take more
    far.close()
    near.close()


def test_stock_13_a_dial_whose_first_packet_is_dropped_stays_connecting(monkeypatch: pytest.MonkeyPatch):
    low, high = sorted(free_ports(2))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as hole:
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
            fillers.append(filler)
        # The greater id dials.
        node = SyncObj(f"127.0.0.1:{high}", [f"127.0.0.1:{low}"], SyncObjConf(autoTick=False))
        (peer,) = node.otherNodes
        connection = node._SyncObj__transport._connections[peer]
        connection.connect("127.0.0.1", hole.getsockname()[1])
        now = time.monotonic() + 10_000
        monkeypatch.setattr("pysyncobj.tcp_connection.monotonicTime", lambda: now)
        for _ in range(5):
            node.doTick()
        assert connection.state == CONNECTION_STATE.CONNECTING
        node.destroy()
        for filler in fillers:
            filler.close()
    assert pysyncobj.tcp_connection.monotonicTime() == now
