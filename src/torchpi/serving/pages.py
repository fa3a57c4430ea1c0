"""HTTP on the websocket's port: admission of connections, /healthz, /metrics, and the dashboard for browsers.

websockets passes each HTTP request here before the handshake, with limits on its size and duration. An ASGI server with
a web framework is as fast, but has no time limit for half-open handshakes (uvicorn 0.54).
"""

import asyncio
import http
import json
import logging
import math
import re
import time
import urllib.parse
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from torchpi.errors import UnknownKeyError, printable
from torchpi.serving.connection import ServerState, address_of
from torchpi.serving.dashboard import dashboard_page, encode_jpeg
from torchpi.serving.settings import LOCAL_HOSTS

_log = logging.getLogger(__name__)

_REFUSAL_LOG_INTERVAL = 60.0
"""Seconds between two log lines about connections refused for the same reason."""
_DASHBOARD_PATHS = ("/dashboard.json", "/chunk/", "/frame/")
_PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_Refusal = tuple[str, http.HTTPStatus, str]
"""Reason, status and text."""


class Pages:
    """HTTP responses of a server."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._logged_at: dict[str, float] = {}
        """Time of the last log line about refused connections, per reason."""

    async def respond(self, connection: ServerConnection, request: Request) -> Response | None:
        """Response to an HTTP request, or None to continue with the websocket handshake."""
        method = request.method
        if method not in ("GET", "HEAD"):
            text = f"This server does not support the method {method:.20}; use GET."
            response = self._refuse(connection, "method", http.HTTPStatus.METHOD_NOT_ALLOWED, text)
            response.headers["Allow"] = "GET, HEAD"
            return response
        page = await self._page(connection, request)
        if method == "HEAD":
            page = page or connection.respond(http.HTTPStatus.UPGRADE_REQUIRED, "")
            page.body = b""
        return page

    async def _page(self, connection: ServerConnection, request: Request) -> Response | None:
        state, path = self._state, path_of(request)
        if path == "/healthz":
            if state.ready:
                return connection.respond(http.HTTPStatus.OK, "ready\n")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "not ready\n")
        if state.settings.protocol == "vla-eval" and path in ("/health", "/config"):
            return self._harness(connection, request, path)
        from_browser = path == "/" and "Upgrade" not in request.headers
        is_dashboard = from_browser or path.startswith(_DASHBOARD_PATHS)
        refusal = self._refusal(request, path, from_browser=from_browser, is_dashboard=is_dashboard)
        if refusal is not None:
            return self._refuse(connection, *refusal)
        if path == "/metrics":
            response = _with_body(connection, state.metrics.text(), state.metrics.content_type)
            response.headers.update(_PAGE_HEADERS)
            return response
        if is_dashboard:
            return await self._dashboard(connection, path)
        return None

    def _refusal(self, request: Request, path: str, *, from_browser: bool, is_dashboard: bool) -> _Refusal | None:
        settings = self._state.settings
        authorization = request.headers.get_all("Authorization")
        token = _token_in_url(request) if from_browser else None  # a browser cannot be told to send the header
        if token is not None:
            authorization = [f"Bearer {token}"]
        if not settings.admits(authorization[0] if len(authorization) == 1 else None):
            text = "A valid token is needed" + ("; in a browser: /?token=TOKEN" if from_browser else ".")
            return "token", http.HTTPStatus.UNAUTHORIZED, text
        if is_dashboard or path == "/metrics":
            # DNS rebinding: a web page whose host name resolves to this machine could read the robots' cameras.
            if settings.local and settings.token is None and not _names_this_machine(request):
                text = "Without --token, dashboard and metrics are only at http://127.0.0.1 and http://localhost."
                return "host", http.HTTPStatus.FORBIDDEN, text
            if request.headers.get_all("Origin"):  # the dashboard's own script sends none
                return "origin", http.HTTPStatus.FORBIDDEN, "Other web pages may not read this server."
        elif path != "/" and path[1:] not in self._state.names:
            names = ", ".join(f"/{name}" for name in self._state.names)
            return "path", http.HTTPStatus.NOT_FOUND, f"There is no policy at {path}; this server has {names}."
        elif settings.protocol == "vla-eval" and not self._state.ready:
            # A refused client retries for a minute, but a connected one soon gives up waiting for an answer.
            return "not_ready", http.HTTPStatus.SERVICE_UNAVAILABLE, "The policy is being loaded; connect again later."
        elif (count := len(self._state.connections)) >= settings.max_connections:
            text = f"{count} clients are connected, which is the limit (--max-connections)."
            return "connections", http.HTTPStatus.SERVICE_UNAVAILABLE, text
        return None

    def _harness(self, connection: ServerConnection, request: Request, path: str) -> Response:
        """Pages for the vla-evaluation-harness: /health, and a read-only /config."""
        status, content = http.HTTPStatus.OK, dict[str, Any]()
        if path == "/health" and self._state.ready:
            content = {"status": "ok"}
        elif path == "/health":
            status, content = http.HTTPStatus.SERVICE_UNAVAILABLE, {"status": "not ready"}
        elif "?" in request.path:
            errors = ["Settings cannot be changed while the server runs; start it with --max-batch."]
            status, content = http.HTTPStatus.UNPROCESSABLE_ENTITY, {"errors": errors}
        else:
            content = {"config": {"max_batch_size": self._state.settings.max_batch}}
        return _with_body(connection, f"{json.dumps(content)}\n".encode(), "application/json", status)

    def _refuse(self, connection: ServerConnection, reason: str, status: http.HTTPStatus, text: str) -> Response:
        self._state.metrics.refused.labels(reason).inc()
        now, text = time.monotonic(), printable(text)  # the text may contain a path of any length
        # A client that floods the server must not flood its log.
        if now - self._logged_at.get(reason, -math.inf) >= _REFUSAL_LOG_INTERVAL:
            self._logged_at[reason] = now
            _log.warning("refused %s: %s", address_of(connection), text)
        response = connection.respond(status, f"{text}\n")
        if status == http.HTTPStatus.UNAUTHORIZED:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response

    async def _dashboard(self, connection: ServerConnection, path: str) -> Response:
        """The dashboard's page and the files that its script loads."""
        try:
            if path == "/":
                page, content_policy = dashboard_page()
                response = _with_body(connection, page.encode(), "text/html; charset=utf-8")
                response.headers["Content-Security-Policy"] = content_policy
            elif frame := re.fullmatch(r"/frame/([0-9]{1,9})/([^/]+)\.jpg", path):
                image = self._state.dashboard.image(int(frame[1]), urllib.parse.unquote(frame[2]))
                response = _with_body(connection, await asyncio.to_thread(encode_jpeg, image), "image/jpeg")
            else:
                content = json.dumps(self._dashboard_json(path), allow_nan=False).encode()
                response = _with_body(connection, content, "application/json")
        except KeyError as error:
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"{printable(error)}\n")
        response.headers.update(_PAGE_HEADERS)
        return response

    def _dashboard_json(self, path: str) -> dict[str, Any]:
        """Content of /dashboard.json or /chunk/ROBOT.json."""
        state = self._state
        if chunk := re.fullmatch(r"/chunk/([0-9]{1,9})\.json", path):
            return state.dashboard.chunk(int(chunk[1]))
        if path != "/dashboard.json":
            raise UnknownKeyError(f"There is nothing at {path}.")
        return state.dashboard.summary(
            time.monotonic(),
            state.policies,
            ready=state.ready,
            connections=len(state.connections),
            waiting=state.scheduler.num_waiting,
            max_queue=state.settings.max_queue,
        )


def path_of(request: Request) -> str:
    """Path of a request, without the query."""
    return request.path.partition("?")[0]


def _token_in_url(request: Request) -> str | None:
    """Value of ?token=, percent-decoded."""
    token = re.match(r"token=([^&]*)", request.path.partition("?")[2])
    return urllib.parse.unquote(token[1]) if token else None


def _names_this_machine(request: Request) -> bool:
    """True if the Host header is the name or address of the loopback interface."""
    hosts = request.headers.get_all("Host")
    return len(hosts) == 1 and re.sub(r":[0-9]+$", "", hosts[0]).strip("[]").lower() in LOCAL_HOSTS


def _with_body(
    connection: ServerConnection, body: bytes, content_type: str, status: http.HTTPStatus = http.HTTPStatus.OK
) -> Response:
    response = connection.respond(status, "")
    for name, value in (("Content-Type", content_type), ("Content-Length", str(len(body)))):
        del response.headers[name]
        response.headers[name] = value
    response.body = body
    return response
