"""Asking peers over real sockets: whatever is wrong at the other end is one kind of error."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from node.facade import PeerUnreachable
from node.http.peers import PeerClient

TOKEN = "t" * 64
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def ask(port: int, timeout_ms: int = 300) -> None:
    client = PeerClient({"n2": f"127.0.0.1:{port}"}, TOKEN)
    try:
        await client.ask("n2", "GET", "/v1/node", timeout_ms=timeout_ms)
    finally:
        await client.close()


def answering(raw: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        writer.close()

    return talk


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("talk", [
    answering(b""), answering(b"\x00\x01garbage\r\n\r\n"), answering(OK + b"Content-Length: 9\r\n\r\nnot json!"),
    answering(OK + b"Content-Length: 100\r\n\r\n{}"), silent,
])  # fmt: skip
def test_a_peer_that_gives_no_answer_of_ours_is_unreachable(talk: Talk) -> None:
    async def test() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        async with server:
            with pytest.raises(PeerUnreachable, match=r"node n2 at 127\.0\.0\.1"):
                await ask(server.sockets[0].getsockname()[1])

    asyncio.run(test())


def test_a_peer_that_does_not_listen_is_unreachable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port meanwhile
        with pytest.raises(PeerUnreachable, match=r"node n2 at 127\.0\.0\.1"):
            asyncio.run(ask(unused.getsockname()[1]))


def test_a_redirect_is_not_followed_with_the_token() -> None:
    seen: list[bytes] = []

    async def thief(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.close()

    async def test() -> None:
        other = await asyncio.start_server(thief, "127.0.0.1", 0)
        place = f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}/"
        redirect = f"HTTP/1.1 302 Found\r\nLocation: {place}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
        server = await asyncio.start_server(answering(redirect), "127.0.0.1", 0)
        async with other, server:
            await ask(server.sockets[0].getsockname()[1])

    asyncio.run(test())
    assert seen == []


def test_a_node_that_is_not_configured_is_unreachable() -> None:
    async def test() -> None:
        with pytest.raises(PeerUnreachable, match="n9 is not in this cluster"):
            await PeerClient({}, TOKEN).ask("n9", "GET", "/v1/node")

    asyncio.run(test())
