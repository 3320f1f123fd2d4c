"""A node's HTTP API, faked: canned answers by path, and a record of what was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any] | Callable[["Asked"], tuple[int, Any]]


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    body: bytes
    token: str


@dataclass
class FakeNode:
    answers: dict[str, Answer] = field(default_factory=dict)  # "GET /v1/status" -> (status, document)
    asked: list[Asked] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, asked: Asked) -> tuple[int, Any]:
        self.asked.append(asked)
        found = self.answers.get(
            f"{asked.method} {asked.path.partition('?')[0]}", (404, {"error": "no such path"})
        )
        return found(asked) if callable(found) else found


@contextmanager
def serving(answers: dict[str, Answer]) -> Iterator[FakeNode]:
    node = FakeNode(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = Asked(self.command, self.path, body, self.headers.get("Authorization", ""))
            status, document = node.answer(asked)
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = _serve

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    node.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield node
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
