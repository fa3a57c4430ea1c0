"""The thread that owns the models, and the queue in front of it.

A pass takes whatever of the oldest request's kind is waiting at that moment, and never waits for more. A connection has
one request here at a time, see `server.py`: first come, first served is then fair, because whoever has been answered
comes behind everyone who waits.
"""

import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from torchpi.serving.messages import RequestError
from torchpi.serving.metrics import Metrics
from torchpi.types import ActionChunk, ActionPrefix

_log = logging.getLogger(__name__)


@runtime_checkable
class ServedPolicy(Protocol):
    """What a server needs of a `Policy`."""

    model: Any
    embodiment: Any

    @property
    def metadata(self) -> dict[str, Any]:
        """What clients may want to know."""

    def example_observation(self) -> dict[str, Any]:
        """A valid request."""

    def prepare(self, observation: Mapping[str, Any]) -> Any:
        """Raises KeyError or ValueError if something is wrong with the observation."""

    def infer_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        *,
        noise: np.ndarray,
        num_steps: int,
        prefixes: Sequence[ActionPrefix | None] | None = None,
    ) -> list[ActionChunk]:
        """One chunk per observation, independent of each other; noise [B, H, action_dim]."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said, and what it took."""

    chunk: ActionChunk
    queue_seconds: float
    inference_seconds: float
    batch_size: int


@dataclasses.dataclass(eq=False)
class Request:
    """One observation on its way through the model."""

    policy: str
    """The policy's name."""
    observation: dict[str, Any]
    noise: np.ndarray
    """[H, action_dim]."""
    num_steps: int
    prefix: ActionPrefix | None = None
    """For real-time chunking."""
    answer: "concurrent.futures.Future[Answer]" = dataclasses.field(default_factory=concurrent.futures.Future)
    """An `Answer`, or a `RequestError`."""
    arrived: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def kind(self) -> tuple[str, int, bool]:
        """What requests of one pass have in common; guidance by a prefix takes longer, for all of them."""
        return self.policy, self.num_steps, self.prefix is not None


class Scheduler:
    """Loads policies, warms them up, and answers requests, all in one thread of its own."""

    def __init__(
        self,
        load: Mapping[str, Callable[[], ServedPolicy]],
        *,
        num_steps: int,
        max_batch: int,
        max_queue: int,
        metrics: Metrics,
    ) -> None:
        """
        Args:
            load: per name what returns the policy; called in the thread.
            num_steps: of the warm-up.
            max_batch: requests in one pass.
            max_queue: requests that may wait.
        """
        self._load, self._num_steps = dict(load), num_steps
        self._max_batch, self._max_queue = max_batch, max_queue
        self._batch_size = {name: metrics.batch_size.labels(name) for name in load}
        self._inference_seconds = {name: metrics.inference_seconds.labels(name) for name in load}
        self._policies: dict[str, ServedPolicy] = {}
        self._waiting: list[Request] = []
        self._lock = threading.Lock()
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Something whenever there is a request, or the end, to wake the thread with; faster than a condition."""
        self._closed = False
        metrics.queue_length.set_function(lambda: self.num_waiting)
        self.ready: concurrent.futures.Future[dict[str, ServedPolicy]] = concurrent.futures.Future()
        """The policies by name, once they are loaded and warm; or what prevented it."""
        # A daemon: a process that gives up on it can end.
        self._thread = threading.Thread(target=self._run, name="torchpi-model", daemon=True)

    def start(self) -> None:
        """Begin to load; `ready` says when that is done."""
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for the model."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queue a request."""
        with self._lock:
            if self._closed:
                raise RequestError("shutting_down", "the server is shutting down; connect again later")
            if len(self._waiting) >= self._max_queue:
                raise RequestError(
                    "queue_full", f"{len(self._waiting)} requests are waiting for the model already; try again later"
                )
            self._waiting.append(request)
        self._news.put(None)

    def withdraw(self, request: Request) -> bool:
        """Take a request back; False: the model has begun with it, or is done."""
        with self._lock:
            if request not in self._waiting:
                return False
            self._waiting.remove(request)
            return True

    def close(self) -> None:
        """Take no more requests; the thread ends when the queue is empty."""
        with self._lock:
            self._closed = True
        self._news.put(None)

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end, so many seconds; whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            for name, load in self._load.items():
                self._policies[name] = load()
                self._warm_up(name)
        except BaseException as error:  # whoever waits for `ready` raises it
            if len(self._load) > 1:
                error.add_note(f"(policy {name})")
            self.ready.set_exception(error)
            return
        self.ready.set_result(self._policies)
        while batch := self._next_batch():
            # From here on nobody can cancel them.
            if started := [request for request in batch if request.answer.set_running_or_notify_cancel()]:
                self._answer(started)

    def _warm_up(self, name: str) -> None:
        """One pass of the smallest and one of the largest batch: kernels are compiled, and the memory suffices."""
        policy = self._policies[name]
        for size in sorted({1, self._max_batch}):
            start = time.perf_counter()
            noise = np.zeros((size, *noise_shape(policy)), np.float32)
            policy.infer_batch([policy.example_observation()] * size, noise=noise, num_steps=self._num_steps)
            _log.info("policy %s: warm-up with %d requests took %.2f s", name, size, time.perf_counter() - start)

    def _next_batch(self) -> list[Request]:
        """The oldest request, and those of its kind that wait as well; nothing: closed, and all is answered."""
        while True:
            with self._lock:
                if self._waiting:
                    kind = self._waiting[0].kind
                    batch = [request for request in self._waiting if request.kind == kind][: self._max_batch]
                    self._waiting = [request for request in self._waiting if request not in batch]
                    return batch
                if self._closed:
                    return []
            self._news.get()

    def _answer(self, batch: list[Request]) -> None:
        """Answer each; one that fails, for example by a bad observation, fails alone."""
        policy, num_steps = self._policies[batch[0].policy], batch[0].num_steps
        start = time.perf_counter()
        try:
            chunks = policy.infer_batch(
                [request.observation for request in batch],
                noise=np.stack([request.noise for request in batch]),
                num_steps=num_steps,
                prefixes=[request.prefix for request in batch],
            )
            assert len(chunks) == len(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(_failure(policy, batch[0], error))
                return
            half = len(batch) // 2
            self._answer(batch[:half])
            self._answer(batch[half:])
            return
        seconds = time.perf_counter() - start
        for request, chunk in zip(batch, chunks, strict=True):
            request.answer.set_result(Answer(chunk, start - request.arrived, seconds, len(batch)))
        self._inference_seconds[batch[0].policy].observe(seconds)
        self._batch_size[batch[0].policy].observe(len(batch))


def noise_shape(policy: ServedPolicy) -> tuple[int, int]:
    """[H, action_dim] of a policy's noise."""
    config = policy.model.config
    return config.require("action_horizon"), config.action_dim


def _failure(policy: ServedPolicy, request: Request, error: Exception) -> RequestError:
    """What the client is told: its own mistakes in full, of ours only that there was one."""
    if isinstance(error, KeyError | ValueError):
        try:
            prefix = {} if request.prefix is None else {"actions": request.prefix.actions}
            policy.prepare({**request.observation, **prefix})
        except (KeyError, ValueError) as its_fault:
            # str() of a KeyError quotes its message.
            return RequestError("bad_observation", str(its_fault.args[0] if its_fault.args else its_fault))
    _log.error("policy %s failed on a request", request.policy, exc_info=error)
    return RequestError("internal", "the policy failed on this observation; the server's log says why")
