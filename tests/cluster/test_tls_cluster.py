"""Whole nodes over TLS: strangers are counted where people look, and an old directory goes over to it."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
from pathlib import Path

from node.certs import CertFiles
from node.cli.connection import connect_directory
from node.cli.program import run
from node.cluster import open_cluster
from node.config import load_config
from node.supervisor import child_environment, node_command
from node.tls import load_tls
from raft.wire import Hello, encode
from tests.support.raft_cluster import eventually
from tests.support.real_cluster import RealCluster
from tests.support.tls_certs import issue_at, long_ago


def ready(cluster: RealCluster) -> bool:
    rows = {row["node"]: row for row in connect_directory(cluster.cluster.dir).get("/v1/nodes")["nodes"]}
    return all(rows.get(name, {}).get("takes_work") for name in cluster.nodes)


def started(cluster: RealCluster, *nodes: str) -> None:
    cluster.start(*nodes)

    def probe() -> bool:
        try:
            return ready(cluster)
        except Exception:  # noqa: BLE001  # not up yet: asked again until the deadline
            return False

    eventually("all nodes take work", probe, 60)


def refused(cluster: RealCluster, node: str) -> dict[str, int]:
    for target, answer in connect_directory(cluster.cluster.dir).ask_each("/v1/node"):
        if target == cluster.cluster.peers[node].http:
            return dict(answer["refused"])
    raise AssertionError(f"{node} did not answer")


def test_strangers_at_a_raft_port_are_counted_in_the_nodes_own_words(tmp_path: Path):
    with RealCluster(tmp_path) as cluster:
        started(cluster)
        raft = cluster.cluster.peers["n1"].raft
        assert refused(cluster, "n1") == {}
        with socket.create_connection((raft.host, raft.port)) as plain:
            plain.sendall(encode(Hello(cluster.cluster.cluster_id, "n2", "voter", "n1", b"n" * 32)))
            assert plain.recv(100) == b""
        # n3's own good certificate, speaking as n2: what a node that was broken into could try.
        tls = load_tls(load_config(cluster.cluster.config_path("n3")))
        assert tls is not None
        with socket.create_connection((raft.host, raft.port)) as raw:
            shaken = tls.link_client.wrap_socket(raw)
            shaken.sendall(encode(Hello(cluster.cluster.cluster_id, "n2", "voter", "n1", b"n" * 32)))
            with contextlib.suppress(ssl.SSLError, ConnectionResetError):  # cut off, which is as good
                assert shaken.recv(100) == b""
        eventually("both are counted", lambda: refused(cluster, "n1") == {"plain_text": 1, "wrong_id": 1})
        assert ready(cluster)


def test_a_node_whose_certificate_has_expired_says_so_and_stays_down_while_the_others_work(tmp_path: Path):
    with RealCluster(tmp_path) as cluster:
        started(cluster)
        cluster.kill("n3")
        files = CertFiles(cluster.cluster.certs_dir)
        issue_at(files, "n3", long_ago(), 10, cluster.cluster.cluster_id)
        tried = subprocess.run(
            node_command(cluster.cluster, "n3"),
            env=child_environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert tried.returncode == 2
        assert "n3.pem: expired" in tried.stderr
        assert "certs add n3 --replace" in tried.stderr
        assert run(["certs", "add", "n3", "--replace", "--dir", str(cluster.cluster.dir)]) == 0
        started(cluster, "n3")


def test_an_old_directory_starts_without_tls_and_goes_over_by_one_command(tmp_path: Path):
    with RealCluster(tmp_path, nodes=1) as cluster:
        path = cluster.cluster.dir / "cluster.json"
        content = json.loads(path.read_text())
        for key in ("tls", "http_tls", "certs_dir"):
            del content[key]
        path.write_text(json.dumps(content))
        for file in (cluster.cluster.dir / "certs").iterdir():
            file.unlink()
        started(cluster)
        applied = connect_directory(cluster.cluster.dir).get("/v1/node")["applied_index"]
        cluster.kill("n1")
        assert run(["certs", "init", "--dir", str(cluster.cluster.dir)]) == 0
        assert open_cluster(cluster.cluster.dir).tls
        started(cluster)
        assert connect_directory(cluster.cluster.dir).get("/v1/node")["applied_index"] >= applied
