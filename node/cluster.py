"""A cluster's data directory on this machine: who is in it, where it listens, its secret, and who is running.

``cluster.json`` is the one place that says which nodes there are; it is written once, whole, and replaced
atomically when the application changes. Ports are chosen when the directory is made and stay: clients and
peers may rely on them.

Whether a process runs is asked of the kernel and not of a pid file: each node and the supervisor hold a
``flock`` on their lock file for as long as they live, and the pid inside is believed only while the lock is
held.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import secrets
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from node.config import (
    FORMAT,
    ConfigError,
    Peer,
    check_app,
    check_environment,
    parse_config,
    read_shared,
)

NODES_MAX = 9
SECRET_BYTES = 32
# Removed by the node when it has something to lose (raft/store.py).
UNBORN = "unborn"
UNBORN_TEXT = (
    "This node has never held anything of its cluster. Do not make this file again: it would let a node that\n"
    "lost its disk vote as if it had forgotten nothing.\n"
)
CERTS = "certs"  # the directory of the certificates, in the data directory
HTTP_TLS_DEFAULT = True  # docs/security.md has the figures


class ClusterError(Exception):
    """The data directory cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """An opened data directory."""

    dir: Path
    cluster_id: str
    app: str
    app_dir: Path
    peers: Mapping[str, Peer]
    tls: bool = False
    http_tls: bool = False
    certs_dir: Path = Path()

    def node_dir(self, node: str) -> Path:
        return self.dir / "nodes" / node

    def config_path(self, node: str) -> Path:
        return self.node_dir(node) / "node.toml"

    def node_lock(self, node: str) -> Path:
        return self.node_dir(node) / "node.lock"

    @property
    def supervisor_lock(self) -> Path:
        return self.dir / "supervisor.lock"

    def running(self) -> dict[str, int]:
        """The pid of each node that is running."""
        found = {node: lock_holder(self.node_lock(node)) for node in self.peers}
        return {node: pid for node, pid in found.items() if pid}


# --- making and opening ---------------------------------------------------------------------------


def exists(directory: Path) -> bool:
    return (directory / "cluster.json").exists()


def create(
    directory: Path,
    *,
    nodes: int,
    app: str,
    app_dir: Path,
    log_settings: Mapping[str, object] | None = None,
    settings: Mapping[str, object] | None = None,
    tls: bool = True,
    http_tls: bool = HTTP_TLS_DEFAULT,
) -> Cluster:
    """Make a data directory. ``log_settings`` go to cluster.json, ``settings`` to every node.toml.

    All is checked before anything is written.
    """
    if not 1 <= nodes <= NODES_MAX:
        raise ConfigError(f"nodes={nodes} must be from 1 to {NODES_MAX}: every node votes", "nodes")
    check_app(app)
    if directory.exists() and not directory.is_dir():
        raise ClusterError(f"{directory}: is a file; name a directory")
    if directory.exists() and any(directory.iterdir()):
        raise ClusterError(
            f"{directory}: is not empty and holds no cluster.json; name a new or empty directory"
        )
    names = [f"n{number}" for number in range(1, nodes + 1)]
    ports = iter(free_ports(3 * nodes))
    content = {
        "format": FORMAT,
        "cluster_id": secrets.token_hex(16),
        "app": app,
        "app_dir": str(app_dir.absolute()),
        "log": "embedded",
        "partitions": 12,
        **(log_settings or {}),
        "bloom_seed": secrets.randbits(32),
        "session_timeout_ms": 4000,
        "tls": tls,
        "http_tls": http_tls,
        "certs_dir": CERTS,
        "nodes": {
            name: {
                "raft": f"127.0.0.1:{next(ports)}",
                "http": f"127.0.0.1:{next(ports)}",
                "wake": next(ports),
            }
            for name in names
        },
    }
    shared = {key: value for key, value in content.items() if key not in ("format", "nodes", "certs_dir")}
    values = shared | {
        "peers": content["nodes"],
        "node_id": names[0],
        "cluster_dir": directory,
        "data_dir": directory,
    }
    parse_config(values | dict(settings or {}), base=directory)
    check_environment(shared, values | dict(settings or {}))
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    write_atomically(directory / "secret", secrets.token_hex(SECRET_BYTES) + "\n", mode=0o600)
    (directory / "log").mkdir(exist_ok=True)
    if tls or http_tls:
        from node.certs import DAYS_UNWATCHED, CertFiles, make_all

        cluster_id = str(content["cluster_id"])
        make_all(CertFiles(directory / CERTS), cluster_id, dict.fromkeys(names, ()), days=DAYS_UNWATCHED)
    for name in names:
        home = directory / "nodes" / name
        home.mkdir(parents=True, exist_ok=True)
        write_atomically(home / "node.toml", _node_toml(name, settings or {}))
        write_atomically(home / UNBORN, UNBORN_TEXT)
    # Last: a directory with cluster.json is whole.
    write_atomically(directory / "cluster.json", json.dumps(content, indent=2) + "\n")
    return open_cluster(directory)


def open_cluster(directory: Path) -> Cluster:
    """Raises ConfigError (damaged, newer) or ClusterError (not there)."""
    path = directory / "cluster.json"
    if not path.exists():
        raise ClusterError(
            f"{directory}: holds no cluster (no cluster.json); make one with: oncekeeper cluster up"
        )
    shared = read_shared(path)
    peers = shared.get("peers")
    node = next(iter(peers)) if isinstance(peers, dict) and peers else "n1"
    try:
        config = parse_config(
            shared | {"node_id": node, "cluster_dir": directory, "data_dir": directory}, base=directory
        )
    except ConfigError as error:
        # The file calls the peers by the word of people: nodes.
        raise ConfigError(f"{path}: {error}".replace(" peers", " nodes"), error.field) from error
    read_secret(directory)
    return Cluster(
        dir=directory.absolute(),
        cluster_id=config.cluster_id,
        app=config.app,
        app_dir=config.app_dir,
        peers=config.peers,
        tls=config.tls,
        http_tls=config.http_tls,
        certs_dir=config.certs_dir,
    )


