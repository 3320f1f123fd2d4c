"""PySyncObj as it comes, driven message by message, to show that a defect is there and a test would see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pysyncobj.syncobj as library
import pytest
from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from tests.support.raft_net import Clock

A, B, C = "a:1", "b:1", "c:1"


class Wire(Transport):  # type: ignore[misc]  # the library has no types
    def __init__(self) -> None:
        super().__init__(None, None, ())
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.on_send: Callable[[dict[str, Any]], None] = lambda message: None

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        self.on_send(message)
        self.sent.append((node.id, message))
        return True

    def take(self) -> list[dict[str, Any]]:
        messages = [message for _, message in self.sent]
        self.sent.clear()
        return messages


class Stock:
    """Node A of a cluster, with links that the test plays."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        cls: type[Any] = SyncObj,
        others: tuple[str, ...] = (B, C),
        **conf: Any,
    ) -> None:
        self.clock = Clock()
        monkeypatch.setattr(library, "monotonicTime", self.clock)
        self.wire = Wire()
        self.nodes = {name: Node(name) for name in others}
        settings = SyncObjConf(autoTick=False, **conf)
        self.obj = cls(Node(A), list(self.nodes.values()), settings, transport=self.wire)
        for node in self.nodes.values():
            self.wire._onNodeConnected(node)
        self.obj.doTick()

    def receive(self, source: str, **message: Any) -> None:
        self.wire._onMessageReceived(self.nodes[source], message)

    def lead(self) -> None:
        self.clock.now += 100
        self.obj.doTick()
        for name in self.nodes:
            self.receive(name, type="response_vote", term=self.obj.raftCurrentTerm)
        self.obj.doTick()
        if self.nodes:
            self.acknowledge()
        assert self.obj._isLeader()

    def acknowledge(self, *names: str) -> None:
        """The others have all that there is."""
        for name in names or tuple(self.nodes):
            following = self.last_index + 1
            self.receive(name, type="next_node_idx", reset=False, next_node_idx=following, success=True)
        self.obj.doTick()

    def append(
        self, source: str, term: int, previous: tuple[int, int], entries: list[Any], commit: int
    ) -> None:
        self.receive(
            source,
            type="append_entries",
            term=term,
            commit_index=commit,
            entries=entries,
            prevLogIdx=previous[0],
            prevLogTerm=previous[1],
        )

    @property
    def last_index(self) -> int:
        return int(self.obj._SyncObj__raftLog[-1][1])
