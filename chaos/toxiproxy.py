"""Toxiproxy: a TCP proxy on each link, that can be cut, slowed and sliced while both ends believe in it.

https://github.com/Shopify/toxiproxy, version 2.12. Its server is a program of its own; ``find_server`` looks for it
and never downloads anything (tools/get-toxiproxy does). The little of its HTTP API that is needed here is spoken
directly: each call has a timeout, and each server its own address.

A ``timeout`` toxic of 0 drops all bytes of one direction and leaves the connection open: that is what a cut cable
looks like. Removing it closes the connections that it stood on. ``disabled`` refuses and closes at once.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

VERSION = "v2.12.0"
VARIABLE = "ONCEKEEPER_TOXIPROXY"
PACKAGE = "github.com/Shopify/toxiproxy/v2/cmd/server"
CALL_S = 5.0
START_S = 20.0
UP, DOWN = "upstream", "downstream"
"""From the dialler to the acceptor, and back."""


class NoToxiproxy(Exception):
    """There is no server; the message says how to get one."""


class ToxiproxyFailed(Exception):
    """The server did not start, or refused a call."""


def cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "oncekeeper" / f"toxiproxy-{VERSION}" / "server"


def find_server() -> Path:
    """The environment's, then PATH's, then the cache's (where tools/get-toxiproxy puts it)."""
    named = os.environ.get(VARIABLE)
    if named:
        if os.access(named, os.X_OK) and Path(named).is_file():
            return Path(named)
        raise NoToxiproxy(f"{VARIABLE}={named} is no program that can be run")
    found = shutil.which("toxiproxy-server")
    if found:
        return Path(found)
    cached = cache_path()
    if os.access(cached, os.X_OK):
        return cached
    raise NoToxiproxy(
        "there is no Toxiproxy: no toxiproxy-server on PATH and nothing in "
        f"{cached}. Get it with tools/get-toxiproxy of the source tree, or (with Go) by:\n"
        f"  GOBIN={cached.parent} go install {PACKAGE}@{VERSION}\n"
        f"or name another one in {VARIABLE}"
    )


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


class Toxiproxy:
    """A running server. Dies with this process; ``close`` ends it."""

    def __init__(self, program: Path, log: Path) -> None:
        self._port = free_port()
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [str(program), "-host", "127.0.0.1", "-port", str(self._port)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, "LOG_LEVEL": "warn"},
                start_new_session=True,  # Ctrl-C at the terminal is ours to answer
                preexec_fn=_die_with_us,
            )
        try:
            self._wait_ready(log)
        except BaseException:
            self.close()
            raise

    def _wait_ready(self, log: Path) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.call("GET", "/version")
            except ToxiproxyFailed as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = log.read_text("utf-8", "replace")[-500:]
                    raise ToxiproxyFailed(f"Toxiproxy does not answer: {error}\n{said}") from error
                time.sleep(0.02)
            else:
                return

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(10)

    def call(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=CALL_S)
        try:
            content = None if body is None else msgspec.json.encode(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ToxiproxyFailed(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise ToxiproxyFailed(f"{method} {path}: {answer.status} {text.decode('utf-8', 'replace')}")
        return text if path == "/version" else msgspec.json.decode(text) if text else None

    def proxy(self, name: str, upstream: str) -> Proxy:
        """A new proxy in front of ``upstream`` ("HOST:PORT"), listening on a port of its own."""
        made = self.call("POST", "/proxies", {"name": name, "listen": "127.0.0.1:0", "upstream": upstream})
        return Proxy(self, name, str(made["listen"]), upstream)


@dataclass(frozen=True)
class Proxy:
    server: Toxiproxy
    name: str
    listen: str
    upstream: str

    def add(self, toxic: str, kind: str, stream: str, attributes: Mapping[str, int]) -> None:
        body = {"name": toxic, "type": kind, "stream": stream, "attributes": dict(attributes)}
        self.server.call("POST", f"/proxies/{self.name}/toxics", body)

    def enable(self, enabled: bool) -> None:
        self.server.call("POST", f"/proxies/{self.name}", {"enabled": enabled})

    def heal(self) -> None:
        """As it was made, whatever was done to it; connections are dialled anew."""
        # Made anew, and not rid of its toxics: to take one off a connection the server waits for the bytes that the
        # toxic still holds, and where the connection's other end is gone it waits for ever (seen with 2.12.0).
        self.server.call("DELETE", f"/proxies/{self.name}")
        self.server.call("POST", "/proxies", self._made)

    @property
    def _made(self) -> dict[str, str]:
        return {"name": self.name, "listen": self.listen, "upstream": self.upstream}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
