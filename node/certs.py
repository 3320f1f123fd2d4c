"""The certificates of a cluster: one authority, and for each node a key and a certificate that it signed.

``DIR/certs`` holds ``ca.pem`` and, for each node, ``NODE.pem`` and ``NODE.key``: what a node needs. ``ca.key`` is
needed to make more certificates and nothing else; a cluster of several machines keeps it off them. Keys are mode
0600. ``ca.pem`` may hold several authorities, the old one and the new, while a cluster goes over to another.

A node's certificate names the node and the cluster by a URI (raft/tls.py), and the hosts by which clients reach it.
All is P-256 with SHA-256, which every TLS library takes. The package that makes certificates is imported late: it
takes longer than all else that most commands do, and a running node needs none of it.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from node.addresses import NODE_ID, NODE_ID_RULE, ConfigError
from node.cluster import ClusterError, write_atomically
from raft.tls import SCHEME, node_uri

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

DAYS: Final = 825
"""Life of a node's certificate; what people look after should be renewed now and then."""
DAYS_UNWATCHED: Final = 3650
"""Of an authority, and of the certificates that ``cluster up`` makes without asking: nobody would renew them."""
DAYS_MAX: Final = 36_500
LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
_SKEW: Final = datetime.timedelta(hours=1)  # a node whose clock is behind must not find it not yet valid


@dataclass(frozen=True, slots=True)
class CertFiles:
    dir: Path

    @property
    def authority(self) -> Path:
        return self.dir / "ca.pem"

    @property
    def authority_key(self) -> Path:
        return self.dir / "ca.key"

    def certificate(self, node: str) -> Path:
        return self.dir / f"{node}.pem"

    def key(self, node: str) -> Path:
        return self.dir / f"{node}.key"


@dataclass(frozen=True, slots=True)
class CertInfo:
    """A certificate, as people ask for it."""

    file: str
    subject: str
    names: tuple[str, ...]
    not_before: datetime.datetime
    not_after: datetime.datetime
    has_key: bool
    trusted: bool
    """An authority of ``ca.pem`` signed it."""

    @property
    def days_left(self) -> int:
        return (self.not_after - _now()).days


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


# --- making -------------------------------------------------------------------------------------------------------


def make_all(
    files: CertFiles, cluster_id: str, hosts: Mapping[str, Iterable[str]], *, days: int = DAYS
) -> None:
    """An authority, and a certificate for each node of ``hosts``. ClusterError if there are some already."""
    check_days(days)
    for node, its_hosts in hosts.items():
        _check_node(node)
        check_hosts(its_hosts)
    if files.authority.exists() or files.authority_key.exists():
        raise ClusterError(
            f"{files.dir}: holds an authority already; another would cut its nodes off. "
            "For one more certificate: oncekeeper certs add NODE"
        )
    files.dir.mkdir(parents=True, exist_ok=True)
    files.dir.chmod(0o700)
    _make_authority(files, cluster_id, max(days, DAYS_UNWATCHED))
    for node, its_hosts in hosts.items():
        issue(files, cluster_id, node, its_hosts, days=days)


