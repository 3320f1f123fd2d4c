"""The HTTP API over TLS: who proves what to whom, before the token is said."""

from __future__ import annotations

import asyncio
import http.client
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from node.addresses import Address, Peer
from node.certs import CertFiles, issue
from node.cli.connection import Api
from node.cli.output import CliError
from node.config import NodeConfig
from node.facade import PeerUnreachable
from node.http.peers import PeerClient
from node.http.server import HttpServer
from node.tls import NodeTls, load_tls
from oncekeeper.client import Client
from oncekeeper.cluster import Cluster
from oncekeeper.errors import ClusterUnreachable, NoCluster
from tests.support.http_node import TOKEN, FakeNode
from tests.support.tls_certs import CLUSTER, authority, issue_at, long_ago


@pytest.fixture
def files(tmp_path: Path) -> CertFiles:
    return authority(tmp_path / "certs")


def config(files: CertFiles, node: str) -> NodeConfig:
    peers = {
        name: Peer(Address("127.0.0.1", 20_000 + at), Address("127.0.0.1", 21_000 + at), 22_000 + at)
        for at, name in enumerate(("n1", "n2", "n3"))
    }
    return NodeConfig(
        node_id=node,
        cluster_id=CLUSTER,
        cluster_dir=files.dir.parent,
        data_dir=files.dir.parent / node,
        peers=peers,
        raft=peers[node].raft,
        http=peers[node].http,
        wake=peers[node].wake,
        tls=True,
        http_tls=True,
        certs_dir=files.dir,
    )


def tls_of(files: CertFiles, node: str) -> NodeTls:
    loaded = load_tls(config(files, node))
    assert loaded is not None
    return loaded


def serve(node: FakeNode, tls: NodeTls, test: Callable[[int], Awaitable[None]]) -> None:
    async def scenario() -> None:
        server = HttpServer(node, Address("127.0.0.1", 0), TOKEN, tls.hosts, tls)
        port = await server.start()
        try:
            await test(port)
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[FakeNode]:
    made = FakeNode(tmp_path)
    yield made
    made.records.close()


async def ask(clients: Mapping[str, ssl.SSLContext] | None, port: int, name: str = "n1") -> Any:
    client = PeerClient({name: f"127.0.0.1:{port}"}, TOKEN, clients)
    try:
        return await client.ask(name, "GET", "/v1/node", timeout_ms=5000)
    finally:
        await client.close()


def test_nodes_ask_each_other_and_the_refused_are_shown_by_reason(node: FakeNode, files: CertFiles):
    async def test(port: int) -> None:
        answer = await ask(tls_of(files, "n2").http_peers, port)
        assert (answer.status, answer.body["refused_http"]) == (200, {})
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"200" not in await reader.read()
        writer.close()
        assert (await ask(tls_of(files, "n2").http_peers, port)).body["refused_http"] == {"plain_text": 1}

    serve(node, tls_of(files, "n1"), test)


def test_a_node_tells_its_token_to_no_other_node_than_it_asks(node: FakeNode, files: CertFiles):
    async def test(port: int) -> None:
        # n3's good certificate stands where n1 should.
        with pytest.raises(PeerUnreachable, match="wrong_id: asked n1, and n3 answered"):
            await ask(tls_of(files, "n2").http_peers, port)

    serve(node, tls_of(files, "n3"), test)


def test_a_node_of_another_cluster_that_shows_its_certificate_is_refused(
    node: FakeNode, files: CertFiles, tmp_path: Path
):
    theirs = tls_of(files, "n2").http_peers["n1"]
    issue_at(files, "n2", long_ago(), 800, cluster_id="d" * 32)
    theirs.load_cert_chain(files.certificate("n2"), files.key("n2"))
    here = tls_of(files, "n1")

    async def test(port: int) -> None:
        with pytest.raises(PeerUnreachable):
            await ask({"n1": theirs}, port)
        assert set(here.http_refused) == {"other_cluster"}  # the HTTP library tries a lost GET again

    serve(node, here, test)


