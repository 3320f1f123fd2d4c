"""Links between two transports in one process, and strangers at the door."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from raft.transport import OBSERVER, VOTER, LinkTimings, Transport
from raft.wire import (
    AppendReply,
    Challenge,
    FrameReader,
    Hello,
    Message,
    Proof,
    SnapshotChunk,
    Stale,
    decode_handshake,
    encode,
)
from tests.support.raft_bomb import bomb, went_off
from tests.support.raft_cluster import free_ports

SECRET = b"s" * 32
QUICK = LinkTimings(connect_ms=200, handshake_ms=300, ping_ms=100, idle_ms=500, retry_ms_max=50)


class Ear:
    def __init__(self) -> None:
        self.heard: list[tuple[str, Message]] = []
        self.events: list[tuple[str, str]] = []
        self.writables = 0

    def link_up(self, peer: str, observer: bool) -> None:
        self.events.append(("observer up" if observer else "up", peer))

    def link_down(self, peer: str) -> None:
        self.events.append(("down", peer))

    def message(self, peer: str, message: Message) -> None:
        self.heard.append((peer, message))

    def writable(self, peer: str) -> None:
        self.writables += 1


async def eventually(probe: Callable[[], Any], what: str = "", seconds: float = 10.0) -> Any:
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while loop.time() < until:
        if seen := probe():
            return seen
        await asyncio.sleep(0.005)
    raise AssertionError(f"not within {seconds} s: {what}; last seen {probe()!r}")


def make(name: str, ports: dict[str, int], **changes: Any) -> tuple[Transport, Ear]:
    ear = Ear()
    settings: dict[str, Any] = {
        "node_id": name,
        "role": VOTER,
        "cluster_id": "c1",
        "secret": SECRET,
        "listen": ("127.0.0.1", ports[name]),
        "peers": {other: ("127.0.0.1", port) for other, port in ports.items() if other != name},
        "receiver": ear,
        "timings": QUICK,
    }
    return Transport(**(settings | changes)), ear


@contextlib.asynccontextmanager
async def running(*transports: Transport) -> AsyncIterator[None]:
    for transport in transports:
        await transport.start()
    try:
        yield
    finally:
        for transport in transports:
            await transport.stop()


def two() -> dict[str, int]:
    return dict(zip(("n1", "n2"), free_ports(2), strict=True))


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))  # type: ignore[arg-type]


def test_two_voters_make_one_link_and_messages_pass_both_ways_in_order():
    async def scenario() -> None:
        ports = two()
        (one, ear_one), (other, ear_other) = make("n1", ports), make("n2", ports)
        async with running(one, other):
            await eventually(lambda: one.has_room("n2") and other.has_room("n1"))
            for term in range(100):
                assert one.send("n2", Stale(term))
                assert other.send("n1", AppendReply(term, 0, 0))
            await eventually(lambda: len(ear_one.heard) == len(ear_other.heard) == 100)
            assert ear_other.heard == [("n1", Stale(term)) for term in range(100)]
            assert ear_one.heard == [("n2", AppendReply(term, 0, 0)) for term in range(100)]
            assert (ear_one.events, ear_other.events) == ([("up", "n2")], [("up", "n1")])
            assert (one.strangers, other.strangers) == (0, 0)

    run(scenario)


def test_a_link_that_breaks_is_reported_on_both_sides_and_made_again():
    async def scenario() -> None:
        ports = two()
        (one, ear_one), (other, ear_other) = make("n1", ports), make("n2", ports)
        async with running(one, other):
            await eventually(lambda: one.has_room("n2") and other.has_room("n1"))
            connection = one.peers["n2"].connection
            assert connection is not None
            connection.close()
            await eventually(lambda: ear_one.events == [("up", "n2"), ("down", "n2"), ("up", "n2")], "n1")
            await eventually(lambda: ear_other.events == [("up", "n1"), ("down", "n1"), ("up", "n1")], "n2")
            assert other.peers["n1"].counters.connects == 2

    run(scenario)


@pytest.mark.parametrize(
    "changes",
    [
        {"secret": b"x" * 32},
        {"cluster_id": "another"},
        {"node_id": "n9"},
        {"role": OBSERVER},
    ],
    ids=["secret", "cluster", "unknown id", "role"],
)
def test_who_is_not_a_peer_gets_no_link(changes: dict[str, Any]):
    async def scenario() -> None:
        ports = two()
        (one, ear_one), (other, ear_other) = make("n1", ports), make("n2", ports, **changes)
        async with running(one, other):
            await eventually(lambda: one.strangers >= 3, "tried and refused")
            assert (ear_one.events, ear_other.events) == ([], [])
            assert (ear_one.heard, ear_other.heard) == ([], [])

    run(scenario)


def test_an_acceptor_without_the_secret_is_not_believed_by_its_dialler():
    async def scenario() -> None:
        ports = two()
        (one, _), (other, ear_other) = make("n1", ports, secret=b"x" * 32), make("n2", ports)
        async with running(one, other):
            await eventually(lambda: one.strangers >= 2)
            assert ear_other.events == []

    run(scenario)


@pytest.mark.parametrize(
    "data",
    [
        bomb(),
        struct.pack("<i", 200) + bomb(),
        struct.pack(">IB", 0x7FFFFFFF, 1) + bytes(1000),
        struct.pack(">IB", 2000, 1) + bytes(1000),
        b"GET /v1/status HTTP/1.1\r\n\r\n",
        bytes(100),
        encode(Stale(10**6)),
        encode(Proof(bytes(32))),
        encode(Hello("c1", "n2", VOTER, "n3", bytes(32))),
        encode(Hello("c1", "n2", VOTER, "n1", b"short")),
    ],
    ids=[
        "pickle",
        "framed pickle",
        "length",
        "handshake length",
        "http",
        "zeros",
        "message",
        "proof",
        "to",
        "nonce",
    ],
)
def test_a_strangers_bytes_close_the_connection_run_nothing_and_get_no_answer(data: bytes):
    async def scenario() -> None:
        one, ear = make("n1", two())
        async with running(one):
            reader, writer = await asyncio.open_connection("127.0.0.1", one.listen[1])
            writer.write(data)
            with contextlib.suppress(ConnectionResetError):  # closed with our bytes unread: as good
                assert await reader.read() == b""
            await eventually(lambda: one.strangers == 1)
            assert (ear.events, ear.heard, went_off()) == ([], [], False)
            writer.close()

    run(scenario)


def test_a_stranger_who_says_nothing_is_closed_after_the_handshake_time():
    async def scenario() -> None:
        one, _ = make("n1", two())
        async with running(one):
            reader, writer = await asyncio.open_connection("127.0.0.1", one.listen[1])
            with contextlib.suppress(ConnectionResetError):  # as above
                assert await reader.read() == b""
            assert one.strangers == 1
            writer.close()

    run(scenario)


def test_strangers_in_waiting_are_bounded():
    async def scenario() -> None:
        timings = LinkTimings(handshake_ms=60_000, strangers_max=3)
        one, _ = make("n1", two(), timings=timings)
        async with running(one):
            ends = [await asyncio.open_connection("127.0.0.1", one.listen[1]) for _ in range(6)]
            await eventually(lambda: one.strangers == 3)
            for _, writer in ends:
                writer.close()

    run(scenario)


def test_a_recorded_handshake_proves_nothing_a_second_time():
    async def scenario() -> None:
        ports = two()
        one, ear = make("n1", ports)
        forger, _ = make("n2", ports)
        async with running(one):
            hello = Hello("c1", "n2", VOTER, "n1", b"n" * 32)

            async def dial(proof: bytes | None) -> bytes:
                reader, writer = await asyncio.open_connection("127.0.0.1", one.listen[1])
                writer.write(encode(hello))
                frames = FrameReader(2000)
                while (part := frames.next()) is None:
                    frames.feed(await reader.read(100))
                answer = decode_handshake(part)
                assert isinstance(answer, Challenge)
                mine = proof or forger.proof(b"dial", hello, answer.node_id, answer.role, answer.nonce)
                writer.write(encode(Proof(mine)))
                await eventually(lambda: ear.events or one.strangers)
                writer.close()
                return mine

            recorded = await dial(None)
            assert ear.events == [("up", "n2")]
            await eventually(lambda: len(ear.events) == 2)
            ear.events.clear()
            await dial(recorded)
            await eventually(lambda: one.strangers == 1)
            assert ear.events == []

    run(scenario)


def test_a_peers_malformed_frame_closes_its_link_and_is_counted():
    async def scenario() -> None:
        ports = two()
        (one, ear), (other, _) = make("n1", ports), make("n2", ports)
        async with running(one, other):
            await eventually(lambda: one.has_room("n2") and other.has_room("n1"))
            connection = other.peers["n1"].connection
            assert connection is not None
            connection.write(struct.pack(">IB", 5, 1) + b"\xc1\xc1\xc1\xc1")
            await eventually(lambda: one.peers["n2"].counters.malformed == 1)
            await eventually(lambda: ear.events[-2:] == [("down", "n2"), ("up", "n2")])
            assert ear.heard == []

    run(scenario)


def test_a_silent_link_is_closed_and_a_quiet_one_is_kept():
    async def scenario() -> None:
        ports = two()
        (one, ear), (other, _) = make("n1", ports), make("n2", ports)
        async with running(one, other):
            await eventually(lambda: one.has_room("n2"))
            heard_at = one.peers["n2"].connection.heard_at  # type: ignore[union-attr]
            await eventually(lambda: one.peers["n2"].connection.heard_at > heard_at)  # type: ignore[union-attr]
            assert ear.events == [("up", "n2")]
            # The other goes mute, as behind a black hole.
            assert other._pinger is not None
            other._pinger.cancel()
            await eventually(lambda: ("down", "n2") in ear.events)

    run(scenario)


def test_the_send_window_holds_back_and_its_reopening_is_told():
    async def scenario() -> None:
        ports = two()
        timings = LinkTimings(window_bytes=100_000)
        (one, ear), (other, ear_other) = (
            make("n1", ports, timings=timings),
            make("n2", ports, timings=timings),
        )
        async with running(one, other):
            await eventually(lambda: one.has_room("n2") and other.has_room("n1"))
            reading = other.peers["n1"].connection._transport  # type: ignore[union-attr]
            assert reading is not None
            reading.pause_reading()
            sent = 0
            big = AppendReply(1, 1, 1)
            while one.has_room("n2"):
                one.send("n2", SnapshotChunk(1, 1, 1, 1, 10**6, 0, 0, bytes(50_000 + sent)))
                sent += 1
                assert sent < 1000
            assert one.peers["n2"].counters.held == 1
            reading.resume_reading()
            await eventually(lambda: ear.writables == 1)
            one.send("n2", big)
            await eventually(lambda: len(ear_other.heard) == sent + 1, "none was lost")

    run(scenario)


def test_a_dial_whose_first_packet_is_dropped_is_given_up_and_tried_again():
    async def scenario() -> None:
        # A listener whose backlog is full drops further first packets.
        with socket.create_server(("127.0.0.1", 0), backlog=0) as hole:
            port = hole.getsockname()[1]
            fillers = []
            for _ in range(4):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
                fillers.append(filler)
            await asyncio.sleep(0)
            ports = {"n1": port, "n2": free_ports(1)[0]}
            other, _ = make("n2", ports)
            dials = 0
            dial = other._dial

            async def counted(peer: Any) -> Any:
                nonlocal dials
                result = await dial(peer)
                dials += 1
                return result

            other._dial = counted  # type: ignore[method-assign]
            async with running(other):
                await eventually(lambda: dials >= 2, "two dials given up")
            for filler in fillers:
                filler.close()

    run(scenario)


def test_an_observer_dials_is_known_as_one_and_is_heard():
    async def scenario() -> None:
        ports = dict(zip(("n1", "o1"), free_ports(2), strict=True))
        one, ear = make("n1", ports, peers={}, observers=["o1"])
        watcher, ear_watcher = make("o1", ports, role=OBSERVER)
        async with running(one, watcher):
            await eventually(lambda: ear.events == [("observer up", "o1")])
            await eventually(lambda: ear_watcher.events == [("up", "n1")])
            watcher.send("n1", Stale(1))
            await eventually(lambda: ear.heard == [("o1", Stale(1))])

    run(scenario)


def test_a_taken_port_is_an_error_at_start():
    async def scenario() -> None:
        ports = two()
        with socket.create_server(("127.0.0.1", ports["n1"])):
            one, _ = make("n1", ports)
            with pytest.raises(OSError, match="address already in use"):
                await one.start()
            await one.stop()

    run(scenario)
