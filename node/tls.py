"""What a node holds of its cluster's certificates, tried out before anything listens.

A certificate that is expired, of another node or cluster, or without its key would cut the node off as soon as it
spoke; so it first shakes hands with itself, over memory, and refuses to start with the reason.
"""

from __future__ import annotations

import datetime
import logging
import ssl
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from node.addresses import ConfigError
from node.certs import CertFiles, check_private
from node.cluster import ClusterError
from node.config import NodeConfig
from raft.tls import (
    WRONG_ID,
    Channel,
    TlsRefused,
    certified_node,
    check_each,
    client_context,
    server_context,
)

_log = logging.getLogger("oncekeeper.tls")

WARN_DAYS: Final = 30
_TURNS_MAX: Final = 8  # of a handshake over memory, which takes three


@dataclass(frozen=True)
class NodeTls:
    link_server: ssl.SSLContext
    link_client: ssl.SSLContext
    http_server: ssl.SSLContext
    http_peers: Mapping[str, ssl.SSLContext]
    """For asking each other node: it must prove to be that very node before it sees our token."""
    hosts: frozenset[str]
    """The names in our certificate, by which clients may call us."""
    expires_s: int
    """Epoch; when our certificate ends."""
    http_refused: Counter[str] = field(default_factory=Counter)


def load_tls(config: NodeConfig) -> NodeTls | None:
    """None: the configuration wants no TLS. Raises ConfigError, naming the file and what is wrong with it."""
    if not (config.tls or config.http_tls):
        return None
    files = CertFiles(config.certs_dir)
    node, cluster_id = config.node_id, config.cluster_id
    paths = (files.authority, files.certificate(node), files.key(node))
    for path in paths:
        if not path.is_file():
            raise ConfigError(
                f"{path}: does not exist, and tls is on; make it by: oncekeeper certs init (or: certs add {node})",
                "certs_dir",
            )
    try:
        check_private(files.key(node))
    except ClusterError as error:
        raise ConfigError(str(error), "certs_dir") from error
    refused: Counter[str] = Counter()

    def count(reason: str) -> None:
        refused[reason] += 1

    def is_node(name: str, certificate: Mapping[str, Any] | None) -> None:
        found = certified_node(certificate, cluster_id)
        if found != name:
            raise TlsRefused(WRONG_ID, f"asked {name}, and {found} answered")

    def is_ours(certificate: Mapping[str, Any] | None) -> None:
        # Clients have the token and need no certificate; who shows one must be a node of this cluster.
        if certificate:
            certified_node(certificate, cluster_id)

    try:
        link_server, link_client = server_context(*paths), client_context(*paths)
        own = _try_out(link_server, link_client, node, cluster_id)
        tls = NodeTls(
            link_server,
            link_client,
            check_each(server_context(*paths, clients=ssl.CERT_OPTIONAL), is_ours, count),
            {
                name: check_each(client_context(*paths), lambda shown, name=name: is_node(name, shown))  # type: ignore[misc]
                for name in config.peers
                if name != node
            },
            frozenset(
                value for kind, value in own.get("subjectAltName", ()) if kind in ("DNS", "IP Address")
            ),
            int(ssl.cert_time_to_seconds(own["notAfter"])),
            refused,
        )
    except TlsRefused as error:
        raise ConfigError(_unfit(files.certificate(node), error, node), "certs_dir") from error
    except OSError as error:
        raise ConfigError(f"{config.certs_dir}: {_readable(error, paths)}", "certs_dir") from error
    _warn_of_end(files.certificate(node), tls.expires_s)
    return tls


def _try_out(server: ssl.SSLContext, client: ssl.SSLContext, node: str, cluster_id: str) -> Mapping[str, Any]:
    """Shake hands with ourselves; our own certificate as the others will see it. Raises TlsRefused."""
    dials, accepts = Channel(client, server_side=False), Channel(server, server_side=True)
    dials.start()
    for _ in range(_TURNS_MAX):
        if dials.established and accepts.established:
            break
        if said := dials.outgoing():
            accepts.feed(said)
        if said := accepts.outgoing():
            dials.feed(said)
    own = accepts.certificate() or {}
    found = certified_node(own, cluster_id)
    if found != node:
        raise TlsRefused(WRONG_ID, f"it is the certificate of {found}")
    return own


def _unfit(path: Path, error: TlsRefused, node: str) -> str:
    return f"{path}: {error}; a new one is made by: oncekeeper certs add {node} --replace"


def _readable(error: OSError, paths: tuple[Path, ...]) -> str:
    if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
        return f"{paths[2].name} is not the key of {paths[1].name}"
    if isinstance(error, ssl.SSLError):
        return f"{', '.join(path.name for path in paths)}: OpenSSL cannot read them: {error.reason or error}"
    return f"cannot be read: {error.strerror or error}"


def _warn_of_end(path: Path, expires_s: int) -> None:
    days = (expires_s - time.time()) / 86_400
    if days < WARN_DAYS:
        end = datetime.datetime.fromtimestamp(expires_s, datetime.UTC)
        _log.warning(
            "%s ends on %s, in %d days: oncekeeper certs add NODE --replace", path, f"{end:%F}", days
        )
