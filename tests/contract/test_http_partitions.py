"""A person's word on what the log deleted unread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.http_node import Caller, FakeNode, run


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    made = FakeNode(tmp_path)
    made.peers = {"n2": "127.0.0.1:1", "n3": "127.0.0.1:2"}
    return made


def test_the_owner_of_the_partition_goes_on_once(node: FakeNode) -> None:
    node.stuck = {3}

    async def test(call: Caller) -> None:
        answer = await call.post("/v1/partitions/skip", {"partition": 3, "by": "ann"})
        assert (answer.status, answer.body["outcome"]) == (200, "goes on")
        assert (await call.post("/v1/partitions/skip?local=1", {"partition": 3})).status == 409

    run(node, test)


def test_a_partition_that_does_not_wait_is_refused(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        answer = await call.post("/v1/partitions/skip?local=1", {"partition": 4})
        assert (answer.status, answer.body["field"]) == (409, "partition")
        assert "4 does not wait" in answer.body["error"]

    run(node, test)


def test_a_peer_that_has_it_answers_for_it(node: FakeNode) -> None:
    asked: list[tuple[str, str]] = []

    def goes_on(method: str, path: str) -> Any:
        asked.append((method, path))
        return {"partition": 5, "outcome": "goes on"}

    name = min(node.peers)
    node.answers = {name: goes_on}

    async def test(call: Caller) -> None:
        answer = await call.post("/v1/partitions/skip", {"partition": 5})
        assert (answer.status, answer.body["owner"]) == (200, name)

    run(node, test)
    assert asked == [("POST", "/v1/partitions/skip?local=1")]


def test_silence_is_not_taken_for_a_no(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        answer = await call.post("/v1/partitions/skip", {"partition": 5})
        assert answer.status == 503
        assert min(node.peers) in answer.body["error"]

    run(node, test)


@pytest.mark.parametrize("body", [{}, {"partition": "x"}, {"partition": 1, "by": 3}])
def test_what_is_no_partition_names_the_field(node: FakeNode, body: dict[str, Any]) -> None:
    async def test(call: Caller) -> None:
        answer = await call.post("/v1/partitions/skip", body)
        assert answer.status == 400
        assert answer.body["field"] in ("partition", "by")

    run(node, test)