def issue(
    files: CertFiles,
    cluster_id: str,
    node: str,
    hosts: Iterable[str],
    *,
    days: int = DAYS,
    replace: bool = False,
) -> None:
    """A key and a certificate for ``node``, good for the URI of this node and for ``hosts``."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    check_days(days)
    _check_node(node)
    hosts = [*dict.fromkeys((*LOCAL_HOSTS, *check_hosts(hosts)))]
    if files.certificate(node).exists() and not replace:
        raise ClusterError(f"{files.certificate(node)}: exists; --replace makes a new key and certificate")
    authority, authority_key = _read_authority(files)
    key = _new_key()
    names = [x509.UniformResourceIdentifier(node_uri(cluster_id, node)), *map(_host_name, hosts)]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(f"{node} of {cluster_id}", key, days, authority.not_valid_after_utc)
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(_authority_id(authority_key), critical=False)
    )
    _write(files.certificate(node), files.key(node), certificate, authority_key, key)


def _make_authority(files: CertFiles, cluster_id: str, days: int) -> None:
    from cryptography import x509

    key = _new_key()
    name = f"authority of cluster {cluster_id}"
    certificate = (
        _builder(name, key, days)
        .issuer_name(_subject(name))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    _write(files.authority, files.authority_key, certificate, key, key)


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _subject(name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "oncekeeper"),
            x509.NameAttribute(NameOID.COMMON_NAME, name[:64]),  # RFC 5280's bound; who asks reads the URI
        ]
    )


def _builder(
    name: str, key: EllipticCurvePrivateKey, days: int, end: datetime.datetime | None = None
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = _now().replace(microsecond=0)
    until = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(min(until, end) if end else until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_id(key: EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    from cryptography import x509

    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _host_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(
    certificate: Path,
    key_file: Path,
    built: x509.CertificateBuilder,
    signer: EllipticCurvePrivateKey,
    key: EllipticCurvePrivateKey,
) -> None:
    from cryptography.hazmat.primitives import hashes, serialization

    key_text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    signed = built.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    # The key first: a certificate that is there has its key. A node that reads between the two refuses to start.
    write_atomically(key_file, key_text.decode(), mode=0o600)
    write_atomically(certificate, signed.decode())


def _read_authority(files: CertFiles) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    """The authority that ``ca.key`` is the key of; ``ca.pem`` may hold others beside it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    path = files.authority_key
    check_private(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ClusterError(f"{path}: is no private key in PEM without a passphrase: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ClusterError(f"{path}: is not a key of the kind that `oncekeeper certs init` makes")
    for authority in _load(files.authority):
        if authority.public_key() == key.public_key():
            if authority.not_valid_after_utc <= _now():
                raise ClusterError(
                    f"{files.authority}: the authority expired on {authority.not_valid_after_utc:%F}"
                )
            return authority, key
    raise ClusterError(f"{files.authority}: holds no certificate of the key in {path}")


# --- reading ------------------------------------------------------------------------------------------------------


def describe(files: CertFiles) -> list[CertInfo]:
    """Every certificate in the directory, the authorities first."""
    authorities = _load(files.authority)
    found = [_info(files, files.authority, each, authorities) for each in authorities]
    for path in sorted(files.dir.glob("*.pem")):
        if path != files.authority:
            found += [_info(files, path, each, authorities) for each in _load(path)]
    return found


def _info(
    files: CertFiles, path: Path, certificate: x509.Certificate, authorities: list[x509.Certificate]
) -> CertInfo:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = tuple(str(name.value) for name in extension.value)
    except x509.ExtensionNotFound:
        names = ()

    def signed_by(authority: x509.Certificate) -> bool:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    key = files.authority_key if path == files.authority else path.with_suffix(".key")
    return CertInfo(
        file=path.name,
        subject=certificate.subject.rfc4514_string(),
        names=names,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        has_key=key.exists(),
        trusted=any(map(signed_by, authorities)),
    )


def hosts_of(files: CertFiles, node: str) -> list[str]:
    """The hosts in the node's present certificate, for the one that replaces it; [] if there is none."""
    from cryptography import x509

    if not files.certificate(node).exists():
        return []
    try:
        names = _load(files.certificate(node))[0].extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except x509.ExtensionNotFound:
        return []
    return [
        *names.value.get_values_for_type(x509.DNSName),
        *map(str, names.value.get_values_for_type(x509.IPAddress)),
    ]


def cluster_of(files: CertFiles) -> str | None:
    """The cluster that the certificates here are of, by the nodes' URIs; None if there are none yet."""
    for info in describe(files):
        for name in info.names:
            if name.startswith(SCHEME):
                return name.removeprefix(SCHEME).partition("/")[0]
    return None


def _load(path: Path) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ClusterError(
            f"{path}: cannot be read: {error.strerror}; certificates are made by: oncekeeper certs init"
        ) from error
    except ValueError as error:
        raise ClusterError(f"{path}: holds no certificate in PEM: {error}") from error


# --- checks -------------------------------------------------------------------------------------------------------


def check_private(path: Path) -> None:
    """A key that others may read is a key no more."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise ClusterError(f"{path}: cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"{path}: mode {mode:04o} lets others read it; run: chmod 600 {path}", "certs_dir")


def check_days(days: int) -> None:
    if not 1 <= days <= DAYS_MAX:
        raise ConfigError(f"days={days} must be from 1 to {DAYS_MAX}", "days")


def _check_node(node: str) -> None:
    if not NODE_ID.fullmatch(node):
        raise ConfigError(f"node {node!r} {NODE_ID_RULE}", "nodes")
    if node == "ca":
        raise ConfigError("node 'ca': ca.pem is the authority's file; name the node otherwise", "nodes")


def check_hosts(hosts: Iterable[str]) -> list[str]:
    """Addresses and DNS names; ConfigError for what is neither."""
    found = []
    for host in hosts:
        try:
            found.append(str(ipaddress.ip_address(host)))
        except ValueError:
            if len(host) > 253 or not HOST.fullmatch(host):
                raise ConfigError(f"host {host!r} must be an IP address or a DNS name", "hosts") from None
            found.append(host)
    return found
