"""Connection of one client: metadata first, then requests and answers in turn.

Once the policies are warm, the server sends a map of metadata. Each binary frame from the client is an observation; its
answer is a binary frame with "actions", "policy_timing" and "server_timing", or a text frame with an error,
{"code": …, "message": …}.
"""

import asyncio
import concurrent.futures
import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from torchpi.randomness import generator_at
from torchpi.samples import checked_pick
from torchpi.serving.dashboard import FORGET_AFTER, Dashboard, Robot
from torchpi.serving.live import LiveView
from torchpi.serving.memory import CountedConnection, size_of
from torchpi.serving.messages import (
    SUPPORTED,
    RequestError,
    RequestOptions,
    count_encoded,
    decode_encoded,
    read_request,
)
from torchpi.serving.metrics import Metrics
from torchpi.serving.recorder import Recorder
from torchpi.serving.scheduler import Answer, Request, Scheduler, ServedPolicy
from torchpi.serving.settings import RateLimit, ServeSettings
from torchpi_client import pack
from torchpi_client.protocol import closing

_log = logging.getLogger(__name__)

GOODBYE = CloseCode.GOING_AWAY, "the server shuts down"
_MAX_DECODERS = 4
"""Observations whose images are decoded at the same time. Decoding needs up to seven times the memory of the pixels."""
_CLIENT_LEFT = "client_left", "The client closed the connection before its answer."


@dataclasses.dataclass
class ServerState:
    """State shared by a server's connections and HTTP pages; only used in the event loop's thread."""

    settings: ServeSettings
    names: list[str]
    """Names of the policies; the first one is also served at "/"."""
    metrics: Metrics
    scheduler: Scheduler
    observers: Sequence[Recorder | LiveView]
    """Receive every answered request."""
    dashboard: Dashboard = dataclasses.field(default_factory=Dashboard)
    policies: dict[str, ServedPolicy] = dataclasses.field(default_factory=dict)
    """Policies by name; empty until all are loaded and warm."""
    connections: "set[Connection]" = dataclasses.field(default_factory=set)
    decoders: concurrent.futures.ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(
            min(_MAX_DECODERS, os.cpu_count() or 1), "torchpi-decoder"
        )
    )
    decoding: set[concurrent.futures.Future[dict[str, Any]]] = dataclasses.field(default_factory=set)
    """Observations whose images are being decoded or wait for it."""
    stopping: bool = False

    @property
    def ready(self) -> bool:
        """True while requests are answered."""
        return bool(self.policies) and not self.stopping


