"""Time for the control loop; tests bring a clock of their own."""

from __future__ import annotations

import math
import time
from typing import NamedTuple, Protocol, runtime_checkable


@runtime_checkable
class Clock(Protocol):
    """Seconds from any beginning."""

    def now(self) -> float:
        """This moment."""
        ...

    def sleep_until(self, moment: float) -> None:
        """Return then; at once if it is past."""
        ...


class MonotonicClock:
    """The machine's clock, which nobody sets."""

    def now(self) -> float:
        """This moment."""
        return time.monotonic()

    def sleep_until(self, moment: float) -> None:
        """Return then; at once if it is past."""
        while (left := moment - time.monotonic()) > 0:
            time.sleep(left)


class Tick(NamedTuple):
    """The timing of a step."""

    overrun: float
    """Seconds by which it was longer than a period; 0: it was not."""
    missed: int
    """Steps that are left out because of it."""


class Pacer:
    """A fixed rate without drift: step n begins at start + n · period, however long the steps before took.

    After an overrun the next step begins at once if its time is at most half a period ago; otherwise it is left out.
    Never do two follow each other in less than half a period, to catch up.
    """

    def __init__(self, clock: Clock, period: float) -> None:
        self._clock = clock
        self._period = period
        self._start = clock.now()
        self._step = 0

    def wait(self) -> Tick:
        """Until the next step begins."""
        elapsed = (self._clock.now() - self._start) / self._period
        due = self._step + 1
        self._step = max(due, math.ceil(elapsed - 0.5 - 1e-9))
        self._clock.sleep_until(self._start + self._step * self._period)
        return Tick(max(elapsed - due, 0.0) * self._period, self._step - due)
