"""The OpenAPI document: sound in shape, in step with what is served, and true of what is answered."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from node.facade import PeerUnreachable
from node.http.openapi import document
from node.http.routes import ROUTES, handlers
from oncekeeper.log.delayed import Deferral
from raft.commands import Result
from tests.support.http_node import Caller, FakeNode, one, run

DOCUMENT = document("0.1.0")
DUE = (datetime.now(UTC) + timedelta(days=1)).isoformat()
OPERATIONS = [
    (path, method, operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
]


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path)


def schemas(part: Any) -> list[dict[str, Any]]:
    if isinstance(part, dict):
        own = [part["schema"]] if isinstance(part.get("schema"), dict) else []
        return own + [found for value in part.values() for found in schemas(value)]
    if isinstance(part, list):
        return [found for value in part for found in schemas(value)]
    return []


def test_every_route_has_a_handler_and_every_handler_a_route(node: FakeNode) -> None:
    assert {route.handler for route in ROUTES} == {*handlers(node), "openapi"}
    node.records.close()


def test_operations_are_named_once() -> None:
    names = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(names) == len(set(names)) == len(ROUTES)


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_an_operation_has_the_shape_that_openapi_asks_for(
    path: str, method: str, operation: dict[str, Any]
) -> None:
    assert method in ("get", "post", "put", "delete")
    assert operation["summary"]
    named = {one["name"] for one in operation["parameters"] if one["in"] == "path"}
    assert named == set(re.findall(r"{(\w+)}", path))
    assert len({(one["in"], one["name"]) for one in operation["parameters"]}) == len(operation["parameters"])
    assert ("requestBody" in operation) <= (method in ("post", "put"))
    for status, response in operation["responses"].items():
        assert re.fullmatch(r"[2-5]\d\d", status)
        assert response["description"]
        assert list(response["content"]) == ["application/json"]
    for schema in schemas(operation):
        jsonschema.Draft202012Validator.check_schema(schema)


def test_references_lead_somewhere() -> None:
    for reference in set(re.findall(r"'\$ref': '([^']*)'", str(DOCUMENT))):
        place: Any = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
        assert place["type"] == "object"


def test_what_is_answered_fits_what_is_documented(node: FakeNode) -> None:
    """One answer of each route that can be had from a node at rest, checked against its schema."""
    examples: dict[str, tuple[str, Any]] = {
        "ids": ("/v1/ids", {"count": 1}),
        "submit": ("/v1/tasks", {"handler": "shop.charge", "body": {}}),
        "task": ("/v1/tasks/2", None),
        "why": ("/v1/tasks/2/why", None),
        "result": ("/v1/tasks/2/result", None),
        "cancel": ("/v1/tasks/3/cancel", None),
        "retry": ("/v1/tasks/3/retry", {}),
        "reschedule": ("/v1/tasks/5/reschedule", {"due": DUE}),
        "delays_changed": ("/v1/delays/changed", {"partitions": [0]}),
        "rule": ("/v1/suspects/rule", {"ids": ["4"], "verdict": "executed"}),
        "pause": ("/v1/queues/mail/pause", None),
        "resume": ("/v1/queues/mail/resume", None),
        "skip": ("/v1/partitions/skip", {"partition": 3}),
        "schedule": ("/v1/schedules/tick", None),
        "put_schedule": ("/v1/schedules/put", {"schedule": "every 1h", "handler": "shop.charge"}),
        "delete_schedule": ("/v1/schedules/gone", None),
        "pause_schedule": ("/v1/schedules/tick/pause", None),
        "resume_schedule": ("/v1/schedules/tick/resume", None),
        "fire_schedule": ("/v1/schedules/tick/fire", None),
    }

    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", {"tasks": [{"handler": "shop.charge", "body": {}}] * 4})
        await call.post("/v1/tasks", {"handler": "shop.charge", "body": {}, "due": DUE})
        for place in node.log.find(5):
            node.log.delays.defer(
                [Deferral(place.partition, place.offset, place.batch.due_ms, "run", place.batch)]
            )
        node.stuck = {3}

        def of_n2(method: str, path: str) -> Any:
            if path != "/v1/delays/changed":
                raise PeerUnreachable("n2 is busy")
            return {"clear": True}

        node.answers["n2"] = of_n2
        session = node.join()
        node.settle(session, one(2), Result.DONE)
        node.settle(session, one(4), Result.DOUBT)
        for name in ("tick", "gone"):
            await call.ask(
                "PUT", f"/v1/schedules/{name}", json={"schedule": "* * * * *", "handler": "shop.charge"}
            )
        for route in ROUTES:
            path, body = examples.get(route.handler, (route.path, None))
            answer = await call.ask(route.method, path, **({} if body is None else {"json": body}))
            assert answer.status == 200, (route.path, answer.body)
            jsonschema.validate(answer.body, route.answer)

    run(node, test)
