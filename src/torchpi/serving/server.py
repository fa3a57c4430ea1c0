"""The websocket server: handshakes, one coroutine per connection, and the end.

The protocol is openpi's. The server speaks first, a map of metadata, as soon as its policies are warm. Then each binary
frame is an observation, answered in turn by a binary frame with "actions", "policy_timing" and "server_timing", or by a
text frame with an error, {"code": …, "message": …}. The path chooses the policy. Beside it plain HTTP: /healthz,
/metrics, and for browsers the dashboard at "/" with /dashboard.json, /chunk/ROBOT.json and /frame/ROBOT/CAMERA.jpg.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import http
import itertools
import json
import logging
import math
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from torchpi.errors import UnknownKeyError
from torchpi.randomness import generator_at
from torchpi.serving.dashboard import FORGET_AFTER, Dashboard, Robot, dashboard_page, encode_jpeg
from torchpi.serving.messages import (
    SUPPORTED,
    RequestError,
    answer_frame,
    count_jpegs,
    decode_jpegs,
    read_request,
)
from torchpi.serving.metrics import Metrics
from torchpi.serving.recorder import Recorder
from torchpi.serving.scheduler import Answer, Request, Scheduler, ServedPolicy, noise_shape
from torchpi.serving.settings import LOCAL_HOSTS, RateLimit, ServeSettings
from torchpi_client import pack

_log = logging.getLogger(__name__)

_CLOSE_TIMEOUT = 2.0
"""Seconds that a client has for its part of closing a connection."""
_LOGGED_TEXT = 500
"""Characters of a refusal's text that the log has; the path in it may be of any length."""
_REFUSAL_PAUSE = 60.0
"""Seconds from one line of the log about refused connections to the next with the same reason."""
_DASHBOARD_PATHS = ("/dashboard.json", "/chunk/", "/frame/")
_DASHBOARD_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_GOODBYE = CloseCode.GOING_AWAY, "the server shuts down"


