"""Where nodes are reached: addresses and peers, parsed and checked. Settings that are wrong raise ConfigError."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

NODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
NODE_ID_RULE = "must be 1 to 32 letters, digits, '-' or '_', a letter or digit first"


class ConfigError(ValueError):
    """A setting is wrong. The message names the field and the rule; ``field`` is the field's name."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True, order=True)
class Address:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: object, name: str) -> Address:
        if not isinstance(text, str):
            raise ConfigError(f'{name}={text!r} must be text of the form "host:port"', name)
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        if not colon or not host or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65535:
            raise ConfigError(f"{name}={text!r} must be host:port with a port from 1 to 65535", name)
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            # Any other name is what a resolver makes of it, 127.evil.example too.
            return self.host == "localhost"


@dataclass(frozen=True, slots=True)
class Peer:
    """Where the others reach a node. What the node itself listens on may differ (a proxy, a container)."""

    raft: Address
    http: Address
    wake: int  # UDP port on loopback; used only between processes of one machine


def parse_int(name: str, value: object, low: int | None, high: int | None) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be a whole number", name)
    if low is not None and value < low:
        raise ConfigError(f"{name}={value} must be at least {low}", name)
    if high is not None and value > high:
        raise ConfigError(f"{name}={value} must be at most {high}", name)
    return value


def parse_port(name: str, value: object) -> int:
    return parse_int(name, value, 1, 65535)


def parse_peers(value: object) -> dict[str, Peer]:
    if not isinstance(value, Mapping) or not value:
        raise ConfigError("peers must be a table of nodes, each with raft, http and wake", "peers")
    peers: dict[str, Peer] = {}
    for name, addresses in value.items():
        if not isinstance(name, str) or not NODE_ID.fullmatch(name):
            raise ConfigError(
                f"peers: {name!r} {NODE_ID_RULE}",
                "peers",
            )
        if not isinstance(addresses, Mapping):
            raise ConfigError(f"peers.{name} must be a table with raft, http and wake", f"peers.{name}")
        for key in ("raft", "http", "wake"):
            if key not in addresses:
                raise ConfigError(f"peers.{name}.{key} is missing", f"peers.{name}.{key}")
        for key in addresses:
            if key not in ("raft", "http", "wake"):
                raise ConfigError(
                    f"peers.{name}.{key} is no setting; there are raft, http, wake", f"peers.{name}.{key}"
                )
        raft = Address.parse(addresses["raft"], f"peers.{name}.raft")
        http = Address.parse(addresses["http"], f"peers.{name}.http")
        peers[name] = Peer(raft, http, parse_port(f"peers.{name}.wake", addresses["wake"]))
    _check_addresses(peers)
    return peers


def _check_addresses(peers: Mapping[str, Peer]) -> None:
    used: dict[Address, str] = {}
    for name, peer in peers.items():
        for key, address in (("raft", peer.raft), ("http", peer.http)):
            if address in used:
                raise ConfigError(
                    f"peers.{name}.{key}={address} is the address of {used[address]} too: each needs its own",
                    f"peers.{name}.{key}",
                )
            used[address] = f"peers.{name}.{key}"
