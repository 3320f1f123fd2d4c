"""What every route shares: errors as JSON, checked parameters, checked bodies, and JSON out.

An error is ``{"error": text, "field": name or null}``, and more where a program needs it: ``outcome`` and
``state`` (409), ``unknown`` (503 and 504: whether the thing may have been done after all).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from dedup.ids import TaskId, id_text, parse_id
from oncekeeper.envelope import UNDECODABLE, explain, time_text

S = TypeVar("S", bound=msgspec.Struct)

JSON = "application/json"
REFUSED: web.AppKey[Counter[str]] = web.AppKey("refused")
"""TLS connections to the HTTP API that were refused, by reason."""
BODY_BYTES_MAX = 64 * 1024 * 1024  # of a request: a bulk submission
TEXT_CHARS_MAX = 200  # of "by", and of a name in a query
REASON_CHARS_MAX = 1000


class ApiError(Exception):
    def __init__(self, status: int, error: str, field: str | None = None, **more: Any) -> None:
        super().__init__(error)
        self.status = status
        self.body = {"error": error, "field": field, **more}

    def response(self) -> web.Response:
        response = reply(self.body, self.status)
        if self.status == 401:
            response.headers["WWW-Authenticate"] = 'Bearer realm="oncekeeper"'
        return response


def reply(body: Any, status: int = 200) -> web.Response:
    response = web.Response(body=msgspec.json.encode(body), status=status, content_type=JSON)
    # Answers hold task bodies; no cache of a browser or a proxy may keep them.
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


async def read_body(request: web.Request) -> bytes:
    """All of it. 413 from aiohttp becomes JSON in server.py."""
    return await request.read()


async def parse(request: web.Request, kind: type[S]) -> S:
    """The request's JSON object as ``kind``; an empty body is an empty object."""
    raw = await read_body(request) or b"{}"
    try:
        return msgspec.json.decode(raw, type=kind)
    except UNDECODABLE as error:
        field, rule = explain(error, "body")
        raise ApiError(400, f"{field}: {rule}", field) from None


def text(value: str, field: str, most: int = TEXT_CHARS_MAX) -> str:
    if len(value) > most or not value.isprintable():
        raise ApiError(400, f"{field}: must have at most {most} printable characters", field)
    return value


def query_int(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    given = request.query.get(name)
    if given is None:
        return default
    try:
        number = int(given) if len(given) <= 20 else high + 1
    except ValueError:
        raise ApiError(400, f"{name}: must be a whole number, not {given[:40]!r}", name) from None
    if not low <= number <= high:
        raise ApiError(400, f"{name}: must be from {low} to {high}, not {given[:40]}", name)
    return number


def query_text(request: web.Request, name: str, most: int = TEXT_CHARS_MAX) -> str:
    return text(request.query.get(name, ""), name, most)


def query_flag(request: web.Request, name: str) -> bool:
    given = request.query.get(name, "0")
    if given not in ("0", "1"):
        raise ApiError(400, f"{name}: must be 0 or 1, not {given[:40]!r}", name)
    return given == "1"


def path_id(request: web.Request) -> TaskId:
    try:
        return parse_id(request.match_info["id"])
    except ValueError as error:
        raise ApiError(400, str(error)[:300], "id") from None


def when(epoch_ms: int) -> str | None:
    return time_text(epoch_ms) if epoch_ms > 0 else None


def id_texts(ids: Any) -> list[str]:
    return [id_text(task_id) for task_id in ids]
