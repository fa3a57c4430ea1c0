"""Batching scheduler: the thread that owns the models, and its request queue.

A forward pass batches the oldest waiting request with those compatible with it, and never waits for more to arrive. A
connection has at most one request in the queue (see `connection.py`), so first come, first served is fair: an answered
client queues again behind all waiting ones.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from torchpi.errors import ActionError
from torchpi.robots.commands import control_gaps
from torchpi.serving.messages import RequestError
from torchpi.serving.metrics import Metrics
from torchpi.serving.settings import ServeSettings
from torchpi.types import ActionChunk, PreviousChunk

_log = logging.getLogger(__name__)


@runtime_checkable
class ServedPolicy(Protocol):
    """The part of `Policy` that a server uses."""

    model: Any
    embodiment: Any
    engine: Any

    @property
    def metadata(self) -> dict[str, Any]: ...

    def example_observation(self) -> dict[str, Any]: ...

    def prepare(self, observation: Mapping[str, Any]) -> Any: ...

    def infer_batch(self, *args: Any, **kwargs: Any) -> list[ActionChunk]: ...


@dataclasses.dataclass(frozen=True)
class Answer:
    """Action chunk and its timing."""

    chunk: ActionChunk
    queue_seconds: float
    inference_seconds: float
    batch_size: int


@dataclasses.dataclass(eq=False)
class Request:
    """One observation for policy `policy`. Created in the event loop, where its answer arrives."""

    policy: str
    observation: dict[str, Any]
    noise: np.ndarray
    """[H, action_dim], or [R, H, action_dim] with the server's `num_samples`."""
    num_steps: int | None
    previous: PreviousChunk | None = None
    """Previous chunk, for real-time chunking."""
    answer: "asyncio.Future[Answer]" = dataclasses.field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """The answer, or a `RequestError`."""
    arrived: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def batch_key(self) -> tuple[str, int | None, bool]:
        """Equal for requests that may share a forward pass. Guidance by a previous chunk would slow all of them."""
        return self.policy, self.num_steps, self.previous is not None

    def settle(self, result: Answer | RequestError) -> None:
        """Set the answer unless it is set already; only in the event loop's thread."""
        if self.answer.done():
            return
        if isinstance(result, RequestError):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(result)

    def settle_threadsafe(self, result: Answer | RequestError) -> None:
        """`settle`, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody waits for the answer
            self.answer.get_loop().call_soon_threadsafe(self.settle, result)


class Scheduler:
    """Loads policies, warms them up and answers requests, all in one thread."""

    def __init__(
        self, load: Mapping[str, Callable[[], ServedPolicy]], settings: ServeSettings, metrics: Metrics
    ) -> None:
        self._load, self._settings, self._metrics = dict(load), settings, metrics
        self._sampling: dict[str, Any] = {}
        if settings.num_samples is not None:
            self._sampling = {"num_samples": settings.num_samples, "pick": settings.pick}
        self._policies: dict[str, ServedPolicy] = {}
        self.fingerprints: dict[str, dict[str, str]] = {}
        """By policy, {"fingerprint": …} of its weights, or {} if it has none. Tells clients that weights changed."""
        self._waiting: list[Request] = []
        self._lock = threading.Lock()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Gets an item per request, and one on closing, to wake the thread; faster than a condition variable."""
        self._closed = False
        metrics.queue_length.set_function(lambda: self.num_waiting)
        self.ready: concurrent.futures.Future[dict[str, ServedPolicy]] = concurrent.futures.Future()
        """The loaded and warmed-up policies by name, or the error that prevented this."""
        # A daemon, so that the process can exit while the model is still running.
        self._thread = threading.Thread(target=self._run, name="torchpi-model", daemon=True)

    def start(self) -> None:
        """Start loading; see `ready`."""
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        with self._lock:
            if self._closed:
                raise RequestError("shutting_down", "The server is shutting down; connect again later.")
            if (num_waiting := len(self._waiting)) >= self._settings.max_queue:
                raise RequestError(
                    "queue_full", f"{num_waiting} requests are waiting for the model already; try again later."
                )
            self._waiting.append(request)
        self._wake.put(None)

    def withdraw(self, request: Request) -> bool:
        """Remove a request from the queue; False if it is not there because its forward pass has begun."""
        with self._lock:
            if request not in self._waiting:
                return False
            self._waiting.remove(request)
            return True

    def close(self) -> None:
        """Accept no more requests; the thread ends when the queue is empty."""
        with self._lock:
            self._closed = True
        self._wake.put(None)

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the thread to end; False if it is still running."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            for name, load in self._load.items():
                self._policies[name] = load()
                fingerprint = getattr(self._policies[name], "fingerprint", None)
                self.fingerprints[name] = {} if fingerprint is None else {"fingerprint": fingerprint()}
                self._warm_up(name)
        except BaseException as error:  # re-raised in the thread that waits for `ready`
            if len(self._load) > 1:
                error.add_note(f"(policy {name})")
            self.ready.set_exception(error)
            return
        self.ready.set_result(self._policies)
        while batch := self._next_batch():
            self._answer(batch)
        for policy in self._policies.values():
            if policy.engine is not None:
                policy.engine.close()  # otherwise the process waits for all queued buckets to compile

    def _warm_up(self, name: str) -> None:
        """Run the smallest and the largest batch once, to compile kernels and to make sure that memory suffices."""
        policy = self._policies[name]
        for gap in control_gaps(policy.embodiment, policy.model.config.action_horizon):
            _log.warning("policy %s: %s", name, gap)
        for size in sorted({1, self._settings.max_batch}):
            start = time.perf_counter()
            noise = np.zeros((size, *self._settings.noise_shape(policy.model.config.chunk_shape)), np.float32)
            observations, num_steps = [policy.example_observation()] * size, self._settings.num_steps
            policy.infer_batch(observations, noise=noise, num_steps=num_steps, **self._sampling)
            _log.info("policy %s: warm-up, batch of %d: %.2f s", name, size, time.perf_counter() - start)
        if policy.engine is not None:
            policy.engine.background = True  # no client waits until other batch sizes are compiled

    def _next_batch(self) -> list[Request]:
        """The oldest request and those that may share its forward pass; empty once closed and all are answered."""
        while True:
            with self._lock:
                if self._waiting:
                    key = self._waiting[0].batch_key
                    batch = [request for request in self._waiting if request.batch_key == key]
                    batch = batch[: self._settings.max_batch]
                    self._waiting = [request for request in self._waiting if request not in batch]
                    return batch
                if self._closed:
                    return []
            self._wake.get()

    def _answer(self, batch: list[Request]) -> None:
        """Answer each request. A request that fails, for example for a bad observation, fails alone."""
        name, policy = batch[0].policy, self._policies[batch[0].policy]
        start = time.perf_counter()
        try:
            chunks = policy.infer_batch(
                [request.observation for request in batch],
                noise=np.stack([request.noise for request in batch]),
                num_steps=batch[0].num_steps,
                prefixes=[request.previous for request in batch],
                **self._sampling,
            )
            assert len(chunks) == len(batch)
            if not all(np.isfinite(chunk["actions"]).all() for chunk in chunks):
                raise ActionError("The actions contain NaN or infinity; they are not sent to the robot.")
        except Exception as error:
            if len(batch) == 1:
                batch[0].settle_threadsafe(_failure(policy, batch[0], error))
                return
            half = len(batch) // 2
            self._answer(batch[:half])
            self._answer(batch[half:])
            return
        seconds = time.perf_counter() - start
        for request, chunk in zip(batch, chunks, strict=True):
            request.settle_threadsafe(Answer(chunk, start - request.arrived, seconds, len(batch)))
        self._metrics.inference_seconds.labels(name).observe(seconds)
        self._metrics.batch_size.labels(name).observe(len(batch))


def _failure(policy: ServedPolicy, request: Request, error: Exception) -> RequestError:
    """The error for the client. It describes a mistake of the client in full, but not an internal one."""
    if isinstance(error, ActionError):
        return RequestError("unsafe_actions", str(error))
    if isinstance(error, KeyError | ValueError):
        try:
            previous = {} if request.previous is None else {"actions": request.previous.actions}
            policy.prepare({**request.observation, **previous})
        except (KeyError, ValueError) as bad_observation:
            return RequestError("bad_observation", str(bad_observation))
    _log.error("policy %s failed on a request", request.policy, exc_info=error)
    return RequestError("internal", "The policy failed on this observation; the server's log says why.")
