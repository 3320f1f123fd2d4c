"""A cluster as a client sees it: a data directory with an embedded log, and nodes that answer from a script."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from oncekeeper.cluster import http_token
from oncekeeper.log.embedded import open_log

SECRET = bytes(range(32))
TOKEN = http_token(SECRET)
CLUSTER_ID = "c" * 32

Answer = tuple[int, object]
Route = Callable[["ScriptedNode", str, bytes, Mapping[str, str]], Answer | None]


class ScriptedNode:
    """A node whose answers are given by ``route``; None closes the connection without one."""

    def __init__(self, route: Route) -> None:
        self.calls: list[tuple[str, str]] = []
        self.tasks: list[dict[str, Any]] = []
        self.next_id = 1
        node = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                node.calls.append((self.command, url.path))
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                if self.headers.get("authorization") != f"Bearer {TOKEN}":
                    answer: Answer | None = (401, {"error": "a token is wanted", "field": None})
                else:
                    answer = route(node, f"{self.command} {url.path}", body, query)
                if answer is None:
                    self.close_connection = True
                    return
                content = answer[1] if isinstance(answer[1], bytes) else json.dumps(answer[1]).encode()
                self.send_response(answer[0])
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer

            def log_message(self, *_: object) -> None:
                """Nothing on the test's output."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.address}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def working(node: ScriptedNode, call: str, body: bytes, query: Mapping[str, str]) -> Answer | None:
    """What a healthy node answers to the calls of a submitter."""
    if call == "POST /v1/ids":
        count = json.loads(body)["count"]
        start, node.next_id = node.next_id, node.next_id + count
        return 200, {"start": start, "count": count}
    if call == "POST /v1/tasks":
        tasks = [json.loads(line) for line in body.splitlines()]
        node.tasks += tasks
        return 200, {"ids": [task["id"] for task in tasks], "duplicates": 0}
    if call == "GET /v1/handlers":
        return 200, {"app": "shop:app", "handlers": [{"name": "shop.charge", "queue": "mail"}]}
    return 404, {"error": f"no route {call}", "field": None}


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def data_directory(path: Path, addresses: list[str], wake_ports: list[int] | None = None) -> Path:
    """A data directory as ``cluster up`` makes it, as far as a client looks."""
    path.mkdir(parents=True, exist_ok=True)
    ports = wake_ports or [0] * len(addresses)
    nodes = {
        f"n{number}": {"raft": "127.0.0.1:1", "http": address, "wake": port}
        for number, (address, port) in enumerate(zip(addresses, ports, strict=True), 1)
    }
    (path / "cluster.json").write_text(
        json.dumps(
            {"format": 1, "cluster_id": CLUSTER_ID, "log": "embedded", "partitions": 4, "nodes": nodes}
        )
    )
    (path / "secret").write_text(SECRET.hex() + "\n")
    open_log(path, create=True, partitions=4, cluster_id=CLUSTER_ID).close()
    return path