def set_app(cluster: Cluster, app: str, app_dir: Path) -> Cluster:
    """Give an existing cluster another application (the nodes take it at their next start)."""
    check_app(app)
    return change_shared(cluster.dir, {"app": app, "app_dir": str(app_dir.absolute())})


def change_shared(directory: Path, changes: Mapping[str, object]) -> Cluster:
    """Write into ``cluster.json``, whole; the nodes take it at their next start."""
    path = directory / "cluster.json"
    content = json.loads(path.read_text("utf-8"))
    write_atomically(path, json.dumps(content | dict(changes), indent=2) + "\n")
    return open_cluster(directory)


def _node_toml(node: str, settings: Mapping[str, object]) -> str:
    lines = [
        "# Settings of this node alone; what all nodes share stands in ../../cluster.json.",
        "# `oncekeeper config show --config THIS_FILE` lists every setting and where it came from.",
        f"format = {FORMAT}",
        f"node_id = {json.dumps(node)}",
        'cluster_dir = "../.."',
    ]
    # JSON's texts, numbers and booleans are TOML's too.
    lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """All of it or nothing, also through a power cut."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            os.fchmod(file, mode)
            os.write(file, text.encode())
            os.fsync(file)
        finally:
            os.close(file)
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise ClusterError(f"{path}: cannot be written: {error.strerror}") from error


# --- the secret -----------------------------------------------------------------------------------


def read_secret(directory: Path) -> bytes:
    """The cluster's secret, which proves to a peer that a node belongs. Nobody else may read it."""
    path = directory / "secret"
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if mode & 0o077:
        raise ConfigError(f"{path}: mode {mode:04o} lets others read it; run: chmod 600 {path}", "secret")
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"{path}: must hold {2 * SECRET_BYTES} hexadecimal digits", "secret")
    return secret


def http_token(secret: bytes) -> str:
    """What the HTTP API wants as a bearer token. Derived, so that who sees it cannot join as a node."""
    return hashlib.blake2b(secret, digest_size=32, person=b"oncekeeper-http").hexdigest()


# --- ports ----------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Ports that are free now for TCP and UDP on loopback.

    They lie below the kernel's ephemeral range: a port out of it could be taken at any time as the source
    of some outgoing connection, and then a stopped node would find its port taken when it comes back.
    """
    low = 10_000
    high = _ephemeral_low()
    if high - low < 1000:
        low, high = 10_000, 65_535
    found: list[int] = []
    for port in random.SystemRandom().sample(range(low, high), min(high - low, 50 * count)):
        if port_is_free(port):
            found.append(port)
            if len(found) == count:
                return found
    raise ClusterError(f"there are no {count} free ports from {low} to {high} on 127.0.0.1")


def _ephemeral_low() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768  # Linux's default


def port_is_free(port: int, *, tcp: bool = True, udp: bool = True) -> bool:
    for kind, wanted in ((socket.SOCK_STREAM, tcp), (socket.SOCK_DGRAM, udp)):
        if not wanted:
            continue
        with socket.socket(socket.AF_INET, kind) as probe:
            if kind == socket.SOCK_STREAM:
                # As the node does: what lingers in TIME_WAIT from its own past is no obstacle.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    return False
                raise
    return True


def refuse_taken_ports(cluster: Cluster, node: str) -> None:
    """Before a node is started: a taken port is named, with the file where it can be changed."""
    peer = cluster.peers[node]
    wanted = (("raft", peer.raft.port, "tcp"), ("http", peer.http.port, "tcp"), ("wake", peer.wake, "udp"))
    for name, port, kind in wanted:
        if not port_is_free(port, tcp=kind == "tcp", udp=kind == "udp"):
            raise ClusterError(
                f"port {port} ({kind}), the {name} port of {node}, is taken by another process: "
                f"stop that, or change nodes.{node}.{name} in {cluster.dir / 'cluster.json'}"
            )


# --- locks ----------------------------------------------------------------------------------------


class Locked(ClusterError):
    """Another live process holds the lock."""


@contextmanager
def hold_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock for the life of the block; the kernel lets go when the process ends, in whatever way."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _pid_in(path)
            raise Locked(f"{what} is running already as process {holder or '?'} (it holds {path})") from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(file)


def is_held(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        # Shared, so that two who ask at the same time do not take each other for the holder.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def lock_holder(path: Path) -> int:
    """The pid of the process that holds the lock; 0: nobody does (or it has not yet written its pid)."""
    return _pid_in(path) if is_held(path) else 0


def _pid_in(path: Path) -> int:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return 0


def signal_holder(path: Path, number: signal.Signals) -> bool:
    """Send a signal to the process that holds the lock; False if nobody does.

    The pid is pinned by a descriptor first, and only then is it asked whether this process has the lock
    file open: a number that was left over, or given to another process in between, cannot be hit.
    """
    pid = lock_holder(path)
    if not pid:
        return False
    try:
        pinned = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if lock_holder(path) != pid or not _has_open(pid, path):
            return False
        signal.pidfd_send_signal(pinned, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pinned)
    return True


def _has_open(pid: int, path: Path) -> bool:
    wanted = str(path.resolve())
    try:
        return any(os.readlink(each.path) == wanted for each in os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return False  # it ended while we looked
