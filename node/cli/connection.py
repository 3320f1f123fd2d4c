"""How the command line reaches a cluster: any live node's HTTP API, tried in turn.

``http.client`` and not a client library: it costs 20 ms less at each start, and what is spoken is one
request at a time over loopback.
"""

from __future__ import annotations

import http.client
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from node.cli.output import BAD_USAGE, FAILED, UNREACHABLE, CliError
from node.config import Address, ConfigError

DEFAULT_DIRECTORY = "oncekeeper-data"
# A node that is stopped in its tracks (SIGSTOP) still accepts connections: only a timeout tells it.
TIMEOUT_S = 10.0


def directory_of(cluster: str | None) -> Path:
    """The data directory that is meant; CliError if node addresses were given."""
    named = cluster or os.environ.get("ONCEKEEPER_CLUSTER") or DEFAULT_DIRECTORY
    if named.startswith(("http://", "https://")):
        raise CliError(f"cluster={named} names addresses; this command needs a data directory", BAD_USAGE)
    return Path(named).expanduser().absolute()


class Api:
    """Requests to whichever node answers. Not safe for threads."""

    def __init__(
        self, targets: list[Address], token: str, name: str, tls: ssl.SSLContext | None = None
    ) -> None:
        """``tls``: they speak HTTPS, and must satisfy it."""
        self._tls = tls
        self._targets = targets
        self._token = token
        self._name = name
        self._open: dict[Address, http.client.HTTPConnection] = {}

    def get(self, path: str, **query: object) -> Any:
        asked = {key: value for key, value in query.items() if value is not None}
        return self.ask("GET", f"{path}?{urlencode(asked)}" if asked else path)

    def post(self, path: str, body: object = None, more_s: float = 0.0) -> Any:
        """``more_s``: how much longer than usual a node may take for the answer."""
        return self.ask("POST", path, msgspec.json.encode(body if body is not None else {}), more_s=more_s)

    def put(self, path: str, body: object) -> Any:
        return self.ask("PUT", path, msgspec.json.encode(body))

    def post_lines(self, path: str, lines: list[bytes]) -> Any:
        return self.ask("POST", path, b"\n".join(lines) + b"\n", "application/x-ndjson")

    def ask(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/json", more_s: float = 0.0
    ) -> Any:
        """The first node's answer that is one. Whatever is sent here may be sent twice (ids are fixed before)."""
        said = ""
        for target in list(self._targets):
            try:
                status, answer = self._ask_node(target, method, path, body, kind, more_s)
            except (OSError, http.client.HTTPException) as error:
                self._forget(target)
                said = said or f"{target}: {error or type(error).__name__}{self._hint(error)}"
                continue
            if status in (503, 504):
                # It has no quorum, is on its way out, or does not know whether it was done: ask another.
                self._prefer_others(target)
                said = f"{target}: {_error_text(answer)}"
                continue
            if status >= 400:
                raise _refused(status, answer)
            return answer
        raise CliError(f"no node of {self._name} can serve this ({said})", UNREACHABLE)

    def keep_only(self, targets: list[Address]) -> None:
        self._targets = targets

    def ask_each(self, path: str) -> Iterator[tuple[Address, Any]]:
        """Every node's own answer, None from those that give none."""
        for target in list(self._targets):
            try:
                status, answer = self._ask_node(target, "GET", path, b"", "application/json")
            except (OSError, http.client.HTTPException):
                self._forget(target)
                yield target, None
                continue
            yield target, answer if status == 200 else None

    def _ask_node(
        self, target: Address, method: str, path: str, body: bytes, kind: str, more_s: float = 0.0
    ) -> tuple[int, dict[str, Any]]:
        used_before = target in self._open
        try:
            return self._exchange(target, method, path, body, kind, more_s)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self._forget(target)
            if not used_before:
                raise
            # The node closed a connection that was idle: that says nothing of the node.
            return self._exchange(target, method, path, body, kind, more_s)

    def _exchange(
        self, target: Address, method: str, path: str, body: bytes, kind: str, more_s: float
    ) -> tuple[int, dict[str, Any]]:
        connection = self._open.get(target)
        if connection is None:
            if self._tls is None:
                connection = http.client.HTTPConnection(target.host, target.port, timeout=TIMEOUT_S)
            else:
                connection = http.client.HTTPSConnection(
                    target.host, target.port, timeout=TIMEOUT_S, context=self._tls
                )
            self._open[target] = connection
        headers = {"Authorization": f"Bearer {self._token}"}
        if method in ("POST", "PUT"):
            headers["Content-Type"] = kind
        if connection.sock is None:
            connection.connect()
        connection.sock.settimeout(TIMEOUT_S + more_s)
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        content = response.read()
        try:
            answer = msgspec.json.decode(content)
        except msgspec.DecodeError as error:
            raise http.client.HTTPException(f"{target} answered {response.status}, and no JSON") from error
        if not isinstance(answer, dict):
            raise http.client.HTTPException(f"{target} answered no JSON object")
        return response.status, answer

    def _hint(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            return "; its certificate must come from the cluster's ca.pem (ONCEKEEPER_CA)"
        if isinstance(error, ssl.SSLError):
            return "; does it speak http:// and not https://?"
        if self._tls is None and isinstance(error, http.client.RemoteDisconnected | ConnectionResetError):
            return "; does it speak https://? Then name it so, and its ca.pem in ONCEKEEPER_CA"
        return ""

    def _forget(self, target: Address) -> None:
        connection = self._open.pop(target, None)
        if connection is not None:
            connection.close()
        self._prefer_others(target)

    def _prefer_others(self, target: Address) -> None:
        self._targets.remove(target)
        self._targets.append(target)


def _error_text(answer: dict[str, Any]) -> str:
    return str(answer.get("error") or answer)


def _refused(status: int, answer: dict[str, Any]) -> CliError:
    text = _error_text(answer)
    field = answer.get("field")
    if status == 401:
        text = f"{text}: the token is not this cluster's (ONCEKEEPER_TOKEN, or the directory's secret)"
    if field and str(field) not in text:
        text = f"{field}: {text}"
    return CliError(text, FAILED, field=field, status=status)


def connect(cluster: str | None) -> Api:
    """Find the cluster by name, environment or default, and its token. Nothing is sent yet."""
    named = cluster or os.environ.get("ONCEKEEPER_CLUSTER") or DEFAULT_DIRECTORY
    if named.startswith(("http://", "https://")):
        addresses = [each.strip() for each in named.split(",")]
        secure = {each.startswith("https://") for each in addresses}
        if len(secure) > 1:
            raise CliError(f"cluster={named}: addresses must be all http:// or all https://", BAD_USAGE)
        targets = [_address(each) for each in addresses]
        token = os.environ.get("ONCEKEEPER_TOKEN", "")
        return Api(
            targets, token, named, _tls(os.environ.get("ONCEKEEPER_CA", "")) if True in secure else None
        )
    return connect_directory(Path(named).expanduser().absolute())


def connect_directory(directory: Path) -> Api:
    from node.cluster import exists, http_token, open_cluster, read_secret

    if not exists(directory):
        raise CliError(
            f"{directory}: holds no cluster (no cluster.json); name one by --cluster or ONCEKEEPER_CLUSTER, "
            "or make one with: oncekeeper cluster up",
            UNREACHABLE,
        )
    opened = open_cluster(directory)
    targets = [peer.http for peer in opened.peers.values()]
    tls = _tls(str(opened.certs_dir / "ca.pem")) if opened.http_tls else None
    return Api(targets, http_token(read_secret(directory)), str(directory), tls)


def _tls(ca: str) -> ssl.SSLContext:
    # Not oncekeeper's own of the same kind: importing that package takes longer than the request.
    try:
        context = ssl.create_default_context() if not ca else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if ca:
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_verify_locations(cafile=ca)
    except OSError as error:
        raise CliError(
            f"{ca}: cannot be used ({error}); it must be the cluster's ca.pem (ONCEKEEPER_CA, or in its directory)",
            BAD_USAGE,
        ) from error
    return context


def _address(url: str) -> Address:
    scheme, _, rest = url.strip().partition("://")
    if scheme not in ("http", "https"):
        raise CliError(
            f"cluster={url}: addresses must be http://HOST:PORT or https://HOST:PORT, with commas between them",
            BAD_USAGE,
        )
    try:
        return Address.parse(rest.rstrip("/"), "cluster")
    except ConfigError as error:
        raise CliError(str(error), BAD_USAGE) from error


def quoted(part: str) -> str:
    return quote(part, safe="")
