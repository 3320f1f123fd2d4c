"""Certificates on disk: made, shown, and refused before a node listens."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest

from node.addresses import Address, Peer
from node.certs import CertFiles, describe, issue, make_all
from node.cli.program import run
from node.cluster import ClusterError, create, hold_lock, open_cluster
from node.config import ConfigError, NodeConfig, load_config, parse_config
from node.tls import load_tls
from raft.tls import TlsRefused, certified_node
from tests.support.tls_certs import CLUSTER, authority, issue_at, long_ago, to_come


@pytest.fixture
def files(tmp_path: Path) -> CertFiles:
    return authority(tmp_path / "certs")


def config(files: CertFiles, node: str = "n1", **changes: Any) -> NodeConfig:
    peer = Peer(Address("127.0.0.1", 20_000), Address("127.0.0.1", 21_000), 22_000)
    values: dict[str, Any] = {
        "node_id": node,
        "cluster_id": CLUSTER,
        "cluster_dir": files.dir.parent,
        "data_dir": files.dir.parent,
        "peers": {node: peer},
        "raft": peer.raft,
        "http": peer.http,
        "wake": peer.wake,
        "tls": True,
        "certs_dir": files.dir,
    }
    return NodeConfig(**(values | changes))


# --- what is made -------------------------------------------------------------------------------------------------


def test_keys_are_for_their_owner_alone(files: CertFiles):
    modes = {path.name: path.stat().st_mode & 0o777 for path in files.dir.iterdir()}
    assert {name for name in modes if name.endswith(".key")} == {"ca.key", "n1.key", "n2.key", "n3.key"}
    assert all(mode == 0o600 for name, mode in modes.items() if name.endswith(".key"))
    assert files.dir.stat().st_mode & 0o077 == 0


def test_openssl_finds_each_certificate_good_for_both_ends_of_a_link(files: CertFiles):
    for purpose in ("sslserver", "sslclient"):
        for node in ("n1", "n2", "n3"):
            command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", files.authority]
            subprocess.run([*command, files.certificate(node)], check=True, capture_output=True)


def test_a_certificate_names_its_node_once_and_the_hosts_as_what_they_are(files: CertFiles):
    issue(files, CLUSTER, "n1", ["10.1.2.3", "fe80::1", "db1.example", "localhost"], replace=True)
    info = next(each for each in describe(files) if each.file == "n1.pem")
    assert info.names == (
        f"oncekeeper://{CLUSTER}/n1", "localhost", "127.0.0.1", "::1", "10.1.2.3", "fe80::1", "db1.example",
    )  # fmt: skip
    assert (info.trusted, info.has_key, info.days_left) == (True, True, 824)


def test_no_certificate_outlives_its_authority(tmp_path: Path):
    files = CertFiles(tmp_path / "certs")
    make_all(files, CLUSTER, {"n1": ()}, days=20_000)
    issue(files, CLUSTER, "n1", (), days=36_500, replace=True)
    root, leaf = describe(files)
    assert leaf.not_after == root.not_after


@pytest.mark.parametrize(("change", "said"), [
    ({"days": 0}, "days=0 must be from 1"), ({"days": 40_000}, "days=40000 must be from 1 to 36500"),
    ({"hosts": {"n1": ["a b"]}}, "host 'a b' must be an IP address or a DNS name"),
    ({"hosts": {"n1": ["*.example"]}}, "must be an IP address or a DNS name"),
    ({"hosts": {"../n1": []}}, "node '../n1' must be"), ({"hosts": {"ca": []}}, "the authority's file"),
])  # fmt: skip
def test_bad_wishes_are_refused_before_anything_is_written(tmp_path: Path, change: dict[str, Any], said: str):
    files = CertFiles(tmp_path / "certs")
    with pytest.raises(ConfigError, match=said.replace("*", r"\*")):
        make_all(files, CLUSTER, **({"hosts": {"n1": []}} | change))
    assert not files.dir.exists()


def test_a_second_authority_is_not_made_over_the_first(files: CertFiles):
    before = files.authority.read_bytes()
    with pytest.raises(ClusterError, match="holds an authority already"):
        make_all(files, CLUSTER, {"n1": ()})
    assert files.authority.read_bytes() == before


# --- whose word a certificate is ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "reason"), [
    ([], "no_node_id"),
    ([("DNS", f"oncekeeper://{CLUSTER}/n1")], "no_node_id"),
    ([("URI", f"oncekeeper://{CLUSTER}/n1"), ("URI", f"oncekeeper://{CLUSTER}/n2")], "no_node_id"),
    ([("URI", "oncekeeper://" + "d" * 32 + "/n1")], "other_cluster"),
    ([("URI", f"oncekeeper://{CLUSTER}")], "no_node_id"), ([("URI", f"oncekeeper://{CLUSTER}/")], "no_node_id"),
    ([("URI", f"oncekeeper://{CLUSTER}/n1/n2")], "no_node_id"),
    ([("URI", f"https://{CLUSTER}/n1")], "no_node_id"),
])  # fmt: skip
def test_a_certificate_that_does_not_name_one_node_of_this_cluster_is_nobodys(
    names: list[tuple[str, str]], reason: str
):
    with pytest.raises(TlsRefused) as refused:
        certified_node({"subjectAltName": tuple(names)}, CLUSTER)
    assert refused.value.reason == reason


def test_no_certificate_is_nobodys():
    for none in (None, {}):
        with pytest.raises(TlsRefused, match="no_certificate"):
            certified_node(none, CLUSTER)


# --- what a node refuses to start with ----------------------------------------------------------------------------


def spoil_expired(files: CertFiles) -> None:
    issue_at(files, "n1", long_ago(), 10)


def spoil_early(files: CertFiles) -> None:
    issue_at(files, "n1", to_come(), 10)


def spoil_cluster(files: CertFiles) -> None:
    issue(files, "d" * 32, "n1", (), replace=True)


def spoil_node(files: CertFiles) -> None:
    for path in (files.certificate, files.key):
        path("n1").write_bytes(path("n2").read_bytes())


def spoil_key(files: CertFiles) -> None:
    files.key("n1").write_bytes(files.key("n2").read_bytes())


def spoil_mode(files: CertFiles) -> None:
    files.key("n1").chmod(0o640)


def spoil_issuer(files: CertFiles) -> None:
    files.authority.write_bytes(authority(files.dir.parent / "other").authority.read_bytes())


def spoil_text(files: CertFiles) -> None:
    files.certificate("n1").write_text("-----BEGIN CERTIFICATE-----\nno\n")


def spoil_missing(files: CertFiles) -> None:
    files.key("n1").unlink()


@pytest.mark.parametrize(("spoil", "said"), [
    (spoil_expired, r"n1\.pem: expired: .*certs add n1 --replace"), (spoil_early, r"n1\.pem: not_yet_valid"),
    (spoil_cluster, r"n1\.pem: other_cluster"), (spoil_node, r"n1\.pem: wrong_id: it is the certificate of n2"),
    (spoil_key, r"n1\.key is not the key of n1\.pem"), (spoil_mode, r"n1\.key: mode 0640 lets others read it"),
    (spoil_issuer, r"n1\.pem: unknown_issuer"), (spoil_text, r"OpenSSL cannot read them"),
    (spoil_missing, r"n1\.key: does not exist, and tls is on; .*oncekeeper certs init"),
])  # fmt: skip
def test_a_node_does_not_start_with_what_the_others_would_refuse(files: CertFiles, spoil: Any, said: str):
    assert load_tls(config(files)) is not None
    spoil(files)
    with pytest.raises(ConfigError, match=said) as refused:
        load_tls(config(files))
    assert refused.value.field == "certs_dir"


def test_a_certificate_that_ends_soon_is_spoken_of(files: CertFiles, caplog: pytest.LogCaptureFixture):
    issue(files, CLUSTER, "n1", (), days=10, replace=True)
    with caplog.at_level(logging.WARNING, "oncekeeper.tls"):
        load_tls(config(files))
    assert "n1.pem ends on" in caplog.text


def test_without_tls_no_certificate_is_looked_for(tmp_path: Path):
    assert load_tls(config(CertFiles(tmp_path / "none"), tls=False)) is None


# --- what a configuration may leave open --------------------------------------------------------------------------

VALUES: dict[str, object] = {
    "node_id": "n1",
    "cluster_id": CLUSTER,
    "cluster_dir": "/c",
    "data_dir": "/c/nodes/n1",
    "peers": {
        "n1": {"raft": "127.0.0.1:1", "http": "127.0.0.1:2", "wake": 3},
        "n2": {"raft": "[::1]:4", "http": "localhost:5", "wake": 6},
    },
}


def peers(**changes: str) -> dict[str, object]:
    both = {name: dict(each) for name, each in VALUES["peers"].items()}  # type: ignore[attr-defined]
    both["n2"] |= changes
    return {"peers": both}


@pytest.mark.parametrize(("changes", "field", "rule"), [
    ({"raft": "0.0.0.0:1"}, "raft", "tls=true"), ({"raft": "10.0.0.1:1", "http_tls": True}, "raft", "tls=true"),
    ({"http": "[::]:1", "tls": True}, "http", "http_tls=true"),
    (peers(raft="10.0.0.2:4"), "peers.n2.raft", "tls=true"),
    (peers(http="db2.example:5") | {"tls": True}, "peers.n2.http", "http_tls=true"),
    (peers(raft="127.0.0.1.example.com:4"), "peers.n2.raft", "tls=true"),
    (peers(raft="127.1:4"), "peers.n2.raft", "tls=true"),
])  # fmt: skip
def test_what_is_beyond_loopback_is_refused_without_tls(changes: dict[str, object], field: str, rule: str):
    with pytest.raises(
        ConfigError, match=rf"^{field}=.* is beyond loopback, where {rule} must be set"
    ) as refused:
        parse_config(VALUES | changes, base=Path("/c"))
    assert refused.value.field == field
    parse_config(VALUES | changes | {"tls": True, "http_tls": True}, base=Path("/c"))


def test_loopback_may_go_without_and_that_is_what_old_directories_say():
    parsed = parse_config(VALUES, base=Path("/c"))
    assert (parsed.tls, parsed.http_tls, parsed.certs_dir) == (False, False, Path("/c/certs"))


# --- a cluster's directory ----------------------------------------------------------------------------------------


def test_a_new_cluster_has_its_certificates_and_speaks_tls(tmp_path: Path):
    cluster = create(tmp_path / "d", nodes=3, app="shop:app", app_dir=tmp_path)
    assert (cluster.tls, cluster.http_tls, cluster.certs_dir) == (True, True, tmp_path / "d" / "certs")
    for node in cluster.peers:
        loaded = load_config(cluster.config_path(node))
        assert loaded.certs_dir == cluster.certs_dir
        assert load_tls(loaded) is not None


def test_a_directory_that_is_moved_keeps_its_certificates(tmp_path: Path):
    create(tmp_path / "d", nodes=1, app="shop:app", app_dir=tmp_path)
    (tmp_path / "d").rename(tmp_path / "e")
    loaded = load_config(open_cluster(tmp_path / "e").config_path("n1"))
    assert loaded.certs_dir == tmp_path / "e" / "certs"


def test_one_node_cannot_opt_out_of_what_all_agreed_on(tmp_path: Path):
    cluster = create(tmp_path / "d", nodes=1, app="shop:app", app_dir=tmp_path)
    path = cluster.config_path("n1")
    load_config(path, env={"ONCEKEEPER_TLS": "true"})
    with pytest.raises(ConfigError, match=r"tls=false .* must be True"):
        load_config(path, env={"ONCEKEEPER_TLS": "false"})


def old_directory(tmp_path: Path) -> Path:
    """As it was made before there were certificates."""
    directory = tmp_path / "d"
    create(directory, nodes=3, app="shop:app", app_dir=tmp_path, tls=False, http_tls=False)
    path = directory / "cluster.json"
    content = json.loads(path.read_text())
    for key in ("tls", "http_tls", "certs_dir"):
        del content[key]
    path.write_text(json.dumps(content))
    return directory


def test_an_old_directory_works_as_before_and_goes_over_by_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    directory = old_directory(tmp_path)
    before = open_cluster(directory)
    assert (before.tls, before.http_tls) == (False, False)
    assert load_tls(load_config(before.config_path("n1"))) is None
    assert run(["certs", "init", "--dir", str(directory)]) == 0
    assert "speaks TLS from its next start on" in capsys.readouterr().out
    after = open_cluster(directory)
    assert (after.tls, after.http_tls, after.peers) == (True, True, before.peers)
    for node in after.peers:
        assert load_tls(load_config(after.config_path(node))) is not None


def test_an_interrupted_change_over_is_finished_by_the_same_command(tmp_path: Path):
    directory = old_directory(tmp_path)
    cluster = open_cluster(directory)
    make_all(CertFiles(directory / "certs"), cluster.cluster_id, {"n1": ()})
    assert run(["certs", "init", "--dir", str(directory)]) == 0
    assert load_tls(load_config(open_cluster(directory).config_path("n3"))) is not None


def test_a_running_cluster_is_not_split_in_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    directory = old_directory(tmp_path)
    lock = open_cluster(directory).node_lock("n2")
    with hold_lock(lock, "n2"):
        assert run(["certs", "init", "--dir", str(directory)]) == 1
    assert "n2 of" in capsys.readouterr().err
    assert not (directory / "certs").exists()


# --- the command --------------------------------------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert run([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_certificates_for_machines_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    where = ["--dir", str(tmp_path)]
    made = shown(capsys, "certs", "init", *where, "--nodes", "n1,n2", "--hosts", "n1=10.0.0.1,db.example",
                 "--days", "90")  # fmt: skip
    uri = f"oncekeeper://{made['cluster_id']}/"
    assert [row["names"][:1] for row in made["certificates"][1:]] == [[uri + "n1"], [uri + "n2"]]
    shown(capsys, "certs", "add", "n3", *where, "--hosts", "10.0.0.3")
    replaced = shown(capsys, "certs", "add", "n1", *where, "--replace", "--days", "10")
    assert {"10.0.0.1", "db.example"} < set(replaced["names"])
    rows = {row["file"]: row for row in shown(capsys, "certs", "show", *where)["certificates"]}
    assert {name: row["days_left"] for name, row in rows.items()} == {
        "ca.pem": 3649, "n1.pem": 9, "n2.pem": 89, "n3.pem": 824,
    }  # fmt: skip
    assert all(row["trusted"] and row["key"] for row in rows.values())


@pytest.mark.parametrize(("words", "code", "said"), [
    (["init"], 2, "nodes is missing"), (["init", "--nodes", "a b"], 2, "node 'a b' must be"),
    (["init", "--nodes", "n1", "--hosts", "n2=h"], 2, "n2 is none of n1"),
    (["init", "--nodes", "n1", "--cluster-id", "x"], 2, "cluster-id=x must be 32 hexadecimal digits"),
    (["init", "--nodes", "n1", "--days", "0"], 2, "days=0 must be from 1"),
    (["show"], 1, "ca.pem: cannot be read"), (["add", "n1"], 1, "ca.pem: cannot be read"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(
    words: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["certs", *words, "--dir", str(tmp_path)]) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_the_authoritys_key_there_are_no_more_certificates(
    files: CertFiles, capsys: pytest.CaptureFixture[str]
):
    files.authority_key.unlink()
    assert run(["certs", "add", "n4", "--dir", str(files.dir.parent)]) == 1
    assert "ca.key: cannot be read" in capsys.readouterr().err
