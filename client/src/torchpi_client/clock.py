"""Clock and pacing of the control loop; tests pass their own clock."""

from __future__ import annotations

import math
import time
from typing import NamedTuple, Protocol, runtime_checkable


@runtime_checkable
class Clock(Protocol):
    """A clock in seconds, with any origin."""

    def now(self) -> float:
        """The current time."""

    def sleep_until(self, moment: float) -> None:
        """Sleep until this time; return immediately if it has passed."""


class MonotonicClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def sleep_until(self, moment: float) -> None:
        while (remaining := moment - time.monotonic()) > 0:
            time.sleep(remaining)


class Tick(NamedTuple):
    """Timing of a step."""

    overrun: float
    """Seconds by which the step exceeded its period, or 0."""
    missed: int
    """Steps skipped because of the overrun."""


class Pacer:
    """Fixed rate without drift: step n begins at start + n · period, regardless of the duration of earlier steps.

    After an overrun the next step begins immediately if it is at most half a period late; otherwise it is skipped.
    Steps are always at least half a period apart: the loop never catches up in a burst.
    """

    def __init__(self, clock: Clock, period: float) -> None:
        self._clock = clock
        self._period = period
        self._start = clock.now()
        self._step = 0

    def wait(self) -> Tick:
        """Sleep until the next step begins."""
        elapsed = (self._clock.now() - self._start) / self._period
        due = self._step + 1
        self._step = max(due, math.ceil(elapsed - 0.5 - 1e-9))
        self._clock.sleep_until(self._start + self._step * self._period)
        return Tick(max(elapsed - due, 0.0) * self._period, self._step - due)
