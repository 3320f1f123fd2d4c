"""How the command line asks nodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from node.cli import connection
from node.cli.connection import Api
from node.cli.output import CliError
from node.config import Address


class Node(ThreadingHTTPServer):
    """Answers when it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, Node)
        self.server.may_answer.wait(30)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def node() -> Iterator[Node]:
    with Node() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.may_answer.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def api(node: Node, monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setattr(connection, "TIMEOUT_S", 0.2)
    return Api([Address("127.0.0.1", node.server_address[1])], "token", "a cluster")


def test_a_node_that_does_not_answer_is_given_up(api: Api) -> None:
    with pytest.raises(CliError, match="no node of a cluster can serve this"):
        api.post("/v1/x")


def test_an_answer_that_may_be_long_in_coming_is_waited_for_on_a_new_and_on_a_used_connection(
    node: Node, api: Api
) -> None:
    for _ in range(2):
        timer = threading.Timer(0.6, node.may_answer.set)
        timer.start()
        assert api.post("/v1/x", more_s=60) == {}
        timer.join()
        node.may_answer.clear()
    with pytest.raises(CliError):
        api.post("/v1/x")
