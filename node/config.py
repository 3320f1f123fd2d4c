"""What one node is told: parsed once, at the edge, into one frozen object whose fields were checked together.

Layers, each over the one before: defaults < ``cluster.json`` (what all nodes of a cluster share) < the
node's TOML file < ``ONCEKEEPER_*`` environment < flags (``--set key=value``). A value is remembered with
the layer that it came from, so that ``oncekeeper config show`` can say it. Whatever is unknown, of the
wrong type, out of its bounds or at odds with another field is refused here, before anything is started; the
message names the field and the rule.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.addresses import (
    NODE_ID,
    NODE_ID_RULE,
    Address,
    ConfigError,
    Peer,
    parse_int,
    parse_peers,
    parse_port,
)

if TYPE_CHECKING:
    from oncekeeper.log.opening import Place

__all__ = [
    "Address",
    "ConfigError",
    "Loaded",
    "NodeConfig",
    "Peer",
    "load_config",
    "load_with_origins",
    "parse_config",
    "show",
]

FORMAT = 1
ENV_PREFIX = "ONCEKEEPER_"
# Read by other parts of the product, and no settings of a node.
ENV_OTHERS = frozenset({"ONCEKEEPER_CLUSTER", "ONCEKEEPER_TOKEN", "ONCEKEEPER_CA"})
APP = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

DAY_MS = 86_400_000
# On the leader, where there are schedules (node/schedules.py).
DELAY_STEPS = ("before_defer", "after_defer", "after_fetch", "before_drop", "after_drop")
SCHEDULE_STEPS = ("before_fire", "after_fire", "after_fire_append", "after_launch")
CRASH_STEPS = (
    "before_claim",
    "after_claim",
    "before_settle",
    "after_settle",
    "before_commit",
    "after_commit",
)


@dataclass(frozen=True, slots=True)
class Setting:
    doc: str
    low: int | None = None
    high: int | None = None
    # All nodes of a cluster must agree on it, so that a node may not contradict ``cluster.json``.
    shared: bool = False


SETTINGS = {
    "node_id": Setting("name of this node in the cluster"),
    "cluster_id": Setting("32 hexadecimal digits, drawn when the cluster was made", shared=True),
    "cluster_dir": Setting("the cluster's data directory: cluster.json, secret, log/"),
    "data_dir": Setting("the node's own directory: raft/, work/, history.db, node.log, node.lock"),
    "peers": Setting("every node of the cluster, this one too, and where it is reached"),
    "raft": Setting("where this node listens for Raft"),
    "http": Setting("where this node listens for HTTP"),
    "wake": Setting("UDP port on loopback where this node is told of new tasks", 1, 65535),
    "tls": Setting(
        "whether raft links are mutual TLS; only a cluster on loopback may go without", shared=True
    ),
    "http_tls": Setting("whether the HTTP API is HTTPS; only on loopback it may go without", shared=True),
    "certs_dir": Setting("directory with ca.pem and this node's NODE.pem and NODE.key"),
    "app": Setting("MODULE:APP whose handlers run here; empty: this node only votes and serves"),
    "app_dir": Setting("directory that is put first on the import path for the application"),
    "log": Setting("the task log", shared=True),
    "partitions": Setting(
        "partitions of the task log; on Kafka, of each queue's topic", 1, 4096, shared=True
    ),
    "kafka_replication": Setting(
        "copies of each partition on Kafka; 0: as many as brokers, three at most", 0, 32
    ),
    "kafka_acks": Setting("what a send waits for on Kafka: all, or 1 (faster; a broker's loss may lose it)"),
    "kafka_properties": Setting(
        "file of librdkafka's own settings (KEY=VALUE lines), readable by its owner alone"
    ),
    "kafka_protocol": Setting("how nodes share partitions on Kafka: consumer, classic, or auto"),
    "bloom_seed": Setting("seed of the Bloom filter; drawn for each cluster", 0, 2**32 - 1, shared=True),
    "consumes": Setting("whether this node takes tasks from the log"),
    "session_timeout_ms": Setting("ledger time without a heartbeat until the session lapses", 200, 590_000),
    "heartbeat_ms": Setting("time between heartbeats of the session", 20, 200_000),
    "fence_margin_ms": Setting("how long before its session can lapse a node stops its work", 10, 600_000),
    "cpu_workers": Setting("processes for CPU handlers; -1: the cores, shared by the nodes here", -1, 1024),
    "io_workers": Setting("processes for I/O handlers", 0, 1024),
    "io_threads": Setting("threads in each process for I/O handlers", 1, 4096),
    "memory_bytes_max": Setting("memory of one worker process; 0: unlimited", 0),
    "testimony_wait_ms": Setting("how long a suspect's former holder may take to testify", 0, 600_000),
    "schedule_late_ms": Setting("how late a schedule's firing may be and still not be missed", 0, 86_400_000),
    "drain_ms_max": Setting("how long a stopping node lets running tasks finish", 0, 3_600_000),
    "log_keep_ms": Setting("how long committed tasks stay in the embedded log", 0),
    "history_keep_ms": Setting("how long the history of a task is kept", 0),
    "crash_at": Setting(
        "for tests of recovery: STEP or STEP:N, kill this node when it comes there (N times)"
    ),
    "journal_entries_max": Setting("Raft log entries after which a snapshot shortens the journal", 100),
    "record_history": Setting(
        "for checkers of whole histories: a file that gets a line for what is asked and heard"
    ),
    "history_queue_max": Setting("history records that may wait for the disk; then intake pauses", 100),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What each field means, and its bounds, stands in SETTINGS."""

    node_id: str
    cluster_id: str
    cluster_dir: Path
    data_dir: Path
    peers: Mapping[str, Peer]
    raft: Address
    http: Address
    wake: int
    tls: bool = False
    http_tls: bool = False
    certs_dir: Path = Path()
    app: str = ""
    app_dir: Path = Path()
    log: str = "embedded"
    partitions: int = 12
    kafka_replication: int = 0
    kafka_acks: str = "all"
    kafka_properties: str = ""
    kafka_protocol: str = "auto"
    bloom_seed: int = 0
    consumes: bool = True
    session_timeout_ms: int = 4000
    heartbeat_ms: int = 1000
    fence_margin_ms: int = 1000
    cpu_workers: int = -1
    io_workers: int = 1
    io_threads: int = 16
    memory_bytes_max: int = 1 << 30
    testimony_wait_ms: int = 1500
    schedule_late_ms: int = 30_000
    drain_ms_max: int = 10_000
    log_keep_ms: int = DAY_MS
    history_keep_ms: int = 7 * DAY_MS
    history_queue_max: int = 100_000
    crash_at: str = ""
    journal_entries_max: int = 100_000
    record_history: str = ""

    @property
    def log_place(self) -> Place:
        from oncekeeper.log.opening import Place

        return Place(
            url=self.log,
            directory=self.cluster_dir,
            cluster_id=self.cluster_id,
            partitions=self.partitions,
            replication=self.kafka_replication,
            acks=self.kafka_acks,
            settings_file=str(self.cluster_dir / self.kafka_properties) if self.kafka_properties else "",
            protocol=self.kafka_protocol,
            index_dir=self.data_dir,
        )

    @property
    def secret_path(self) -> Path:
        return self.cluster_dir / "secret"

    @property
    def raft_peers(self) -> dict[str, Address]:
        return {name: peer.raft for name, peer in self.peers.items()}

    @property
    def wake_ports(self) -> tuple[int, ...]:
        """The wake ports of all nodes, this one too."""
        return tuple(peer.wake for peer in self.peers.values())


