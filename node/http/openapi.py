"""The OpenAPI 3.1 document, made from the table of routes, so that the two cannot disagree."""

from __future__ import annotations

import re
from typing import Any

from node.http.routes import ROUTES, Route

_REASONS = {
    400: "Bad input: `error` names the field and the rule, `field` the field.",
    401: "The token is missing or wrong.",
    404: "There is no such thing.",
    409: "It is not in a state that allows this; `state` or `outcome` says which.",
    413: "Too much for one call.",
    503: "Surely not done (no quorum, or the node is stopping): try again, here or at another node.",
    504: "It may or may not have been done (`unknown: true`): asking again is safe.",
}
_ABOUT = """\
Every node serves the whole cluster: ask any one. Views that need all nodes are made of those that answered
within 1.5 s and name the others in `unreachable`. Times are ISO 8601 in UTC; `_ms` means milliseconds.

Send `Authorization: Bearer TOKEN`. The token comes from the file `secret` of the cluster's directory: 32 bytes of
BLAKE2b over it with the personalisation `oncekeeper-http`, in hexadecimal. Ids are text: decimal digits, or `k`
and 32 hexadecimal digits.

A task is waiting, delayed (its time has not come), running, suspect (its holder was lost, and it may have run),
executed, dead (given up) or cancelled.
"""


def document(version: str) -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Oncekeeper node", "version": version, "description": _ABOUT},
        "paths": paths,
        "security": [{"token": []}],
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "properties": {
                        "error": {"type": "string"},
                        "field": {"type": ["string", "null"]},
                        "unknown": {"type": "boolean"},
                        "outcome": {"type": "string"},
                        "state": {"type": "string"},
                    },
                    "required": ["error", "field"],
                }
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    named = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    asked = [
        {"name": one.name, "in": "query", "required": False, "schema": one.schema, "description": one.about}
        for one in route.params
    ]
    operation: dict[str, Any] = {
        "operationId": route.handler,
        "summary": route.summary,
        "description": route.about,
        "parameters": named + asked,
        "responses": {"200": {"description": route.summary, "content": _json(route.answer)}},
    }
    for status in sorted({*route.errors, *(() if route.open else (401,))}):
        operation["responses"][str(status)] = {
            "description": _REASONS[status],
            "content": _json({"$ref": "#/components/schemas/Error"}),
        }
    if route.body is not None:
        operation["requestBody"] = {"content": _json(route.body)}
    if route.open:
        operation["security"] = []
    return operation


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
