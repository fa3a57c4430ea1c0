"""Inference beside the control loop: one request at a time, in a thread."""

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
    """The policy's answer; None: there is an error."""
    error: Exception | None
    finished: float
    """On the loop's clock."""


@runtime_checkable
class Inference(Protocol):
    """One request at a time."""

    @property
    def busy(self) -> bool:
        """True while there is a request whose answer was not taken yet."""
        ...

    def start(self, observation: dict[str, Any]) -> None:
        """Ask; only while not busy."""
        ...

    def poll(self) -> Answer | None:
        """Take the answer; None: it is not there yet."""
        ...

    def wait(self, seconds: float) -> Answer | None:
        """Take the answer when it is there; None: it is not, after so many seconds."""
        ...


class BackgroundInference:
    """`Inference` in threads, which end with the program."""

    def __init__(self, policy: InferringPolicy, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._answer: Answer | None = None

    @property
    def busy(self) -> bool:
        """True while there is a request whose answer was not taken yet."""
        return self._thread is not None

    def start(self, observation: dict[str, Any]) -> None:
        """Ask; only while not busy."""
        assert not self.busy
        self._thread = threading.Thread(
            target=self._infer, args=(observation,), daemon=True, name="torchpi_client infer"
        )
        self._thread.start()

    def poll(self) -> Answer | None:
        """Take the answer; None: it is not there yet."""
        return self.wait(0.0)

    def wait(self, seconds: float) -> Answer | None:
        """Take the answer when it is there; None: it is not, after so many seconds."""
        if self._thread is None:
            return None
        self._thread.join(seconds)
        if self._thread.is_alive():
            return None
        answer, self._thread, self._answer = self._answer, None, None
        assert answer is not None
        return answer

    def _infer(self, observation: dict[str, Any]) -> None:
        content, problem = None, None
        try:
            content = self._policy.infer(observation)
        except Exception as error:  # raised again, or counted, in the loop's thread
            problem = error
        self._answer = Answer(content, problem, self._clock.now())
