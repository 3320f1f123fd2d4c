"""Certificates for tests: of a cluster, of a stranger's, of another time."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path
from unittest import mock

from node import certs
from node.certs import CertFiles, issue, make_all
from raft.tls import client_context, server_context

CLUSTER = "c" * 32


def authority(directory: Path, cluster_id: str = CLUSTER, *nodes: str) -> CertFiles:
    files = CertFiles(directory)
    make_all(files, cluster_id, dict.fromkeys(nodes or ("n1", "n2", "n3"), ()))
    return files


def issue_at(
    files: CertFiles, node: str, now: datetime.datetime, days: int, cluster_id: str = CLUSTER
) -> None:
    """As if it had been made then."""
    with mock.patch.object(certs, "_now", return_value=now):
        issue(files, cluster_id, node, (), days=days, replace=True)


def long_ago() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=400)


def to_come() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=30)


def contexts(files: CertFiles, node: str, trusts: CertFiles | None = None) -> dict[str, ssl.SSLContext]:
    """Both ends' contexts as Transport takes them; ``trusts``: whose authority is believed, else its own."""
    paths = ((trusts or files).authority, files.certificate(node), files.key(node))
    return {"server_ssl": server_context(*paths), "client_ssl": client_context(*paths)}
