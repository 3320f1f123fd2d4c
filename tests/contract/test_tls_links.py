"""Raft links over real mutual TLS: who is let in, who is not, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from node.certs import CertFiles, issue
from raft.tls import client_context, server_context
from raft.transport import VOTER, LinkTimings, Transport
from raft.wire import FRAME_BYTES_MAX, AppendEntries, Hello, Message, Stale, encode
from tests.support.raft_cluster import Cluster, eventually, free_ports
from tests.support.tls_certs import CLUSTER, authority, contexts, issue_at, long_ago, to_come

SECRET = b"s" * 32
QUICK = LinkTimings(connect_ms=300, handshake_ms=1000, ping_ms=200, idle_ms=1000, retry_ms_max=50)


class Ear:
    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.ups = 0

    def link_up(self, peer: str, observer: bool) -> None:
        self.ups += 1

    def link_down(self, peer: str) -> None: ...

    def message(self, peer: str, message: Message) -> None:
        self.heard.append(message)

    def writable(self, peer: str) -> None: ...


def make(name: str, ports: dict[str, int], tls: dict[str, ssl.SSLContext], **more: Any) -> Transport:
    settings: dict[str, Any] = {
        "node_id": name,
        "role": VOTER,
        "cluster_id": CLUSTER,
        "secret": SECRET,
        "listen": ("127.0.0.1", ports[name]),
        "peers": {other: ("127.0.0.1", port) for other, port in ports.items() if other != name},
        "receiver": Ear(),
        "timings": QUICK,
    }
    return Transport(**(settings | tls | more))


async def until(probe: Callable[[], Any], what: Callable[[], object], seconds: float = 15.0) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not probe():
        assert loop.time() < end, f"not within {seconds} s; last seen {what()}"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(*transports: Transport) -> AsyncIterator[None]:
    for transport in transports:
        await transport.start()
    try:
        yield
    finally:
        for transport in transports:
            await transport.stop()


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[None]]], None]:
    start = uvloop.run if request.param == "uvloop" else asyncio.run
    return lambda scenario: start(asyncio.wait_for(scenario(), 60))  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path) -> CertFiles:
    return authority(tmp_path / "certs")


def two() -> dict[str, int]:
    return dict(zip(("n1", "n2"), free_ports(2), strict=True))


def test_frames_of_any_size_pass_both_ways_in_order(files: CertFiles, run: Any):
    async def scenario() -> None:
        ports = two()
        one, other = (make(name, ports, contexts(files, name)) for name in ports)
        sizes = (1, 16_383, 16_384, 16_385, 300_000, FRAME_BYTES_MAX - 100)
        sent: list[Message] = [AppendEntries(1, 0, 0, 0, [(1, b"x" * size)], False) for size in sizes]
        async with running(one, other):
            await until(lambda: one.has_room("n2") and other.has_room("n1"), lambda: one.refused)
            for message in sent:
                assert one.send("n2", message)
                assert other.send("n1", message)
            heard = (one.receiver.heard, other.receiver.heard)  # type: ignore[attr-defined]
            await until(lambda: all(len(each) == len(sent) for each in heard), lambda: heard)
            assert heard == (sent, sent)
            assert (one.refused, other.refused, one.strangers) == ({}, {}, 0)

    run(scenario)


def test_nothing_of_what_is_said_can_be_read_on_the_path(files: CertFiles, run: Any):
    async def scenario() -> None:
        ports = two()
        tapped: list[bytes] = []

        async def tap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            on_reader, on_writer = await asyncio.open_connection("127.0.0.1", ports["n1"])

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                with contextlib.suppress(ConnectionError):
                    while data := await source.read(65_536):
                        tapped.append(data)
                        sink.write(data)
                sink.close()

            await asyncio.gather(pump(reader, on_writer), pump(on_reader, writer))

        proxy = await asyncio.start_server(tap, "127.0.0.1", 0)
        one = make("n1", ports, contexts(files, "n1"))
        other = make(
            "n2", ports, contexts(files, "n2"), peers={"n1": ("127.0.0.1", proxy.sockets[0].getsockname()[1])}
        )
        async with running(one, other):
            await until(lambda: other.has_room("n1"), lambda: other.refused)
            other.send("n1", AppendEntries(1, 0, 0, 0, [(1, b"a secret of the user" * 10)], False))
            await until(lambda: one.receiver.heard, lambda: one.refused)  # type: ignore[attr-defined]
        proxy.close()
        assert tapped
        assert b"a secret of" not in b"".join(tapped)
        assert CLUSTER.encode() not in b"".join(tapped)  # who we are is not told before the handshake either

    run(scenario)


def impostor(kind: str, tmp_path: Path, files: CertFiles) -> dict[str, ssl.SSLContext]:
    """What n2 dials n1 with."""
    if kind == "plain_text":
        return {}
    if kind == "unknown_issuer":
        return contexts(authority(tmp_path / "other"), "n2", trusts=files)
    if kind == "expired":
        issue_at(files, "n2", long_ago(), days=10)
    if kind == "not_yet_valid":
        issue_at(files, "n2", to_come(), days=10)
    if kind == "other_cluster":
        issue_at(files, "n2", long_ago(), 800, cluster_id="d" * 32)
    if kind == "wrong_id":
        return contexts(files, "n3")
    return contexts(files, "n2")


@pytest.mark.parametrize(
    "kind", ["plain_text", "unknown_issuer", "expired", "not_yet_valid", "other_cluster", "wrong_id"]
)
def test_a_dialler_without_its_own_good_certificate_is_refused_and_counted(
    kind: str, tmp_path: Path, files: CertFiles, run: Any
):
    async def scenario() -> None:
        ports = two()
        one = make("n1", ports, contexts(files, "n1"))
        other = make("n2", ports, impostor(kind, tmp_path, files))
        async with running(one, other):
            await until(lambda: one.refused[kind] >= 2, lambda: (one.refused, other.refused))
        assert set(one.refused) == {kind}
        assert one.strangers >= 2
        assert one.receiver.ups == other.receiver.ups == 0  # type: ignore[attr-defined]

    run(scenario)


@pytest.mark.parametrize("kind", ["unknown_issuer", "expired", "other_cluster", "wrong_id"])
def test_an_acceptor_without_its_own_good_certificate_hears_not_one_word(
    kind: str, tmp_path: Path, files: CertFiles, run: Any
):
    async def scenario() -> None:
        ports = two()
        if kind == "unknown_issuer":
            shown = contexts(authority(tmp_path / "other"), "n1", trusts=files)
        elif kind == "wrong_id":
            shown = contexts(files, "n3")
        else:
            # Loaded by n2 first: the files of n1 are replaced.
            shown = {}
        dialler = make("n2", ports, contexts(files, "n2"))
        if kind == "expired":
            issue_at(files, "n1", long_ago(), days=10)
        if kind == "other_cluster":
            issue_at(files, "n1", long_ago(), 800, cluster_id="d" * 32)
        acceptor = make("n1", ports, shown or contexts(files, "n1"))
        async with running(acceptor, dialler):
            await until(lambda: dialler.refused[kind] >= 2, lambda: (dialler.refused, acceptor.refused))
        assert set(dialler.refused) == {kind}
        assert dialler.strangers == 0  # it was us who dialled
        assert dialler.receiver.ups == acceptor.receiver.ups == 0  # type: ignore[attr-defined]

    run(scenario)


def test_a_plain_acceptor_is_not_spoken_to(files: CertFiles, run: Any):
    async def scenario() -> None:
        ports = two()
        heard = asyncio.Queue[bytes]()

        async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.put_nowait(await reader.read(1000))
            writer.write(encode(Stale(1)))

        server = await asyncio.start_server(plain, "127.0.0.1", ports["n1"])
        other = make("n2", ports, contexts(files, "n2"))
        async with running(other):
            await until(lambda: other.refused["plain_text"], lambda: other.refused)
            first = await heard.get()
        server.close()
        assert first[0] == 22  # a TLS handshake, and so no Hello of ours
        assert CLUSTER.encode() not in first

    run(scenario)


def test_a_certificate_alone_does_not_let_in_who_lacks_the_secret(files: CertFiles, run: Any):
    async def scenario() -> None:
        ports = two()
        one = make("n1", ports, contexts(files, "n1"))
        other = make("n2", ports, contexts(files, "n2"), secret=b"t" * 32)
        async with running(one, other):
            await until(lambda: other.refused["bad_secret"] >= 2, lambda: (one.refused, other.refused))
            assert one.receiver.ups == other.receiver.ups == 0  # type: ignore[attr-defined]

    run(scenario)


def test_a_client_without_certificate_or_of_an_old_tls_is_refused(files: CertFiles, run: Any):
    async def scenario() -> None:
        ports = two()
        one = make("n1", ports, contexts(files, "n1"))
        bare = ssl.create_default_context(cafile=str(files.authority))
        old = contexts(files, "n2")["client_ssl"]
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        async with running(one):
            for context, reason in ((bare, "no_certificate"), (old, "tls_failed")):
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_connection(
                        "127.0.0.1", ports["n1"], ssl=context, server_hostname="127.0.0.1"
                    )
                    writer.write(encode(Hello(CLUSTER, "n2", VOTER, "n1", b"n" * 32)))
                    assert await reader.read() == b""
                await until(lambda reason=reason: one.refused[reason] == 1, lambda: one.refused)

    run(scenario)


@pytest.mark.parametrize("cut_at", [0, 1, 5, 100, 600])
def test_a_handshake_that_stops_midway_ends_in_time_and_is_counted(cut_at: int, files: CertFiles, run: Any):
    async def scenario() -> None:
        ports = two()
        one = make("n1", ports, contexts(files, "n1"))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        shaking = contexts(files, "n2")["client_ssl"].wrap_bio(incoming, outgoing)
        with contextlib.suppress(ssl.SSLWantReadError):
            shaking.do_handshake()
        async with running(one):
            reader, writer = await asyncio.open_connection("127.0.0.1", ports["n1"])
            writer.write(outgoing.read()[:cut_at])
            with contextlib.suppress(ConnectionError):
                while await reader.read(1000):
                    pass
            assert (dict(one.refused), one.strangers) == ({"too_slow": 1}, 1)
            writer.close()

    run(scenario)


def test_a_bit_changed_on_the_path_ends_the_link_and_reaches_nobody(files: CertFiles, run: Any):
    async def scenario() -> None:
        ports = two()
        flip = False

        async def tamper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            on_reader, on_writer = await asyncio.open_connection("127.0.0.1", ports["n1"])

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                nonlocal flip
                with contextlib.suppress(ConnectionError):
                    while data := await source.read(65_536):
                        if flip:
                            flip, data = False, data[:-1] + bytes([data[-1] ^ 1])
                        sink.write(data)
                sink.close()

            await asyncio.gather(pump(reader, on_writer), pump(on_reader, writer))

        proxy = await asyncio.start_server(tamper, "127.0.0.1", 0)
        one = make("n1", ports, contexts(files, "n1"))
        other = make(
            "n2", ports, contexts(files, "n2"), peers={"n1": ("127.0.0.1", proxy.sockets[0].getsockname()[1])}
        )
        async with running(one, other):
            await until(lambda: other.has_room("n1"), lambda: other.refused)
            flip = True
            other.send("n1", Stale(77))
            await until(lambda: one.receiver.ups == 2, lambda: (one.refused, other.refused))  # type: ignore[attr-defined]
            assert Stale(77) not in one.receiver.heard  # type: ignore[attr-defined]
        proxy.close()

    run(scenario)


def test_a_node_takes_a_renewed_certificate_of_a_peer_without_a_restart_of_its_own(
    files: CertFiles, run: Any
):
    async def scenario() -> None:
        ports = two()
        one = make("n1", ports, contexts(files, "n1"))
        async with running(one):
            for turn in (1, 2):
                other = make("n2", ports, contexts(files, "n2"))
                async with running(other):
                    await until(lambda turn=turn: one.receiver.ups == turn, lambda: one.refused)  # type: ignore[attr-defined]
                issue(files, CLUSTER, "n2", (), replace=True)

    run(scenario)


def test_the_authority_can_be_changed_one_node_at_a_time(tmp_path: Path, files: CertFiles, run: Any):
    new = authority(tmp_path / "new")
    both = tmp_path / "both.pem"
    both.write_text(files.authority.read_text() + new.authority.read_text())

    def seen(certs: CertFiles, node: str) -> dict[str, ssl.SSLContext]:
        paths = (both, certs.certificate(node), certs.key(node))
        return {"server_ssl": server_context(*paths), "client_ssl": client_context(*paths)}

    async def scenario() -> None:
        # As docs/security.md says: first all believe both, then each is given a certificate of the new one.
        for one_has, other_has in ((files, files), (files, new), (new, new)):
            ports = two()
            one, other = make("n1", ports, seen(one_has, "n1")), make("n2", ports, seen(other_has, "n2"))
            async with running(one, other):
                await until(lambda one=one: one.has_room("n2"), lambda one=one: one.refused)

    run(scenario)


def test_replicas_elect_commit_and_survive_a_kill_over_tls(tmp_path: Path):
    with Cluster(tmp_path, tls=True) as cluster:
        leader = cluster.leader()
        assert cluster.nodes[cluster.follower()].ask("propose", payload="before")[0] == "Applied"
        cluster.kill(leader)
        eventually("another leads", lambda: cluster.leader() != leader)
        survivor = cluster.nodes[cluster.leader()]
        assert survivor.ask("propose", payload="after")[0] == "Applied"
        cluster.start(leader)
        assert eventually("all have both", cluster.settled) == {"before": 1, "after": 1}