class PolicyServer:
    """Serves policies by name; the first one also at the path "/"."""

    def __init__(
        self,
        load: Mapping[str, Callable[[], ServedPolicy]],
        settings: ServeSettings,
        *,
        recorder: Recorder | None = None,
    ) -> None:
        """Within a running event loop.

        Args:
            load: per name what returns the policy; called in the model's thread, while connections are accepted.
            recorder: keeps requests and answers; it is closed by its owner.
        """
        self._names = list(load)
        self._settings, self._recorder = settings, recorder
        self._metrics = recorder.metrics if recorder else Metrics()
        self.scheduler = Scheduler(
            load,
            num_steps=settings.num_steps,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            metrics=self._metrics,
        )
        self._dashboard = Dashboard()
        self._policies: dict[str, ServedPolicy] = {}
        self._first_frames: dict[str, bytes] = {}
        self._ready = asyncio.Event()
        self._stopping = False
        self._grace_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._busy: set[ServerConnection] = set()
        self._open = 0
        self._refusal_logged: dict[str, float] = {}
        """Per reason, when the log said so last."""
        self._numbers = itertools.count()
        self._server: Server | None = None

    async def run(self, stop: asyncio.Event, listening: Callable[[str], None] = lambda address: None) -> None:
        """Serve until `stop` is set; then answer what has been received, and close.

        Args:
            listening: is told the address, ws://HOST:PORT, as soon as connections are accepted.
        """
        self._server = await self._listen()
        stopped = asyncio.create_task(stop.wait())
        try:
            host, port = next(iter(self._server.sockets)).getsockname()[:2]
            listening(f"ws://{f'[{host}]' if ':' in host else host}:{port}")
            self.scheduler.start()
            ready = asyncio.wrap_future(self.scheduler.ready)
            first: set[asyncio.Future[Any]] = {ready, stopped}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                self._begin(ready.result())
            await stopped
        finally:
            stopped.cancel()
            await self._stop()

    async def _listen(self) -> Server:
        """Accept connections from now on."""
        settings = self._settings
        try:
            return await serve(
                self._handle,
                settings.host,
                settings.port,
                process_request=self._answer_http,
                compression=None,  # of images it costs more time than it saves
                max_size=int(settings.max_message_mb * 2**20),
                max_queue=4,  # frames of one connection that wait here for the answer to the one before them
                close_timeout=_CLOSE_TIMEOUT,
                origins=[None],  # browsers say where a page comes from: no web page may use the robot's policy
                logger=logging.getLogger(f"{__name__}.websockets"),
            )
        except OSError as error:
            # Of one argument: str() of an OSError with a number begins with "[Errno …]".
            if error.errno == errno.EADDRINUSE:
                raise OSError(
                    f"port {settings.port} of {settings.host} is taken; choose another one with --port (0: a free one)."
                ) from error
            if isinstance(error, socket.gaierror):
                raise OSError(f"{settings.host} is no address of this machine: {error.strerror}.") from error
            if error.errno in (errno.EADDRNOTAVAIL, None):  # asyncio gives no number from Python 3.13 on
                raise OSError(f"{settings.host} is no address of this machine.") from error
            raise

    def _begin(self, policies: dict[str, ServedPolicy]) -> None:
        """From now on requests are taken."""
        supported = dict.fromkeys(SUPPORTED, True)
        self._first_frames = {name: pack({**policy.metadata, **supported}) for name, policy in policies.items()}
        self._policies = policies
        self._ready.set()
        _log.info("ready: %s", ", ".join(f"/{name}" for name in self._names))

    async def _stop(self) -> None:
        """Let nobody in, answer what has been received for as long as the settings say, and close."""
        assert self._server is not None
        self._stopping = True
        self._server.close(close_connections=False)
        await asyncio.gather(*(connection.close(*_GOODBYE) for connection in self._server.connections - self._busy))
        self.scheduler.close()
        await self._until_answered(self._settings.grace)
        self._grace_over.set_result(None)  # whoever waits for an answer now says so to its client
        await self._until_answered(_CLOSE_TIMEOUT)
        await asyncio.gather(*(connection.close(*_GOODBYE) for connection in self._server.connections))
        await self._server.wait_closed()

    async def _until_answered(self, timeout: float) -> None:
        """Wait until the clients that were being answered are gone, at most so many seconds."""
        if self._busy:
            gone = [asyncio.create_task(connection.wait_closed()) for connection in self._busy]
            _, late = await asyncio.wait(gone, timeout=timeout)
            for task in late:
                task.cancel()

    # ---- HTTP and the handshake ----

    async def _answer_http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """What is no websocket, and what may not become one; None: go on with the handshake."""
        path = _path(request)
        for_page = path == "/" and "Upgrade" not in request.headers
        if path == "/healthz":
            ready = self._ready.is_set() and not self._stopping
            status = http.HTTPStatus.OK if ready else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "ready\n" if ready else "not ready\n")
        authorization = request.headers.get_all("Authorization")
        if for_page and (token := _token_in_address(request)) is not None:  # a browser's address bar sends no headers
            authorization = [f"Bearer {token}"]
        if not self._settings.admits(authorization[0] if len(authorization) == 1 else None):
            text = "a valid token is needed" + ("; in a browser: /?token=TOKEN" if for_page else "")
            response = self._refuse(connection, "token", http.HTTPStatus.UNAUTHORIZED, text)
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        if path == "/metrics":
            return _with_body(connection, self._metrics.text(), self._metrics.content_type)
        if for_page or path.startswith(_DASHBOARD_PATHS):
            return await self._answer_dashboard(connection, request, path)
        if path != "/" and path[1:] not in self._names:
            known = f"there is no policy at {path}; this server has {', '.join(f'/{name}' for name in self._names)}"
            return self._refuse(connection, "path", http.HTTPStatus.NOT_FOUND, known)
        if self._open >= self._settings.max_connections:
            text = f"{self._open} clients are connected, and no more are taken"
            return self._refuse(connection, "connections", http.HTTPStatus.SERVICE_UNAVAILABLE, text)
        return None

    async def _answer_dashboard(self, connection: ServerConnection, request: HttpRequest, path: str) -> Response:
        """The page, and what its script asks for."""
        if self._settings.local and self._settings.token is None and not _names_this_machine(request):
            # A web page whose host name is made to lead here could read the robots' cameras.
            text = "without a --token the dashboard is for http://127.0.0.1 and http://localhost alone"
            return self._refuse(connection, "host", http.HTTPStatus.FORBIDDEN, text)
        try:
            if path == "/":
                page, content_policy = dashboard_page()
                response = _with_body(connection, page.encode(), "text/html; charset=utf-8")
                response.headers["Content-Security-Policy"] = content_policy
            elif frame := re.fullmatch(r"/frame/([0-9]{1,9})/([^/]+)\.jpg", path):
                image = self._dashboard.image(int(frame[1]), urllib.parse.unquote(frame[2]))
                response = _with_body(connection, await asyncio.to_thread(encode_jpeg, image), "image/jpeg")
            else:
                content = json.dumps(self._dashboard_content(path), allow_nan=False).encode()
                response = _with_body(connection, content, "application/json")
        except KeyError as error:
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"{error.args[0]}\n")
        response.headers.update(_DASHBOARD_HEADERS)
        return response

    def _dashboard_content(self, path: str) -> dict[str, Any]:
        """What the page reads at /dashboard.json or /chunk/ROBOT.json."""
        if chunk := re.fullmatch(r"/chunk/([0-9]{1,9})\.json", path):
            return self._dashboard.chunk(int(chunk[1]))
        if path != "/dashboard.json":
            raise UnknownKeyError(f"There is nothing at {path}.")
        return self._dashboard.summary(
            time.monotonic(),
            self._policies,
            ready=self._ready.is_set() and not self._stopping,
            connections=self._open,
            waiting=self.scheduler.num_waiting,
            max_queue=self._settings.max_queue,
        )

    def _refuse(self, connection: ServerConnection, reason: str, status: http.HTTPStatus, text: str) -> Response:
        self._metrics.refused.labels(reason).inc()
        now = time.monotonic()
        # Whoever floods the server shall not flood its log, nor write control characters to it.
        if now - self._refusal_logged.get(reason, -math.inf) >= _REFUSAL_PAUSE:
            self._refusal_logged[reason] = now
            _log.warning("refused %s: %s", _address(connection), text.encode("unicode_escape").decode()[:_LOGGED_TEXT])
        return connection.respond(status, f"{text}\n")

    # ---- one connection ----

    async def _handle(self, connection: ServerConnection) -> None:
        """One client, from the metadata to the last answer."""
        assert connection.request is not None
        client = _Client(
            connection,
            number=next(self._numbers),
            policy=_path(connection.request)[1:] or self._names[0],
            closed=asyncio.create_task(connection.wait_closed()),
            limit=RateLimit(self._settings.max_rate, time.monotonic()),
        )
        give_up = functools.partial(self._give_up, client)
        client.closed.add_done_callback(give_up)
        self._grace_over.add_done_callback(give_up)
        self._open += 1
        self._metrics.connections.inc()
        _log.info("client %d from %s for %s", client.number, connection.remote_address, client.policy)
        try:
            if await self._until_ready(client):
                await connection.send(self._first_frames[client.policy])
                with self._on_dashboard(client) as robot:
                    await self._converse(client, robot)
        except ConnectionClosed as error:
            _log.info("client %d: %s", client.number, error)
        finally:
            self._open -= 1
            self._metrics.connections.dec()
            client.closed.cancel()
            self._grace_over.remove_done_callback(give_up)
            if self._recorder is not None:
                self._recorder.end(client.number)

    @contextlib.contextmanager
    def _on_dashboard(self, client: "_Client") -> Iterator[Robot]:
        """The client as the dashboard has it; it is forgotten some seconds after the block."""
        policy = self._policies[client.policy]
        robot = self._dashboard.join(client.number, client.policy, policy, _address(client.connection))
        try:
            yield robot
        finally:
            self._dashboard.leave(robot, time.monotonic())
            later = asyncio.get_running_loop().call_later
            later(FORGET_AFTER, lambda: self._dashboard.forget(time.monotonic()))

    async def _until_ready(self, client: "_Client") -> bool:
        """Wait for the warm-up; False: the client did not."""
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait({ready, client.closed}, return_when=asyncio.FIRST_COMPLETED)
            return ready.done()
        finally:
            ready.cancel()

    async def _converse(self, client: "_Client", robot: Robot) -> None:
        """Requests and answers in turn, until the client closes, sends what is no request, or the server stops."""
        connection = client.connection
        while not self._stopping:
            client.noise = self._draw_noise(client)  # now: as soon as there is a request, somebody waits
            message = await connection.recv()
            self._busy.add(connection)
            try:
                client.began = time.perf_counter()
                reply = await self._reply(message, client, robot)
                try:
                    await connection.send(reply.frame)
                finally:
                    self._keep(reply, client, robot)
                if reply.outcome == "malformed_message":
                    await connection.close(CloseCode.INVALID_DATA, "malformed message")
                elif self._stopping:
                    await connection.close(*_GOODBYE)
            finally:
                self._busy.discard(connection)

    def _draw_noise(self, client: "_Client") -> np.ndarray:
        """Of the client's next request, from that request's place alone, whichever others it is batched with."""
        place = ("serve", client.policy, client.number, client.num_requests)
        shape = noise_shape(self._policies[client.policy])
        return generator_at(self._settings.seed, *place).standard_normal(shape, np.float32)

    def _keep(self, reply: "_Reply", client: "_Client", robot: Robot) -> None:
        """Count and show what was sent. Not before it is: until then the client waits."""
        client.num_requests += 1
        client.last_seconds = time.perf_counter() - client.began
        self._metrics.requests.labels(client.policy, reply.outcome).inc()
        if reply.answer is None:
            return
        self._metrics.queue_seconds.labels(client.policy).observe(reply.answer.queue_seconds)
        self._dashboard.answered(robot, reply.observation, reply.answer, time.monotonic())
        if self._recorder is not None:
            policy, actions = self._policies[client.policy], reply.answer.chunk["actions"]
            self._recorder.keep(client.policy, client.number, policy, reply.observation, actions)

    async def _reply(self, message: str | bytes, client: "_Client", robot: Robot) -> "_Reply":
        """What a message is answered with."""
        try:
            observation, answer = await self._answer(message, client, robot)
        except RequestError as error:
            self._dashboard.failed(robot, f"{error.code}: {error}")
            # Whoever floods the server shall not flood its log; who has left has said so already.
            level = logging.DEBUG if error.code in ("rate_limited", "client_left") else logging.WARNING
            _log.log(level, "client %d: %s: %s", client.number, error.code, error)
            return _Reply(error.frame(), error.code)
        except Exception:
            self._dashboard.failed(robot, "internal: the server failed on this request; its log says why")
            _log.exception("client %d: the server failed on a request", client.number)
            failure = RequestError("internal", "the server failed on this request; its log says why")
            return _Reply(failure.frame(), failure.code)
        timing = {
            "queue_ms": 1e3 * answer.queue_seconds,
            "infer_ms": 1e3 * answer.inference_seconds,
            "batch_size": answer.batch_size,
        }
        if client.last_seconds is not None:
            timing["prev_total_ms"] = 1e3 * client.last_seconds
        return _Reply(answer_frame(answer.chunk, timing), "answered", observation, answer)

    async def _answer(self, message: str | bytes, client: "_Client", robot: Robot) -> tuple[dict[str, Any], Answer]:
        """The observation in one message, and what the model says to it."""
        if not client.limit.allows(time.monotonic()):
            rate = self._settings.max_rate
            raise RequestError("rate_limited", f"more than {rate:g} requests per second; send fewer")
        observation, options = read_request(message, noise_shape=noise_shape(self._policies[client.policy]))
        if count_jpegs(observation):  # milliseconds for each
            max_bytes = int(self._settings.max_message_mb * 2**20)
            observation = await asyncio.to_thread(decode_jpegs, observation, max_bytes=max_bytes)
        request = Request(
            client.policy,
            observation,
            client.noise if options.noise is None else options.noise,
            options.num_steps or self._settings.num_steps,
            options.prefix,
        )
        self._dashboard.asked(robot, options.prefix, time.monotonic())
        seconds = min(self._settings.deadline, options.deadline or self._settings.deadline)
        return observation, await self._await(request, client, seconds)

    async def _await(self, request: Request, client: "_Client", deadline: float) -> Answer:
        """The model's answer; if it has not begun by the deadline, or nobody waits any more, the request is taken back.

        Args:
            deadline: seconds from now.
        """
        if error := self._hopeless(client):
            raise error
        loop = asyncio.get_running_loop()
        # One future that whatever comes first sets: asyncio.wait for several costs a turn of the loop more.
        answer = client.answer = loop.create_future()
        request.answer.add_done_callback(functools.partial(_hand_over, loop, answer))
        expiry = loop.call_later(deadline, self._expire, request, answer, deadline)
        try:
            self.scheduler.submit(request)
            return await answer
        finally:
            expiry.cancel()
            client.answer = None
            if not request.answer.done():
                self.scheduler.withdraw(request)
                request.answer.cancel()

    def _expire(self, request: Request, answer: "asyncio.Future[Answer]", seconds: float) -> None:
        """The deadline has passed."""
        if not answer.done() and self.scheduler.withdraw(request):
            answer.set_exception(RequestError("deadline_exceeded", f"the model was busy with others for {seconds:g} s"))

    def _give_up(self, client: "_Client", _: "asyncio.Future[None]") -> None:
        """The client has left, or the server has no time left for it."""
        error = self._hopeless(client)
        if error is not None and client.answer is not None and not client.answer.done():
            client.answer.set_exception(error)

    def _hopeless(self, client: "_Client") -> RequestError | None:
        """Why the client gets no answer any more."""
        if client.closed.done():
            return RequestError("client_left", "the client closed the connection before its answer")
        if self._grace_over.done():
            return RequestError("shutting_down", "the server is shutting down, and had no time left for the request")
        return None


