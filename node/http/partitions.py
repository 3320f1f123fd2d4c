"""POST /v1/partitions/skip: a person accepts that what the log deleted unread is lost.

Only the partition's owner can go on, and only it knows that the partition waits: so whoever is asked asks all.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec
from aiohttp import web

from node.facade import NodeFacade, PeerUnreachable
from node.http.wire import ApiError, parse, query_flag, reply, text

PEER_MS = 5_000

_log = logging.getLogger("oncekeeper.node")


class Skip(msgspec.Struct, frozen=True):
    partition: int
    by: str = ""


async def post_skip(node: NodeFacade, request: web.Request) -> web.Response:
    wanted = await parse(request, Skip)
    by = text(wanted.by, "by") or "somebody over HTTP"
    if node.skip(wanted.partition):
        _log.warning("partition %d may pass what was deleted: so says %s", wanted.partition, by)
        return _accepted(node.identity.node, wanted.partition)
    if not query_flag(request, "local"):
        silent = {}
        body = {"partition": wanted.partition, "by": by}
        names = sorted(node.peers)
        answers = await asyncio.gather(
            *(
                node.ask_peer(name, "POST", "/v1/partitions/skip?local=1", body, timeout_ms=PEER_MS)
                for name in names
            ),
            return_exceptions=True,
        )
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, PeerUnreachable):
                silent[name] = str(answer)
            elif isinstance(answer, BaseException):
                raise answer
            elif answer.status == 200:
                return _accepted(name, wanted.partition)
        if silent:
            raise ApiError(
                503,
                f"partition {wanted.partition}: nobody who answered has it, and {', '.join(silent)} did not",
                None,
            )
    raise ApiError(
        409,
        f"partition: {wanted.partition} does not wait for anybody's word; nothing was changed",
        "partition",
    )


def _accepted(owner: str, partition: int) -> web.Response:
    return reply({"partition": partition, "owner": owner, "outcome": "goes on"})