@dataclass(frozen=True, slots=True)
class Loaded:
    config: NodeConfig
    origins: Mapping[str, str]  # field -> the layer that its value came from


def load_config(
    path: Path, flags: Mapping[str, object] | None = None, env: Mapping[str, str] | None = None
) -> NodeConfig:
    return load_with_origins(path, flags, env).config


def load_with_origins(
    path: Path, flags: Mapping[str, object] | None = None, env: Mapping[str, str] | None = None
) -> Loaded:
    """Read, layer and check. Raises ConfigError; touches nothing."""
    path = path.absolute()
    toml = _read_toml(path)
    from_env = _read_env(os.environ if env is None else env)
    flags = dict(flags or {})
    _refuse_unknown(flags, "--set")
    own = {str(path): toml, "environment": from_env, "--set": flags}

    values: dict[str, object] = {"data_dir": path.parent}
    origins = {"data_dir": "default"}
    _lay(values, origins, own)
    # Where the cluster's directory is must be known before what stands in it can be read.
    cluster_dir = _path("cluster_dir", values.get("cluster_dir", path.parent.parent.parent), path.parent)
    shared = read_shared(cluster_dir / "cluster.json")
    _refuse_contradiction(shared, own)
    values = {"data_dir": path.parent, "cluster_dir": cluster_dir} | shared
    origins = {"data_dir": "default", "cluster_dir": "default"} | dict.fromkeys(shared, "cluster.json")
    _lay(values, origins, own)
    config = parse_config(values, base=path.parent)
    for each in fields(NodeConfig):
        origins.setdefault(each.name, "default")
    return Loaded(config, origins)