def _hand_over(
    loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[Answer]", done: "concurrent.futures.Future[Answer]"
) -> None:
    """In the model's thread: give what is done to the coroutine that waits for it."""

    def take() -> None:
        if answer.done() or done.cancelled():  # given up, or never queued
            return
        if error := done.exception():
            answer.set_exception(error)
        else:
            answer.set_result(done.result())

    with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
        loop.call_soon_threadsafe(take)


@dataclasses.dataclass(frozen=True)
class _Reply:
    """What a message is answered with."""

    frame: str | bytes
    outcome: str
    """ "answered", or an error's code."""
    observation: dict[str, Any] = dataclasses.field(default_factory=dict)
    answer: Answer | None = None


@dataclasses.dataclass
class _Client:
    """One connection."""

    connection: ServerConnection
    number: int
    """From 0, in the order in which they came."""
    policy: str
    closed: "asyncio.Task[None]"
    """Done when the connection is."""
    limit: RateLimit
    num_requests: int = 0
    noise: np.ndarray = dataclasses.field(init=False)
    """[H, action_dim], of the next request, if it brings none."""
    answer: "asyncio.Future[Answer] | None" = None
    """What it waits for."""
    began: float = 0.0
    last_seconds: float | None = None
    """From the last request to its answer, sent."""


