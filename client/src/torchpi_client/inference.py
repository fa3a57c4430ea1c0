"""Asynchronous inference for the control loop: one request at a time, in a thread."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, Mapping, Protocol, runtime_checkable

from torchpi_client.clock import Clock
from torchpi_client.robot import InferringPolicy


@dataclasses.dataclass(frozen=True)
class Answer:
    """The outcome of a request."""

    content: Mapping[str, Any] | None
    """The policy's answer; None if there is an error."""
    error: Exception | None
    finished: float
    """Time of the answer on the loop's clock."""


@runtime_checkable
class Inference(Protocol):
    """An asynchronous source of answers, one request at a time."""

    @property
    def busy(self) -> bool:
        """True from `start` until its answer is taken."""

    def start(self, observation: dict[str, Any]) -> None:
        """Send a request; only while not busy."""

    def poll(self) -> Answer | None:
        """Take the answer, or None if it has not arrived."""

    def wait(self, seconds: float) -> Answer | None:
        """Wait for the answer and take it; None after this many seconds without one."""


class BackgroundInference:
    """`Inference` in daemon threads."""

    def __init__(self, policy: InferringPolicy, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._answer: Answer | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None

    def start(self, observation: dict[str, Any]) -> None:
        assert not self.busy
        self._thread = threading.Thread(
            target=self._infer, args=(observation,), daemon=True, name="torchpi_client infer"
        )
        self._thread.start()

    def poll(self) -> Answer | None:
        return self.wait(0.0)

    def wait(self, seconds: float) -> Answer | None:
        if self._thread is None:
            return None
        self._thread.join(seconds)
        if self._thread.is_alive():
            return None
        answer, self._thread, self._answer = self._answer, None, None
        assert answer is not None
        return answer

    def _infer(self, observation: dict[str, Any]) -> None:
        try:
            self._answer = Answer(self._policy.infer(observation), None, self._clock.now())
        except Exception as error:  # the loop's thread raises or counts it
            self._answer = Answer(None, error, self._clock.now())