def check_environment(shared: Mapping[str, object], values: Mapping[str, object]) -> None:
    """Refuse what the environment would make of a cluster that is about to be made of ``shared`` and ``values``."""
    from_env = _read_env(os.environ)
    _refuse_contradiction(shared, {"environment": from_env})
    parse_config({**shared, **values, **from_env}, base=Path.cwd())


def _lay(
    values: dict[str, object], origins: dict[str, str], layers: Mapping[str, Mapping[str, object]]
) -> None:
    for origin, layer in layers.items():
        values.update(layer)
        origins.update(dict.fromkeys(layer, Path(origin).name if "/" in origin else origin))


def _read_toml(path: Path) -> dict[str, object]:
    try:
        read = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no TOML: {error}") from error
    check_format(read.pop("format", FORMAT), path)
    _refuse_unknown(read, str(path))
    return read


def check_format(found: object, path: Path) -> None:
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ConfigError(f"{path}: format={found!r} must be a whole number from 1 on", "format")
    if found > FORMAT:
        raise ConfigError(
            f"{path}: format={found} is newer than format={FORMAT}, the newest that this version reads: "
            "use the newer Oncekeeper that wrote it",
            "format",
        )


def _read_env(env: Mapping[str, str]) -> dict[str, object]:
    known = {ENV_PREFIX + each.name.upper(): each.name for each in fields(NodeConfig) if each.name != "peers"}
    found: dict[str, object] = {}
    for variable in sorted(env):
        if not variable.startswith(ENV_PREFIX) or variable in ENV_OTHERS:
            continue
        if variable in known:
            found[known[variable]] = env[variable]
            continue
        # Orchestrators put variables of their own under a service's name (ONCEKEEPER_SERVICE_HOST), so an
        # unknown one is no error, unless it is so near to a known one that it was surely meant.
        near = difflib.get_close_matches(variable, known, n=1, cutoff=0.9)
        if near:
            raise ConfigError(f"{variable} is no setting; the nearest is {near[0]}", variable)
    return found


def _refuse_unknown(values: Iterable[str], where: str) -> None:
    known = list(SETTINGS)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(f"{where}: {name} is no setting; the nearest is {near[0]}", name)


