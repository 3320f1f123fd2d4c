"""What the HTTP layer is told by the running node when a part of it cannot answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from node.facade import Unavailable
from node.running import RunningNode
from node.workers.events import WorkerStartError


def test_a_body_that_no_worker_can_look_at_is_a_node_that_is_not_available() -> None:
    async def validate(handler: str, bodies: object) -> None:
        raise WorkerStartError("no worker could validate: the node's lease ran out")

    config = SimpleNamespace(peers={}, node_id="n1")
    service = SimpleNamespace(config=config, pools=SimpleNamespace(validate=validate))
    node = RunningNode(cast(Any, service))
    with pytest.raises(Unavailable, match="lease ran out"):
        asyncio.run(node.validate("shop.charge", [b"{}"]))
