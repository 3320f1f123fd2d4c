"""Asking the other nodes.

A merged view is never refused because a node is down: it is made of what answered, and says who did not.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import msgspec

from node.facade import NodeFacade, PeerAnswer, PeerUnreachable
from oncekeeper.envelope import UNDECODABLE

ANSWER_BYTES_MAX = 64 * 1024 * 1024
FAN_OUT_MS = 1500


class PeerClient:
    """An implementation of ``NodeFacade.ask_peer``: one pooled HTTP session to all peers."""

    def __init__(
        self, addresses: Mapping[str, str], token: str, tls: Mapping[str, ssl.SSLContext] | None = None
    ) -> None:
        """``addresses`` is read at each call, so it may change. ``tls``: for each node, what it must prove."""
        self._tls = tls
        self._addresses = addresses
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    async def ask(
        self, node: str, method: str, path: str, body: Any = None, *, timeout_ms: int = FAN_OUT_MS
    ) -> PeerAnswer:
        """Raises PeerUnreachable."""
        address = self._addresses.get(node)
        if address is None or (self._tls is not None and node not in self._tls):
            raise PeerUnreachable(f"node {node} is not in this cluster's configuration")
        if self._session is None:
            # trust_env stays off: a proxy of the environment must never see the token.
            self._session = aiohttp.ClientSession(headers={"Authorization": f"Bearer {self._token}"})
        data = None if body is None else msgspec.json.encode(body)
        try:
            async with self._session.request(
                method,
                f"{'http' if self._tls is None else 'https'}://{address}{path}",
                ssl=True if self._tls is None else self._tls[node],
                data=data,
                headers={"Content-Type": "application/json"} if data is not None else None,
                timeout=aiohttp.ClientTimeout(total=timeout_ms / 1000),
                allow_redirects=False,
            ) as response:
                raw = await _read_bounded(response)
                return PeerAnswer(response.status, msgspec.json.decode(raw))
        except (aiohttp.ClientError, TimeoutError, OSError, *UNDECODABLE) as error:
            why = str(error) or f"no answer within {timeout_ms} ms"
            raise PeerUnreachable(f"node {node} at {address}: {why}") from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_chunked(1 << 16):
        size += len(part)
        if size > ANSWER_BYTES_MAX:
            raise aiohttp.ClientPayloadError(f"the answer has more than {ANSWER_BYTES_MAX} bytes")
        parts.append(part)
    return b"".join(parts)


async def ask_all(
    node: NodeFacade, path: str | Callable[[str], str], timeout_ms: int = FAN_OUT_MS
) -> tuple[dict[str, Any], dict[str, str]]:
    """GET ``path`` (or the path for each name) of every peer at once.

    Returns the good answers' bodies, and why the others gave none.
    """
    names = sorted(node.peers)
    paths = [path if isinstance(path, str) else path(name) for name in names]
    answers = await asyncio.gather(
        *(_ask(node, name, each, timeout_ms) for name, each in zip(names, paths, strict=True))
    )
    good: dict[str, Any] = {}
    silent: dict[str, str] = {}
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, str):
            silent[name] = answer
        else:
            good[name] = answer.body
    return good, silent


async def _ask(node: NodeFacade, name: str, path: str, timeout_ms: int) -> PeerAnswer | str:
    try:
        # The outer limit holds whatever the facade's own implementation does with its timeout.
        async with asyncio.timeout(timeout_ms / 1000 + 0.5):
            answer = await node.ask_peer(name, "GET", path, timeout_ms=timeout_ms)
    except (PeerUnreachable, TimeoutError) as error:
        return str(error) or "no answer in time"
    return answer if answer.status == 200 else f"node {name} answered with status {answer.status}"
