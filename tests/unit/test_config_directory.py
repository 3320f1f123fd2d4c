"""The data directory: made whole or not at all, and refused when it cannot be trusted."""

import json
import os
import signal
import socket
import stat

import pytest

from node.cluster import (
    ClusterError,
    Locked,
    create,
    free_ports,
    hold_lock,
    http_token,
    is_held,
    lock_holder,
    open_cluster,
    read_secret,
    refuse_taken_ports,
    set_app,
    signal_holder,
)
from node.config import ConfigError, load_config


@pytest.fixture
def cluster(tmp_path):
    return create(tmp_path / "data", nodes=3, app="shop:app", app_dir=tmp_path)


def rewrite(cluster, **changes):
    path = cluster.dir / "cluster.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_made_can_be_opened_and_each_node_configured(cluster):
    assert open_cluster(cluster.dir) == cluster
    configs = [load_config(cluster.config_path(node), env={}) for node in ("n1", "n2", "n3")]
    assert [config.node_id for config in configs] == ["n1", "n2", "n3"]
    assert {config.cluster_id for config in configs} == {cluster.cluster_id}
    ports = {port for c in configs for port in (c.raft.port, c.http.port, c.wake)}
    assert len(ports) == 9


def test_the_secret_is_for_the_owner_alone(cluster):
    assert stat.S_IMODE((cluster.dir / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.dir.stat().st_mode) == 0o700
    (cluster.dir / "secret").chmod(0o644)
    with pytest.raises(ConfigError, match=r"mode 0644 lets others read it; run: chmod 600"):
        read_secret(cluster.dir)


def test_the_http_token_does_not_give_the_secret_away(cluster):
    secret = read_secret(cluster.dir)
    assert len(secret) == 32
    assert secret.hex() not in http_token(secret)
    assert http_token(secret) == http_token(read_secret(cluster.dir))


def test_settings_go_to_every_node(tmp_path):
    made = create(
        tmp_path / "d",
        nodes=2,
        app="shop:app",
        app_dir=tmp_path,
        settings={"io_threads": 3, "consumes": False},
    )
    for node in made.peers:
        config = load_config(made.config_path(node), env={})
        assert (config.io_threads, config.consumes) == (3, False)


def test_a_wrong_setting_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="io_threads=0 must be at least 1"):
        create(tmp_path / "d", nodes=3, app="shop:app", app_dir=tmp_path, settings={"io_threads": 0})
    with pytest.raises(ConfigError, match="nodes=0 must be from 1 to 9"):
        create(tmp_path / "d", nodes=0, app="shop:app", app_dir=tmp_path)
    assert not (tmp_path / "d").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ClusterError, match=r"is not empty and holds no cluster.json"):
        create(tmp_path, nodes=3, app="shop:app", app_dir=tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_application_can_be_given_to_an_existing_directory(cluster, tmp_path):
    changed = set_app(cluster, "store:main", tmp_path / "apps")
    assert (changed.app, changed.app_dir) == ("store:main", tmp_path / "apps")
    assert load_config(cluster.config_path("n2"), env={}).app == "store:main"


def test_a_damaged_cluster_json_is_refused(cluster):
    path = cluster.dir / "cluster.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"cluster.json: is damaged"):
        open_cluster(cluster.dir)


def test_a_directory_of_a_newer_format_is_refused(cluster):
    rewrite(cluster, format=2)
    with pytest.raises(ConfigError, match=r"cluster.json: format=2 is newer than format=1"):
        open_cluster(cluster.dir)


def test_a_cluster_json_with_a_wrong_port_is_refused_with_the_field(cluster):
    nodes = json.loads((cluster.dir / "cluster.json").read_text())["nodes"]
    nodes["n2"]["http"] = "127.0.0.1:0"
    rewrite(cluster, nodes=nodes)
    with pytest.raises(ConfigError, match=r"cluster.json: nodes.n2.http='127.0.0.1:0' must be host:port"):
        open_cluster(cluster.dir)


def test_no_directory_is_said_with_what_to_do(tmp_path):
    with pytest.raises(ClusterError, match="make one with: oncekeeper cluster up"):
        open_cluster(tmp_path)


def test_a_taken_port_is_named_with_the_file(cluster):
    with socket.socket() as taker:
        taker.bind(("127.0.0.1", cluster.peers["n2"].http.port))
        taker.listen()
        with pytest.raises(
            ClusterError, match=rf"port {cluster.peers['n2'].http.port} \(tcp\), the http port of n2"
        ):
            refuse_taken_ports(cluster, "n2")
    refuse_taken_ports(cluster, "n2")


def test_ports_lie_below_the_kernels_ephemeral_range():
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        low = int(file.read().split()[0])
    assert max(free_ports(30)) < low


def test_a_lock_has_one_holder_and_is_free_after_it(tmp_path):
    path = tmp_path / "node.lock"
    with hold_lock(path, "node n1"):
        assert is_held(path)
        assert lock_holder(path) == os.getpid()
        with (
            pytest.raises(Locked, match=f"node n1 is running already as process {os.getpid()}"),
            hold_lock(path, "node n1"),
        ):
            pass
    assert not is_held(path)
    assert lock_holder(path) == 0


def test_a_pid_that_a_dead_holder_left_behind_is_never_signalled(tmp_path):
    path = tmp_path / "node.lock"
    path.write_text(f"{os.getpid()}\n")
    assert signal_holder(path, signal.SIGKILL) is False
