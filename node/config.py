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
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from node.addresses import Address, ConfigError, Peer, parse_int, parse_peers, parse_port
from node.config_rules import (
    CRASH_STEPS,
    DELAY_STEPS,
    SCHEDULE_STEPS,
    check_app,
    check_identity,
    check_together,
)
from node.settings import SETTINGS, NodeConfig, Setting

__all__ = [
    "CRASH_STEPS",
    "DELAY_STEPS",
    "SCHEDULE_STEPS",
    "SETTINGS",
    "Address",
    "ConfigError",
    "Loaded",
    "NodeConfig",
    "Peer",
    "check_app",
    "load_config",
    "load_with_origins",
    "parse_config",
    "show",
]

FORMAT = 1
ENV_PREFIX = "ONCEKEEPER_"
# Read by other parts of the product, and no settings of a node.
ENV_OTHERS = frozenset({"ONCEKEEPER_CLUSTER", "ONCEKEEPER_TOKEN", "ONCEKEEPER_CA"})


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
    check_identity(got["node_id"], got["cluster_id"], peers)
    me = peers[got["node_id"]]
    got["raft"] = Address.parse(values["raft"], "raft") if "raft" in values else me.raft
    got["http"] = Address.parse(values["http"], "http") if "http" in values else me.http
    got["wake"] = parse_port("wake", values.get("wake", me.wake))
    got["app_dir"] = got.get("app_dir", base)
    got.setdefault("certs_dir", got["cluster_dir"] / "certs")
    if got.get("cpu_workers", -1) < 0:
        got["cpu_workers"] = _share_of_cores(peers)
    config = NodeConfig(**got)
    check_together(config)
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


def _share_of_cores(peers: Mapping[str, Peer]) -> int:
    """Nodes that are reached over loopback stand on this machine and share its cores with us."""
    here = max(1, sum(peer.raft.is_loopback for peer in peers.values()))
    return max(1, (os.cpu_count() or 1) // here)


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
