"""One node asks another over HTTP, as node/http/peers.py does: over the links of the two, with a time limit."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from node.facade import PeerAnswer, PeerUnreachable
from node.http import delays

if TYPE_CHECKING:
    from chaos.simulation.process import Process


async def ask(
    process: Process, name: str, method: str, path: str, body: Any = None, *, timeout_ms: int
) -> PeerAnswer:
    """Raises PeerUnreachable. A request or an answer on a link that is cut is lost."""
    world, scheduler = process.world, process.world.scheduler
    there, back = world.network.path(process.name, name), world.network.path(name, process.name)
    answer: asyncio.Future[PeerAnswer] = process.loop.create_future()

    def arrive() -> None:
        peer = world.processes.get(name)
        if not there.cut and peer is not None and peer.alive:
            # What waits for a process that is held is heard when it goes on.
            scheduler.after(0, peer.loop, peer.loop.enter, serve, peer)

    def serve(peer: Process) -> None:
        peer.loop.create_task(respond(peer))

    async def respond(peer: Process) -> None:
        if peer.service is not None:
            told = await _route(peer, path, body)
            scheduler.after(back.latency_s, world.driver, depart, told)

    def depart(told: PeerAnswer) -> None:
        if not back.cut and process.alive:
            scheduler.after(0, process.loop, process.loop.enter, hear, told)

    def hear(told: PeerAnswer) -> None:
        if not answer.done():
            answer.set_result(told)

    scheduler.after(there.latency_s, world.driver, arrive)
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            return await answer
    except TimeoutError as error:
        raise PeerUnreachable(f"node {name}: no answer within {timeout_ms} ms") from error


async def _route(peer: Process, path: str, body: Any) -> PeerAnswer:
    """node/http/routes.py, of what nodes ask each other while they work."""
    assert path == "/v1/delays/changed", path
    assert peer.service is not None
    clear = await peer.service.face.delays_changed(frozenset(body["partitions"]), delays.ASK_PEER_MS - 300)
    return PeerAnswer(200, {"clear": clear})