def test_an_expired_certificate_of_a_client_is_refused(node: FakeNode, files: CertFiles):
    theirs = tls_of(files, "n2").http_peers["n1"]
    issue_at(files, "n2", long_ago(), 10)
    theirs.load_cert_chain(files.certificate("n2"), files.key("n2"))
    here = tls_of(files, "n1")

    async def test(port: int) -> None:
        with pytest.raises(PeerUnreachable):
            await ask({"n1": theirs}, port)
        assert set(here.http_refused) == {"expired"}

    serve(node, here, test)


def client_of(files: CertFiles, port: int, host: str = "127.0.0.1") -> Client:
    return Client(
        Cluster(directory=None, urls=(f"https://{host}:{port}",), token=TOKEN, ca=str(files.authority))
    )


def test_clients_and_the_command_line_need_the_authority_and_no_certificate(
    node: FakeNode, files: CertFiles, monkeypatch: pytest.MonkeyPatch
):
    def use(port: int) -> None:
        for host in ("127.0.0.1", "localhost"):
            with client_of(files, port, host) as client:
                assert client.request("GET", "/v1/health")["ok"] is True
        monkeypatch.setenv("ONCEKEEPER_TOKEN", TOKEN)
        monkeypatch.setenv("ONCEKEEPER_CA", str(files.authority))
        from node.cli.connection import connect

        assert connect(f"https://127.0.0.1:{port}").get("/v1/health")["ok"] is True

    async def test(port: int) -> None:
        await asyncio.to_thread(use, port)

    serve(node, tls_of(files, "n1"), test)


def test_a_client_tells_its_token_to_nobody_without_a_certificate_of_the_cluster(
    node: FakeNode, files: CertFiles, tmp_path: Path
):
    """Somebody else's process has taken the port of a node that is down."""
    strangers = authority(tmp_path / "strangers")
    heard: list[str] = []

    def use(port: int) -> None:
        with (
            client_of(files, port) as client,
            pytest.raises(ClusterUnreachable, match=r"certificate.*verify"),
        ):
            client.request("GET", "/v1/node")
        context = ssl.create_default_context(cafile=str(files.authority))
        with pytest.raises(CliError, match=r"must come from the cluster's ca\.pem"):
            Api([Address("127.0.0.1", port)], TOKEN, "c", context).get("/v1/node")

    async def test(port: int) -> None:
        await asyncio.to_thread(use, port)

    class Listening(FakeNode):
        @property
        def identity(self) -> Any:
            heard.append("asked")
            return super().identity

    serve(node, tls_of(strangers, "n1"), test)
    assert heard == []


def test_a_certificate_is_good_only_for_the_hosts_that_it_names(node: FakeNode, files: CertFiles):
    issue(files, CLUSTER, "n1", ["db1.example"], replace=True)

    def use(port: int) -> None:
        context = ssl.create_default_context(cafile=str(files.authority))
        for name, good in (("db1.example", True), ("db2.example", False)):
            link = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
            link._tunnel_host = name  # type: ignore[attr-defined]  # the name that is verified; nothing is tunnelled
            link._tunnel = lambda: None  # type: ignore[attr-defined]
            try:
                link.request("GET", "/v1/health", headers={"Host": f"{name}:1"})
                assert good
                assert link.getresponse().status == 200
            except ssl.SSLCertVerificationError:
                assert not good
            finally:
                link.close()

    async def test(port: int) -> None:
        await asyncio.to_thread(use, port)

    serve(node, tls_of(files, "n1"), test)


@pytest.mark.parametrize(("text", "named"), [
    (None, "No such file"), ("no certificate", "no certificate in PEM"),
])  # fmt: skip
def test_an_authority_file_that_is_none_is_named(text: str | None, named: str, tmp_path: Path):
    ca = tmp_path / "ca.pem"
    if text is not None:
        ca.write_text(text)
    client = Client(Cluster(directory=None, urls=("https://127.0.0.1:1",), token=TOKEN, ca=str(ca)))
    with pytest.raises(NoCluster, match=rf"ca\.pem: {named}"):
        client.request("GET", "/v1/health")


def test_plain_clients_are_told_that_the_node_speaks_https(node: FakeNode, files: CertFiles):
    def use(port: int) -> None:
        with pytest.raises(CliError, match="does it speak https://"):
            Api([Address("127.0.0.1", port)], TOKEN, "c").get("/v1/health")

    async def test(port: int) -> None:
        await asyncio.to_thread(use, port)

    serve(node, tls_of(files, "n1"), test)