def _address(connection: ServerConnection) -> str:
    """HOST:PORT of the client."""
    return ":".join(map(str, (connection.remote_address or ())[:2]))


def _path(request: HttpRequest) -> str:
    return request.path.partition("?")[0]


def _token_in_address(request: HttpRequest) -> str | None:
    """What the address has as ?token=, percent-encoded where it has to be."""
    found = re.match(r"token=([^&]*)", request.path.partition("?")[2])
    return urllib.parse.unquote(found[1]) if found else None


def _names_this_machine(request: HttpRequest) -> bool:
    """Whether a browser was sent here by the loopback's own address or name."""
    hosts = request.headers.get_all("Host")
    return len(hosts) == 1 and re.sub(r":[0-9]+$", "", hosts[0]).strip("[]").lower() in LOCAL_HOSTS


def _with_body(connection: ServerConnection, body: bytes, content_type: str) -> Response:
    """A successful response."""
    response = connection.respond(http.HTTPStatus.OK, "")
    for name, value in (("Content-Type", content_type), ("Content-Length", str(len(body)))):
        del response.headers[name]
        response.headers[name] = value
    response.body = body
    return response


@contextlib.contextmanager
def running_server(
    load: Mapping[str, Callable[[], ServedPolicy]],
    settings: ServeSettings | None = None,
    *,
    recorder: Recorder | None = None,
) -> Iterator[tuple[str, PolicyServer]]:
    """A server in a thread of this process, for tests and measurements: its address ws://HOST:PORT, and the server.

    It listens from the beginning on, but its policies may not be warm yet. It is stopped when the block ends.
    """
    started: concurrent.futures.Future[tuple[str, PolicyServer, asyncio.AbstractEventLoop, asyncio.Event]]
    started = concurrent.futures.Future()

    async def run() -> None:
        stop = asyncio.Event()
        server = PolicyServer(load, settings or ServeSettings(port=0), recorder=recorder)
        loop = asyncio.get_running_loop()
        await server.run(stop, lambda address: started.set_result((address, server, loop, stop)))

    def run_in_thread() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            ended.set_exception(error)
            if not started.done():
                started.set_exception(error)
        else:
            ended.set_result(None)

    ended: concurrent.futures.Future[None] = concurrent.futures.Future()
    threading.Thread(target=run_in_thread, name="torchpi-server", daemon=True).start()
    address, server, loop, stop = started.result()
    try:
        yield address, server
    finally:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(stop.set)
        ended.result()
        server.scheduler.join(1.0)
