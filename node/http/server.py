"""The HTTP server of a node: aiohttp on the node's own loop.

Who may speak: whoever has the token, compared in constant time. The Host header must name this node, so that
a web page whose name was rebound to a loopback address cannot speak to it through somebody's browser; and no
answer carries a CORS header. The size of a request is bounded before it is read. With TLS the server shows this
node's certificate; who shows one in turn must be a node of the cluster, and clients need none.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections import Counter
from collections.abc import Awaitable, Callable

from aiohttp import web

from node.config import Address
from node.facade import NodeFacade, OutcomeUnknown, Unavailable
from node.http import routes
from node.http.openapi import document
from node.http.routes import ROUTES, Handler, Route
from node.http.wire import BODY_BYTES_MAX, REFUSED, ApiError, reply
from node.tls import NodeTls
from oncekeeper.errors import LogUnusable

_log = logging.getLogger("oncekeeper.http")

STOP_S = 2.0  # how long a stopping server lets answers finish


class HttpServer:
    def __init__(
        self,
        node: NodeFacade,
        address: Address,
        token: str,
        also_hosts: frozenset[str] = frozenset(),
        tls: NodeTls | None = None,
    ) -> None:
        """``also_hosts``: other names under which clients reach this node (a proxy, a container's name)."""
        self._tls = tls
        self._node = node
        self._token = token.encode()
        self._address = address
        self._hosts = also_hosts | {address.host, "localhost"}
        self._runner: web.AppRunner | None = None

    async def start(self) -> int:
        """The port that it listens on (port 0 of the address: any free one). OSError where it is taken."""
        runner = web.AppRunner(self._app(), access_log=None, shutdown_timeout=STOP_S)
        await runner.setup()
        context = self._tls.http_server if self._tls else None
        site = web.TCPSite(runner, self._address.host, self._address.port, ssl_context=context)
        try:
            await site.start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        address = runner.addresses[0]
        return int(address[1])

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[self._guard])
        app[REFUSED] = self._tls.http_refused if self._tls else Counter()
        whole = document(self._node.identity.version)

        async def openapi(node: NodeFacade, request: web.Request) -> web.Response:
            return reply(whole)

        table: dict[str, Handler] = {**routes.handlers(self._node), "openapi": openapi}
        for route in ROUTES:
            app.router.add_route(route.method, route.path, self._serve(route, table[route.handler]))
        return app

    def _serve(self, route: Route, handler: Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
        known = {param.name for param in route.params}

        async def serve(request: web.Request) -> web.Response:
            for name in request.query:
                if name not in known:
                    allowed = ", ".join(sorted(known)) or "none"
                    raise ApiError(
                        400, f"{name[:40]}: unknown parameter; this path takes: {allowed}", name[:40]
                    )
            return await handler(self._node, request)

        return serve

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            self._check_host(request)
            if request.path != "/v1/health":
                self._check_token(request)
            return await handler(request)
        except ApiError as error:
            return error.response()
        except (Unavailable, LogUnusable) as error:
            return ApiError(503, str(error), None, unknown=False).response()
        except OutcomeUnknown as error:
            return ApiError(504, str(error), None, unknown=True).response()
        except web.HTTPRequestEntityTooLarge:
            limit = f"the request has more than {BODY_BYTES_MAX} bytes"
            return ApiError(413, f"body: {limit}", "body").response()
        except web.HTTPException as error:
            # 404 and 405 of the router, 400 of the parser.
            return ApiError(error.status, f"{request.method} {request.path[:200]}: {error.reason}").response()
        except Exception:  # noqa: BLE001 - a fault of ours costs this one answer, not the node; the log tells of it
            _log.exception("%s %s failed", request.method, request.path)
            return ApiError(
                500, "this is a fault of the node; its log tells more", None, unknown=True
            ).response()

    def _check_host(self, request: web.Request) -> None:
        host = request.headers.get("Host", "")
        name = (
            host[: host.index("]") + 1].strip("[]")
            if host.startswith("[") and "]" in host
            else host.split(":")[0]
        )
        if name in self._hosts or _is_loopback(name):
            return
        raise ApiError(400, f"Host: {name[:80]!r} is not a name of this node", "Host")

    def _check_token(self, request: web.Request) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # Bytes, because compare_digest refuses text beyond ASCII with an error of its own.
        right = hmac.compare_digest(given.strip().encode(errors="replace"), self._token)
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401, "Authorization: must be 'Bearer TOKEN' with this cluster's token", "Authorization"
            )


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
