"""Where a cluster is: a data directory of this machine, or addresses of its nodes."""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from oncekeeper.errors import NoCluster
from oncekeeper.log.opening import Place

CLUSTER_FORMAT = 1
CLUSTER_VARIABLE = "ONCEKEEPER_CLUSTER"
TOKEN_VARIABLE = "ONCEKEEPER_TOKEN"
CA_VARIABLE = "ONCEKEEPER_CA"
DIRECTORY_DEFAULT = "oncekeeper-data"
SECRET_BYTES = 32


class NodeAddress(msgspec.Struct, frozen=True):
    """One node in ``cluster.json``."""

    raft: str
    http: str
    wake: int = 0


class ClusterFile(msgspec.Struct, frozen=True, kw_only=True):
    """``cluster.json``; fields that only nodes use are passed over."""

    format: int
    cluster_id: str
    log: str = "embedded"
    partitions: int = 12
    kafka_acks: str = "all"
    kafka_properties: str = ""  # relative to the file's directory
    http_tls: bool = False
    certs_dir: str = "certs"  # relative to the file's directory
    nodes: dict[str, NodeAddress]


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """What a client knows of its cluster."""

    directory: Path | None  # None: reached by addresses only
    urls: tuple[str, ...]  # http://host:port, without a slash at the end
    token: str
    ca: str = ""
    """The file of the authorities that a node's certificate must come from; empty: those of this machine."""
    cluster_id: str = ""
    log: Place | None = None
    """None: reached by addresses only, tasks are sent to a node."""
    wake_ports: tuple[int, ...] = ()

    def __str__(self) -> str:
        return str(self.directory) if self.directory else ",".join(self.urls)


def http_token(secret: bytes) -> str:
    """The bearer token of the HTTP API, derived so that showing it does not give the secret away."""
    return hashlib.blake2b(secret, digest_size=32, person=b"oncekeeper-http").hexdigest()


def find_cluster(
    given: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None
) -> Cluster:
    """The cluster that ``given`` names, or ONCEKEEPER_CLUSTER, or ./oncekeeper-data. NoCluster says why none is."""
    environ = os.environ if environ is None else environ
    name = os.fspath(given) if given is not None else environ.get(CLUSTER_VARIABLE) or DIRECTORY_DEFAULT
    if name.startswith(("http://", "https://")):
        return _by_addresses(name, environ.get(TOKEN_VARIABLE, ""), environ.get(CA_VARIABLE, ""))
    return _by_directory(Path(name))


def tls_context(ca: str) -> ssl.SSLContext:
    """Verifies that a server has a certificate of the cluster's authority, and for the host that was asked for.

    Raises NoCluster, naming the file that cannot be used.
    """
    try:
        if not ca:
            return ssl.create_default_context()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and host name
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cafile=ca)
    except OSError as error:
        reason = (
            error.strerror if error.errno and not isinstance(error, ssl.SSLError) else "no certificate in PEM"
        )
        raise NoCluster(
            f"{ca}: {reason}; it must be the cluster's ca.pem ({CA_VARIABLE}, or in its directory)"
        ) from None
    return context


def _by_addresses(text: str, token: str, ca: str) -> Cluster:
    urls = []
    for part in text.split(","):
        url = part.strip().rstrip("/")
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None
        except ValueError:
            good = False
        if not good:
            raise NoCluster(f"cluster={text!r}: {part!r} must be http://HOST:PORT or https://HOST:PORT")
        urls.append(url)
    if not token:
        raise NoCluster(f"cluster={text!r}: the token of the cluster must stand in {TOKEN_VARIABLE}")
    return Cluster(directory=None, urls=tuple(urls), token=token, ca=ca)


def _by_directory(directory: Path) -> Cluster:
    file, secret_file = directory / "cluster.json", directory / "secret"
    try:
        # Looked at before its content: a newer format may differ in everything else.
        raw = file.read_bytes()
        standing = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format")
        if standing is None or bytes(standing) != str(CLUSTER_FORMAT).encode():
            text = "no number" if standing is None else bytes(standing).decode(errors="replace")
            raise NoCluster(f"{file}: format is {text}, this version reads {CLUSTER_FORMAT}")
        found = msgspec.json.decode(raw, type=ClusterFile)
        secret = bytes.fromhex(secret_file.read_text().strip())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoCluster(
            f"{error.filename} does not exist: name a cluster (its directory or addresses) by --cluster or "
            f"{CLUSTER_VARIABLE}, or make one with `oncekeeper cluster up`"
        ) from None
    except OSError as error:
        raise NoCluster(f"{error.filename}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise NoCluster(f"{file}: {error}") from None
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise NoCluster(f"{secret_file}: must hold {SECRET_BYTES} bytes in hexadecimal digits")
    return Cluster(
        directory=directory.resolve(),
        urls=tuple(f"{'https' if found.http_tls else 'http'}://{node.http}" for node in found.nodes.values()),
        token=http_token(secret),
        ca=str(directory.resolve() / found.certs_dir / "ca.pem") if found.http_tls else "",
        cluster_id=found.cluster_id,
        log=Place(
            url=found.log,
            directory=directory.resolve(),
            cluster_id=found.cluster_id,
            partitions=found.partitions,
            acks=found.kafka_acks,
            settings_file=str(directory.resolve() / found.kafka_properties) if found.kafka_properties else "",
        ),
        wake_ports=tuple(node.wake for node in found.nodes.values() if node.wake),
    )
