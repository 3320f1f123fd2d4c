"""Configuration is refused at the edge, with the field and the rule."""

import json
from pathlib import Path

import pytest

from node.config import Address, ConfigError, load_config, load_with_origins, parse_config, show

PEERS = {
    "n1": {"raft": "127.0.0.1:21001", "http": "127.0.0.1:21002", "wake": 21003},
    "n2": {"raft": "127.0.0.1:21004", "http": "127.0.0.1:21005", "wake": 21006},
}
VALUES = {
    "node_id": "n1",
    "cluster_id": "0" * 32,
    "cluster_dir": "/c",
    "data_dir": "/c/nodes/n1",
    "peers": PEERS,
    "app": "shop:app",
}


def parsed(**changes):
    return parse_config(VALUES | changes, base=Path("/c/nodes/n1"))


@pytest.fixture
def node_toml(tmp_path):
    shared = {"format": 1, "cluster_id": "ab" * 16, "app": "shop:app", "app_dir": "/apps", "log": "embedded"}
    shared |= {"partitions": 12, "bloom_seed": 7, "session_timeout_ms": 4000, "nodes": PEERS}
    (tmp_path / "cluster.json").write_text(json.dumps(shared))
    home = tmp_path / "nodes" / "n1"
    home.mkdir(parents=True)
    path = home / "node.toml"
    path.write_text('format = 1\nnode_id = "n1"\ncluster_dir = "../.."\n')
    return path


def add(path, text):
    path.write_text(path.read_text() + text)


def test_a_node_takes_what_all_share_from_cluster_json(node_toml):
    config = load_config(node_toml, env={})
    assert (config.cluster_id, config.app, config.bloom_seed) == ("ab" * 16, "shop:app", 7)
    assert config.raft == Address("127.0.0.1", 21001)
    assert config.raft_peers == {"n1": Address("127.0.0.1", 21001), "n2": Address("127.0.0.1", 21004)}
    assert config.cluster_dir == node_toml.parent.parent.parent
    assert config.data_dir == node_toml.parent


def test_flags_win_over_environment_over_toml_over_cluster_json(node_toml):
    add(node_toml, "session_timeout_ms = 5000\nio_threads = 2\nio_workers = 2\n")
    env = {"ONCEKEEPER_IO_THREADS": "3", "ONCEKEEPER_IO_WORKERS": "3"}
    loaded = load_with_origins(node_toml, {"io_workers": "4"}, env)
    config = loaded.config
    assert (config.session_timeout_ms, config.io_threads, config.io_workers) == (5000, 3, 4)
    named = ("partitions", "session_timeout_ms", "io_threads", "io_workers", "heartbeat_ms")
    assert [loaded.origins[name] for name in named] == [
        "cluster.json",
        "node.toml",
        "environment",
        "--set",
        "default",
    ]


def test_what_is_shown_of_a_configuration_is_json(node_toml):
    shown = json.loads(json.dumps(show(load_config(node_toml, env={}))))
    assert shown["peers"] == PEERS
    assert shown["raft"] == "127.0.0.1:21001"


def test_a_listening_address_may_differ_from_the_dialled_one():
    config = parsed(raft="0.0.0.0:9", tls=True)
    assert (config.raft, config.raft_peers["n1"]) == (Address("0.0.0.0", 9), Address("127.0.0.1", 21001))


def test_nodes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert parsed().cpu_workers == 4
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert parsed().cpu_workers == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fence_margin_ms": 6000, "session_timeout_ms": 5000},
            "fence_margin_ms=6000 must be below session_timeout_ms=5000: "
            "work must stop before its session can lapse",
        ),
        ({"fence_margin_ms": 4000}, "fence_margin_ms=4000 must be below session_timeout_ms=4000"),
        ({"heartbeat_ms": 1501}, "heartbeat_ms=1501 must be at most half of session_timeout_ms - fence"),
        ({"partitions": 0}, "partitions=0 must be at least 1"),
        ({"io_threads": "many"}, "io_threads='many' must be a whole number"),
        ({"io_threads": True}, "io_threads=True must be a whole number"),
        ({"consumes": "maybe"}, "consumes='maybe' must be true or false"),
        ({"raft": "localhost"}, "raft='localhost' must be host:port with a port from 1 to 65535"),
        ({"http": "127.0.0.1:70000"}, "http='127.0.0.1:70000' must be host:port with a port from 1"),
        ({"wake": 0}, "wake=0 must be at least 1"),
        ({"raft": "127.0.0.1:21002"}, "raft=127.0.0.1:21002 and http=127.0.0.1:21002 must be two ports"),
        ({"node_id": "n9"}, "node_id='n9' must be one of peers (n1, n2)"),
        ({"cluster_id": "xyz"}, "cluster_id='xyz' must be 32 hexadecimal digits"),
        ({"app": "shop"}, "app='shop' must be MODULE:APP, as in shop.tasks:app"),
        ({"cpu_workers": 0, "io_workers": 0}, "cpu_workers=0 and io_workers=0 leave nothing to run tasks"),
        ({"log": "smoke://x"}, "log='smoke://x' names no task log that is installed"),
        ({"peers": {}}, "peers must be a table of nodes"),
        ({"peers": {"n1": {"raft": "a:1", "http": "a:2"}}}, "peers.n1.wake is missing"),
        (
            {"peers": {"n1": {"raft": "a:1", "http": "a:1", "wake": 3}}},
            "peers.n1.http=a:1 is the address of peers.n1.raft too: each needs its own",
        ),
    ],
)
def test_a_wrong_setting_is_refused_with_its_field_and_the_rule(changes, message):
    with pytest.raises(ConfigError) as refused:
        parsed(**changes)
    assert str(refused.value).startswith(message)
    assert refused.value.field is None or refused.value.field in message


def test_an_unknown_key_is_refused_with_the_nearest_known_name(node_toml):
    add(node_toml, "session_timout_ms = 5000\n")
    with pytest.raises(
        ConfigError, match="session_timout_ms is no setting; the nearest is session_timeout_ms"
    ):
        load_config(node_toml, env={})


def test_a_misspelt_variable_is_refused_but_an_orchestrators_own_is_not(node_toml):
    load_config(node_toml, env={"ONCEKEEPER_SERVICE_HOST": "10.0.0.1", "ONCEKEEPER_CLUSTER": "x"})
    with pytest.raises(ConfigError, match="the nearest is ONCEKEEPER_IO_THREADS"):
        load_config(node_toml, env={"ONCEKEEPER_IO_THREDS": "3"})


def test_a_newer_format_is_refused(node_toml):
    node_toml.write_text(node_toml.read_text().replace("format = 1", "format = 2"))
    with pytest.raises(ConfigError, match="format=2 is newer than format=1"):
        load_config(node_toml, env={})


def test_a_node_may_not_contradict_what_all_nodes_share(node_toml):
    add(node_toml, "partitions = 3\n")
    with pytest.raises(ConfigError, match=r"partitions=3 .* must be 12, as in cluster.json"):
        load_config(node_toml, env={})


def test_text_that_is_no_toml_is_refused_with_the_file(node_toml):
    add(node_toml, "= nothing\n")
    with pytest.raises(ConfigError, match=r"node.toml: is no TOML"):
        load_config(node_toml, env={})