class Connection:
    """One client, from the metadata to the last answer, with openpi's messages (`vla_eval.py` has others)."""

    def __init__(self, websocket: CountedConnection, state: ServerState, *, number: int, policy: str) -> None:
        self.websocket = websocket
        self.answering = False
        """True from receiving a request until its answer is sent."""
        self._state, self._number, self._policy = state, number, policy
        self._limit = RateLimit(state.settings.max_rate, time.monotonic())
        self._closed = asyncio.create_task(websocket.wait_closed())
        self._pending: Request | None = None
        """The request that is waiting for the model."""
        self._dashboard_bytes = self._held_bytes = 0
        """Size of the last observation, kept for the dashboard; the same plus the current request's memory."""
        self._num_requests = 0
        self._last_seconds: float | None = None
        """Seconds from the last request's arrival until its answer was sent."""

    async def run(self, ready: "asyncio.Future[Any]") -> None:
        """Wait for `ready`, then serve the client until it leaves, sends a malformed message, or the server stops."""
        state = self._state
        self._closed.add_done_callback(lambda _: self.give_up(RequestError(*_CLIENT_LEFT)))
        state.connections.add(self)
        state.metrics.connections.inc()
        _log.info("client %d from %s for %s", self._number, address_of(self.websocket), self._policy)
        try:
            await asyncio.wait([ready, self._closed], return_when=asyncio.FIRST_COMPLETED)
            if state.policies:
                await self._converse()
        except ConnectionClosed as error:
            _log.info("client %d, %s, %s", self._number, address_of(self.websocket), closing(error))
            error.__traceback__ = None  # see `_failure`
        finally:
            state.connections.remove(self)
            state.metrics.connections.dec()
            self._closed.cancel()
            for observer in state.observers:
                observer.end(self._number)

    def give_up(self, error: RequestError) -> None:
        """Answer the request that is waiting for the model with an error."""
        if self._pending is not None:
            self._pending.settle(error)

    async def _converse(self) -> None:
        """Send the metadata and answer requests. The dashboard shows the client until a few seconds after it leaves."""
        state, name, policy = self._state, self._policy, self._state.policies[self._policy]
        shape = state.settings.noise_shape(policy.model.config.chunk_shape)
        await self._send_metadata()
        robot = state.dashboard.join(self._number, name, policy, address_of(self.websocket))
        try:
            while not state.stopping:
                # The noise only depends on client and request number. Drawn before the request arrives: less latency.
                generator = generator_at(state.settings.seed, "serve", name, self._number, self._num_requests)
                noise = generator.standard_normal(shape, np.float32)
                try:
                    await self._respond(await self._receive(robot), noise, robot)
                finally:
                    self.answering = False
        finally:
            state.dashboard.leave(robot, time.monotonic())
            loop = asyncio.get_running_loop()
            loop.call_later(FORGET_AFTER, lambda: state.dashboard.forget(time.monotonic()))

    async def _respond(self, message: str | bytes, noise: np.ndarray, robot: Robot) -> None:
        self.answering = True
        state, start = self._state, time.perf_counter()
        frame: str | bytes
        self._hold(self._dashboard_bytes + len(message))  # the unpacked arrays need as much as the message
        try:
            observation, answer = await self._infer(message, noise, robot)
            timing = {
                "queue_ms": 1e3 * answer.queue_seconds,
                "infer_ms": 1e3 * answer.inference_seconds,
                "batch_size": answer.batch_size,
            }
            if self._last_seconds is not None:
                timing["prev_total_ms"] = 1e3 * self._last_seconds
            outcome, frame = "answered", self._answer_frame(answer, timing)
        except Exception as error:
            failure = self._failure(error)
            state.dashboard.failed(robot, f"{failure.code}: {failure}")
            outcome, frame = failure.code, self._error_frame(failure)
        try:
            await self.websocket.send(frame)
        finally:  # everything below comes after sending, because the client is waiting
            self._num_requests += 1
            self._last_seconds = time.perf_counter() - start
            if outcome == "answered":
                self._dashboard_bytes = size_of(observation)
            self._hold(self._dashboard_bytes)
            self._release(message)
            state.metrics.requests.labels(self._policy, outcome).inc()
            if outcome == "answered":
                self._report(observation, answer, robot)
        if outcome == "malformed_message":
            await self.websocket.close(CloseCode.INVALID_DATA, "malformed message")
        elif state.stopping:
            await self.websocket.close(*GOODBYE)

    def _report(self, observation: dict[str, Any], answer: Answer, robot: Robot) -> None:
        """Add an answered request to the metrics and the dashboard, and pass it to the observers."""
        state, name, chunk = self._state, self._policy, answer.chunk
        state.metrics.queue_seconds.labels(name).observe(answer.queue_seconds)
        if "prompt_tokens_cut" in chunk:
            state.metrics.cut_prompts.labels(name).inc()
        if "actions_clipped" in chunk:
            state.metrics.clipped.labels(name).inc()
        if "uncertainty" in chunk:
            state.metrics.uncertainty.labels(name).observe(chunk["uncertainty"])
        state.dashboard.answered(robot, observation, answer, time.monotonic())
        for observer in state.observers:
            observer.keep(name, self._number, state.policies[name], observation, chunk["actions"])

    async def _send_metadata(self) -> None:
        state, name = self._state, self._policy
        metadata = {**state.policies[name].metadata, **state.scheduler.fingerprints[name], **SUPPORTED}
        await self.websocket.send(pack(metadata))

    async def _receive(self, robot: Robot) -> str | bytes:
        """The next message that needs an answer of the model."""
        return await self.websocket.recv()

    def _read(self, message: str | bytes, noise_shape: tuple[int, ...]) -> tuple[dict[str, Any], RequestOptions]:
        """Observation and options of a message."""
        return read_request(message, noise_shape=noise_shape)

    def _answer_frame(self, answer: Answer, timing: dict[str, float]) -> bytes:
        return pack({**answer.chunk, "server_timing": timing})

    def _error_frame(self, error: RequestError) -> str | bytes:
        return error.frame()

    def _release(self, message: str | bytes) -> None:
        """Stop counting a message's memory."""
        self.websocket.count(-len(message.encode() if isinstance(message, str) else message))

    async def _infer(self, message: str | bytes, noise: np.ndarray, robot: Robot) -> tuple[dict[str, Any], Answer]:
        settings = self._state.settings
        if not self._limit.allows(time.monotonic()):
            raise RequestError("rate_limited", f"More than {settings.max_rate:g} requests per second; send fewer.")
        observation, options = self._read(message, noise.shape)
        noise = noise if options.noise is None else options.noise
        num_steps = options.num_steps or settings.num_steps
        try:
            checked_pick(settings.pick, settings.num_samples, num_steps)
        except ValueError as error:
            raise RequestError("bad_observation", f"torchpi/num_steps: {error}") from error
        self._state.dashboard.requested(robot, options.previous, time.monotonic())
        deadline = min(settings.deadline, options.deadline or settings.deadline)
        if count_encoded(observation):  # in another thread: each image takes milliseconds
            start = time.monotonic()
            observation = await self._decode(observation, deadline)
            deadline = max(0.0, deadline - (time.monotonic() - start))
            self._hold(self._dashboard_bytes + size_of(observation))
        request = Request(self._policy, observation, noise, num_steps, options.previous)
        return observation, await self._wait_for(request, deadline)

    def _hold(self, num_bytes: int) -> None:
        """Set the memory that this client holds besides its received messages."""
        self.websocket.count(num_bytes - self._held_bytes)
        self._held_bytes = num_bytes

    async def _decode(self, observation: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Decode the images of an observation within `deadline` seconds, while the client is connected."""
        state = self._state
        decoding = state.decoders.submit(decode_encoded, observation, max_bytes=state.settings.max_message_bytes)
        state.decoding.add(decoding)
        decoding.add_done_callback(state.decoding.discard)
        decoded = asyncio.wrap_future(decoding)
        awaited: list[asyncio.Future[Any]] = [decoded, self._closed]
        await asyncio.wait(awaited, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if decoded.done():
            return decoded.result()
        decoded.cancel()  # decoding that has begun ends soon: `torchpi_client.images` limits its cost
        if self._closed.done():
            raise RequestError(*_CLIENT_LEFT)
        raise RequestError("deadline_exceeded", f"The images were not decoded in {deadline:g} s: others came first.")

    async def _wait_for(self, request: Request, deadline: float) -> Answer:
        """The model's answer. The request is withdrawn if it waits for `deadline` seconds, or if the client leaves."""
        if self._closed.done():
            raise RequestError(*_CLIENT_LEFT)
        scheduler = self._state.scheduler

        def expire() -> None:
            if scheduler.withdraw(request):
                text = f"The model was busy with other requests for {deadline:g} s."
                request.settle(RequestError("deadline_exceeded", text))

        # A single future, set by whichever event comes first: asyncio.wait costs one more iteration of the loop.
        self._pending = request
        expiry = asyncio.get_running_loop().call_later(deadline, expire)
        try:
            scheduler.submit(request)
            return await request.answer
        finally:
            expiry.cancel()
            self._pending = None
            scheduler.withdraw(request)

    def _failure(self, error: Exception) -> RequestError:
        """Log an error and return the one for the client."""
        if isinstance(error, RequestError):
            # A client that floods the server must not flood its log, and disconnecting is logged elsewhere.
            level = logging.DEBUG if error.code in ("rate_limited", "client_left") else logging.WARNING
            _log.log(level, "client %d: %s: %s", self._number, error.code, error)
            error.__traceback__ = None  # its stack frames would keep the request until the next garbage collection
            return error
        _log.error("client %d: the server failed on a request", self._number, exc_info=error)
        return RequestError("internal", "The server failed on this request; its log says why.")


def address_of(websocket: ServerConnection) -> str:
    """HOST:PORT of a client."""
    return ":".join(map(str, (websocket.remote_address or ())[:2]))
