"""One client's connection: the metadata, then requests and answers in turn.

The server speaks first, a map of metadata, as soon as its policies are warm. Then each binary frame is an observation,
answered by a binary frame with "actions", "policy_timing" and "server_timing", or by a text frame with an error,
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
"""Observations whose images are decoded at once; each image needs up to seven times the memory of its pixels."""
_CLIENT_LEFT = "client_left", "The client closed the connection before its answer."


@dataclasses.dataclass
class ServerState:
    """The parts of a server that its connections and its HTTP pages share, in the thread of the event loop."""

    settings: ServeSettings
    names: list[str]
    """Names of the policies; the first one is also served at "/"."""
    metrics: Metrics
    scheduler: Scheduler
    observers: Sequence[Recorder | LiveView]
    """They get every answered request."""
    dashboard: Dashboard = dataclasses.field(default_factory=Dashboard)
    policies: dict[str, ServedPolicy] = dataclasses.field(default_factory=dict)
    """By name, once they are loaded and warm."""
    connections: "set[Connection]" = dataclasses.field(default_factory=set)
    decoders: concurrent.futures.ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(
            min(_MAX_DECODERS, os.cpu_count() or 1), "torchpi-decoder"
        )
    )
    decoding: set[concurrent.futures.Future[dict[str, Any]]] = dataclasses.field(default_factory=set)
    """Observations whose images are waiting for a decoder, or in one."""
    stopping: bool = False

    @property
    def ready(self) -> bool:
        """True while requests are answered."""
        return bool(self.policies) and not self.stopping


class Connection:
    """One client, from the metadata to the last answer. Its messages are openpi's; `vla_eval.py` has others."""

    def __init__(self, websocket: CountedConnection, state: ServerState, *, number: int, policy: str) -> None:
        self.websocket = websocket
        self.answering = False
        """A request has been received, and its answer not been sent."""
        self._state, self._number, self._policy = state, number, policy
        self._limit = RateLimit(state.settings.max_rate, time.monotonic())
        self._closed = asyncio.create_task(websocket.wait_closed())
        self._pending: Request | None = None
        """The request that waits for the model."""
        self._kept = self._held = 0
        """Bytes of the last observation on the dashboard, and with those of the request that is being answered."""
        self._num_requests = 0
        self._last_seconds: float | None = None
        """From the last request's arrival to its answer being sent."""

    async def run(self, ready: "asyncio.Future[Any]") -> None:
        """Serve the client until it leaves, sends a malformed message, or the server stops; from `ready` on."""
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
        """Answer the request that waits for the model with an error."""
        if self._pending is not None:
            self._pending.settle(error)

    async def _converse(self) -> None:
        """Send the metadata, then answer requests; the client is on the dashboard meanwhile, and for some seconds."""
        state, name, policy = self._state, self._policy, self._state.policies[self._policy]
        shape = state.settings.noise_shape(policy.model.config.chunk_shape)
        await self._greet()
        robot = state.dashboard.join(self._number, name, policy, address_of(self.websocket))
        try:
            while not state.stopping:
                # Of the request's place alone; drawn now, because its client waits as soon as there is a request.
                generator = generator_at(state.settings.seed, "serve", name, self._number, self._num_requests)
                noise = generator.standard_normal(shape, np.float32)
                try:
                    await self._respond(await self._receive(robot), noise, robot)
                finally:
                    self.answering = False
        finally:
            state.dashboard.leave(robot, time.monotonic())
            later = asyncio.get_running_loop().call_later
            later(FORGET_AFTER, lambda: state.dashboard.forget(time.monotonic()))

    async def _respond(self, message: str | bytes, noise: np.ndarray, robot: Robot) -> None:
        self.answering = True
        state, began = self._state, time.perf_counter()
        frame: str | bytes
        self._hold(self._kept + len(message))  # as much again, as arrays
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
        finally:  # not before: until then the client waits
            self._num_requests += 1
            self._last_seconds = time.perf_counter() - began
            self._kept = size_of(observation) if outcome == "answered" else self._kept
            self._hold(self._kept)
            self._done_with(message)
            state.metrics.requests.labels(self._policy, outcome).inc()
            if outcome == "answered":
                state.metrics.queue_seconds.labels(self._policy).observe(answer.queue_seconds)
                if "prompt_tokens_cut" in answer.chunk:
                    state.metrics.cut_prompts.labels(self._policy).inc()
                if "actions_clipped" in answer.chunk:
                    state.metrics.clipped.labels(self._policy).inc()
                if "uncertainty" in answer.chunk:
                    state.metrics.uncertainty.labels(self._policy).observe(answer.chunk["uncertainty"])
                state.dashboard.answered(robot, observation, answer, time.monotonic())
                for observer in state.observers:
                    policy, actions = state.policies[self._policy], answer.chunk["actions"]
                    observer.keep(self._policy, self._number, policy, observation, actions)
        if outcome == "malformed_message":
            await self.websocket.close(CloseCode.INVALID_DATA, "malformed message")
        elif state.stopping:
            await self.websocket.close(*GOODBYE)

    async def _greet(self) -> None:
        stated = self._state.policies[self._policy].metadata
        await self.websocket.send(pack({**stated, **self._state.scheduler.fingerprints[self._policy], **SUPPORTED}))

    async def _receive(self, robot: Robot) -> str | bytes:
        """The next message that the model answers."""
        return await self.websocket.recv()

    def _read(self, message: str | bytes, noise_shape: tuple[int, ...]) -> tuple[dict[str, Any], RequestOptions]:
        """The observation and the options in a message that was received."""
        return read_request(message, noise_shape=noise_shape)

    def _answer_frame(self, answer: Answer, timing: dict[str, float]) -> bytes:
        return pack({**answer.chunk, "server_timing": timing})

    def _error_frame(self, error: RequestError) -> str | bytes:
        return error.frame()

    def _done_with(self, message: str | bytes) -> None:
        """Count a message no more."""
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
        self._state.dashboard.asked(robot, options.previous, time.monotonic())
        deadline = min(settings.deadline, options.deadline or settings.deadline)
        if count_encoded(observation):  # milliseconds for each
            began = time.monotonic()
            observation = await self._decode(observation, deadline)
            deadline = max(0.0, deadline - (time.monotonic() - began))
            self._hold(self._kept + size_of(observation))
        request = Request(self._policy, observation, noise, num_steps, options.previous)
        return observation, await self._wait_for(request, deadline)

    def _hold(self, num_bytes: int) -> None:
        """Count these bytes as this client's, in place of those until now."""
        self.websocket.count(num_bytes - self._held)
        self._held = num_bytes

    async def _decode(self, observation: dict[str, Any], deadline: float) -> dict[str, Any]:
        """The observation with decoded images, in `deadline` seconds, and as long as the client is there."""
        state = self._state
        work = state.decoders.submit(decode_encoded, observation, max_bytes=state.settings.max_message_bytes)
        state.decoding.add(work)
        work.add_done_callback(state.decoding.discard)
        decoded = asyncio.wrap_future(work)
        first: list[asyncio.Future[Any]] = [decoded, self._closed]
        await asyncio.wait(first, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if decoded.done():
            return decoded.result()
        decoded.cancel()  # what has begun ends soon by itself, see `torchpi_client.images`
        if self._closed.done():
            raise RequestError(*_CLIENT_LEFT)
        raise RequestError("deadline_exceeded", f"Its images were not decoded in {deadline:g} s: others are before it.")

    async def _wait_for(self, request: Request, deadline: float) -> Answer:
        """The model's answer; the request is withdrawn if it has not begun in `deadline` seconds, or nobody waits."""
        if self._closed.done():
            raise RequestError(*_CLIENT_LEFT)
        scheduler = self._state.scheduler

        def expire() -> None:
            if scheduler.withdraw(request):
                request.settle(RequestError("deadline_exceeded", f"The model was busy with others for {deadline:g} s."))

        # One future that whatever comes first sets: asyncio.wait for several costs a turn of the loop more.
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
        """Log an error, and return the one for the client."""
        if isinstance(error, RequestError):
            # A client that floods the server must not flood its log; one that has left is in the log already.
            level = logging.DEBUG if error.code in ("rate_limited", "client_left") else logging.WARNING
            _log.log(level, "client %d: %s: %s", self._number, error.code, error)
            error.__traceback__ = None  # whose frames would hold the request until the garbage collector comes
            return error
        _log.error("client %d: the server failed on a request", self._number, exc_info=error)
        return RequestError("internal", "The server failed on this request; its log says why.")


def address_of(websocket: ServerConnection) -> str:
    """HOST:PORT of a client."""
    return ":".join(map(str, (websocket.remote_address or ())[:2]))
