"""Mutual TLS 1.3 without I/O, and what a certificate says about who holds it.

A node's certificate carries exactly one name of ours, the URI ``oncekeeper://CLUSTER_ID/NODE_ID`` (RFC 5280,
subjectAltName). Who signed it says that it belongs to the cluster; this name says as whom its holder may speak.
Addresses play no part: links go through proxies, and a machine may hold several nodes.

``Channel`` runs OpenSSL over memory, as asyncio's own TLS does, but leaves the socket to its owner. So a link has
one write buffer with one window, its deadlines cover the TLS handshake too, and each refusal comes with its reason;
asyncio tells a server nothing of handshakes that fail.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

SCHEME: Final = "oncekeeper://"
RECORD_BYTES: Final = 16_384
"""The plain text of one TLS record; what one read can give."""

# Why a connection was refused. A closed set: what counts by it stays small whatever strangers send.
PLAIN_TEXT: Final = "plain_text"
NO_CERTIFICATE: Final = "no_certificate"
UNKNOWN_ISSUER: Final = "unknown_issuer"
EXPIRED: Final = "expired"
NOT_YET_VALID: Final = "not_yet_valid"
BAD_CERTIFICATE: Final = "bad_certificate"
NO_NODE_ID: Final = "no_node_id"
OTHER_CLUSTER: Final = "other_cluster"
WRONG_ID: Final = "wrong_id"
TLS_FAILED: Final = "tls_failed"
REFUSED_BY_PEER: Final = "refused_by_peer"

_HANDSHAKE_RECORD: Final = 22
_ALERT_RECORD: Final = 21
_BY_VERIFY_CODE: Final = {
    2: UNKNOWN_ISSUER,
    9: NOT_YET_VALID,
    10: EXPIRED,
    18: UNKNOWN_ISSUER,  # self-signed
    19: UNKNOWN_ISSUER,
    20: UNKNOWN_ISSUER,
    21: UNKNOWN_ISSUER,
}
_PLAIN_TEXT_REASONS: Final = ("HTTP_REQUEST", "WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG")


class TlsRefused(Exception):
    """The other end is not let in (or does not let us in); ``reason`` is one of the words above."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"{reason}: {text}")
        self.reason = reason


def node_uri(cluster_id: str, node_id: str) -> str:
    return f"{SCHEME}{cluster_id}/{node_id}"


def certified_node(certificate: Mapping[str, Any] | None, cluster_id: str) -> str:
    """As which node of this cluster the holder may speak (``getpeercert()``'s answer). Raises TlsRefused."""
    if not certificate:
        raise TlsRefused(NO_CERTIFICATE, "the peer showed no certificate")
    names: list[str] = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    ours = [name for name in names if name.startswith(SCHEME)]
    if len(ours) != 1:
        # None: not made for a node. Several: it must not be us who chooses.
        raise TlsRefused(NO_NODE_ID, f"the certificate names {len(ours)} nodes; it must name one")
    cluster, slash, node_id = ours[0].removeprefix(SCHEME).partition("/")
    if cluster != cluster_id:
        raise TlsRefused(OTHER_CLUSTER, f"the certificate is of cluster {cluster[:64]!r}")
    if not slash or not node_id or "/" in node_id:
        raise TlsRefused(NO_NODE_ID, f"{ours[0][:200]!r} names no node")
    return node_id


def reason_of(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _BY_VERIFY_CODE.get(getattr(error, "verify_code", 0), BAD_CERTIFICATE)
    reason = error.reason or ""
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return NO_CERTIFICATE
    if "ALERT" in reason:
        return REFUSED_BY_PEER
    return PLAIN_TEXT if reason in _PLAIN_TEXT_REASONS else TLS_FAILED


# --- contexts -----------------------------------------------------------------------------------------------------


def server_context(
    authority: Path, certificate: Path, key: Path, *, clients: ssl.VerifyMode = ssl.CERT_REQUIRED
) -> ssl.SSLContext:
    """For who listens; ``clients``: whether who dials must show a certificate. Raises OSError (ssl.SSLError)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # links last, and a resumed session would skip the look at the certificate
    context.verify_mode = clients
    return _loaded(context, authority, certificate, key)


def client_context(authority: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """For a node that dials another: no host name is asked for, the node's id is (``certified_node``)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    return _loaded(context, authority, certificate, key)


def _loaded(context: ssl.SSLContext, authority: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    # Only this authority: what the machine trusts for the web is nobody here.
    context.load_verify_locations(cafile=authority)
    context.load_cert_chain(certificate, key)
    return context


def check_each(
    context: ssl.SSLContext,
    check: Callable[[Mapping[str, Any] | None], object],
    refused: Callable[[str], None] = lambda reason: None,
) -> ssl.SSLContext:
    """Let ``check`` see the certificate before a byte passes, in whatever library uses the context.

    What it raises (TlsRefused) ends the handshake; each one that fails is told to ``refused`` by its reason.
    """

    class Checked(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
                check(self.getpeercert())
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                refused(reason_of(error))
                raise
            except TlsRefused as error:
                refused(error.reason)
                raise ssl.SSLCertVerificationError(1, str(error)) from error

    context.sslobject_class = Checked
    return context


# --- one connection -----------------------------------------------------------------------------------------------


class Channel:
    """One end of one connection. Bytes of the socket in, plain text out, and the other way round."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server_side)
        self._heard = False
        self.established = False

    def start(self) -> None:
        """The dialler's first word; it lies in ``outgoing``."""
        self._shake()

    def outgoing(self) -> bytes:
        """What must go to the socket now; after a refusal, the alert that says so."""
        return self._out.read() if self._out.pending else b""

    def certificate(self) -> Mapping[str, Any] | None:
        return self._tls.getpeercert()

    def feed(self, data: bytes) -> list[bytes]:
        """The plain text in it, all of it. Raises TlsRefused; then the connection is done with."""
        if not self._heard:
            self._heard = True
            if data[0] not in (_HANDSHAKE_RECORD, _ALERT_RECORD):
                raise TlsRefused(PLAIN_TEXT, "the peer does not speak TLS")
        self._in.write(data)
        if not self.established:
            self._shake()
        return self._read() if self.established else []

    def seal(self, data: bytes) -> bytes:
        """The records that carry ``data``, behind whatever else waits to go out."""
        view, at = memoryview(data), 0
        while at < len(view):
            at += self._tls.write(view[at:])  # to memory, whose room has no end: it never has to wait
        return self._out.read()

    def _shake(self) -> None:
        try:
            self._tls.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except ssl.SSLError as error:
            raise TlsRefused(reason_of(error), str(error)) from error
        self.established = True

    def _read(self) -> list[bytes]:
        found: list[bytes] = []
        try:
            while part := self._tls.read(RECORD_BYTES):
                found.append(part)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return found
        except ssl.SSLZeroReturnError as error:
            raise TlsRefused(REFUSED_BY_PEER, "the peer closed the session") from error
        except ssl.SSLError as error:
            raise TlsRefused(reason_of(error), str(error)) from error
        raise TlsRefused(REFUSED_BY_PEER, "the peer closed the session")