def _refuse_contradiction(shared: Mapping[str, object], own: Mapping[str, Mapping[str, object]]) -> None:
    for name, setting in SETTINGS.items():
        if not setting.shared or name not in shared:
            continue
        for origin, layer in own.items():
            # A boolean is true in JSON and "true" in the environment.
            if name in layer and str(layer[name]).lower() != str(shared[name]).lower():
                raise ConfigError(
                    f"{name}={layer[name]} ({origin}) must be {shared[name]}, as in cluster.json: "
                    "all nodes of a cluster must agree on it",
                    name,
                )


def read_shared(path: Path) -> dict[str, object]:
    """What ``cluster.json`` tells every node; {} if there is no such file (a node set up by hand)."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        read = json.loads(text)
        if not isinstance(read, dict):
            raise TypeError("its top must be an object")
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: is damaged ({error}); restore it from a copy: the nodes' data cannot be used without it"
        ) from error
    check_format(read.pop("format", None), path)
    if "nodes" not in read:
        raise ConfigError(f"{path}: nodes is missing: it must name every node and its addresses", "nodes")
    read["peers"] = read.pop("nodes")
    if isinstance(read.get("certs_dir"), str):
        # As in that file, whichever file the node reads it through.
        read["certs_dir"] = str(path.absolute().parent / str(read["certs_dir"]))
    _refuse_unknown(read, str(path))
    return read


def parse_config(values: Mapping[str, object], base: Path) -> NodeConfig:
    """Values (TOML, JSON or texts) to a checked configuration; relative paths are relative to ``base``."""
    _refuse_unknown(values, "config")
    got: dict[str, Any] = {}
    for each in fields(NodeConfig):
        if each.name in values and each.name not in ("peers", "raft", "http", "wake"):
            got[each.name] = _parse(each.name, str(each.type), values[each.name], base, SETTINGS[each.name])
    _require(values, got, "node_id", "cluster_id", "cluster_dir", "data_dir")
    peers = got["peers"] = parse_peers(values.get("peers"))
    _check_identity(got["node_id"], got["cluster_id"], peers)
    me = peers[got["node_id"]]
    got["raft"] = Address.parse(values["raft"], "raft") if "raft" in values else me.raft
    got["http"] = Address.parse(values["http"], "http") if "http" in values else me.http
    got["wake"] = parse_port("wake", values.get("wake", me.wake))
    got["app_dir"] = got.get("app_dir", base)
    got.setdefault("certs_dir", got["cluster_dir"] / "certs")
    if got.get("cpu_workers", -1) < 0:
        got["cpu_workers"] = _share_of_cores(peers)
    config = NodeConfig(**got)
    _check_together(config)
    return config


def _require(values: Mapping[str, object], got: Mapping[str, object], *names: str) -> None:
    for name in names:
        if name not in got:
            raise ConfigError(f"{name} is missing: {SETTINGS[name].doc}", name)
    if "peers" not in values:
        raise ConfigError(f"peers is missing: {SETTINGS['peers'].doc}", "peers")


def _parse(name: str, kind: str, value: object, base: Path, rule: Setting) -> object:
    if kind == "Path":
        return _path(name, value, base)
    if kind == "bool":
        return _bool(name, value)
    if kind == "int":
        return parse_int(name, value, rule.low, rule.high)
    if not isinstance(value, str):
        raise ConfigError(f"{name}={value!r} must be text", name)
    return value


def _path(name: str, value: object, base: Path) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ConfigError(f"{name}={value!r} must be a path", name)
    return Path(os.path.normpath(base / Path(value).expanduser()))


def _bool(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ConfigError(f"{name}={value!r} must be true or false", name)


def _check_identity(node_id: str, cluster_id: str, peers: Mapping[str, Peer]) -> None:
    if not NODE_ID.fullmatch(node_id):
        raise ConfigError(
            f"node_id={node_id!r} {NODE_ID_RULE}",
            "node_id",
        )
    if not re.fullmatch(r"[0-9a-f]{32}", cluster_id):
        raise ConfigError(f"cluster_id={cluster_id!r} must be 32 hexadecimal digits", "cluster_id")
    if node_id not in peers:
        raise ConfigError(f"node_id={node_id!r} must be one of peers ({', '.join(sorted(peers))})", "node_id")


def _share_of_cores(peers: Mapping[str, Peer]) -> int:
    """Nodes that are reached over loopback stand on this machine and share its cores with us."""
    here = max(1, sum(peer.raft.is_loopback for peer in peers.values()))
    return max(1, (os.cpu_count() or 1) // here)


def _check_together(config: NodeConfig) -> None:
    check_app(config.app)
    if config.fence_margin_ms >= config.session_timeout_ms:
        raise ConfigError(
            f"fence_margin_ms={config.fence_margin_ms} must be below "
            f"session_timeout_ms={config.session_timeout_ms}: work must stop before its session can lapse",
            "fence_margin_ms",
        )
    room_ms = config.session_timeout_ms - config.fence_margin_ms
    if config.heartbeat_ms * 2 > room_ms:
        raise ConfigError(
            f"heartbeat_ms={config.heartbeat_ms} must be at most half of session_timeout_ms - "
            f"fence_margin_ms = {room_ms}: else one late heartbeat stops the node's work",
            "heartbeat_ms",
        )
    if config.consumes and config.app and config.cpu_workers + config.io_workers == 0:
        raise ConfigError(
            "cpu_workers=0 and io_workers=0 leave nothing to run tasks: set one of them, or consumes=false",
            "cpu_workers",
        )
    _check_exposure(config)
    if config.raft == config.http:
        raise ConfigError(f"raft={config.raft} and http={config.http} must be two ports", "raft")
    if config.log != "embedded":  # which is always there: commands that only ask need not load any log
        check_log(config.log_place)
    check_crash_at(config.crash_at)


def _check_exposure(config: NodeConfig) -> None:
    """What passes beyond this machine is encrypted: a setting that was forgotten must not lay it open."""
    node = config.node_id
    raft = {"raft": config.raft} | {f"peers.{name}.raft": peer.raft for name, peer in config.peers.items()}
    http = {"http": config.http} | {f"peers.{name}.http": peer.http for name, peer in config.peers.items()}
    for switch, on, addresses in (("tls", config.tls, raft), ("http_tls", config.http_tls, http)):
        for name, address in addresses.items():
            if not on and not address.is_loopback:
                raise ConfigError(
                    f"{name}={address} is beyond loopback, where {switch}=true must be set: what passes there "
                    f"can be read and changed by others (certificates for {node}: oncekeeper certs init)",
                    name,
                )


def check_crash_at(text: str) -> None:
    step, _, times = text.partition(":")
    steps = CRASH_STEPS + DELAY_STEPS + SCHEDULE_STEPS
    if text and (step not in steps or (times and not (times.isascii() and times.isdigit()))):
        raise ConfigError(
            f"crash_at={text!r} must be STEP or STEP:N, with a step of {', '.join(steps)}", "crash_at"
        )


def check_app(app: str) -> None:
    if app and not APP.fullmatch(app):
        raise ConfigError(f"app={app!r} must be MODULE:APP, as in shop.tasks:app", "app")


def check_log(place: Place) -> None:
    """A log's scheme must be a plugin that is installed, and the rest be as that one wants it."""
    from oncekeeper.errors import LogUnusable
    from oncekeeper.log.opening import plugin_of

    try:
        plugin_of(place.url).check(place)
    except (LogUnusable, ValueError) as error:
        field = str(error).partition("=")[0]
        raise ConfigError(str(error), field if field in SETTINGS else "log") from None


def show(config: NodeConfig) -> dict[str, object]:
    """The configuration as JSON values, for people and programs."""
    shown: dict[str, object] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name == "peers":
            value = {
                name: {"raft": str(peer.raft), "http": str(peer.http), "wake": peer.wake}
                for name, peer in value.items()
            }
        elif isinstance(value, Path | Address):
            value = str(value)
        shown[each.name] = value
    return shown
