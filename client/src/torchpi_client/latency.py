"""Estimate of the inference latency in control steps."""

from __future__ import annotations

import collections
import math


class LatencyEstimate:
    """A high quantile of the last latencies: an underestimate makes the robot jump, an overestimate only keeps it on
    the previous chunk for longer."""

    def __init__(self, *, window: int = 10, quantile: float = 1.0) -> None:
        """Start without measurements.

        Args:
            window: the number of last latencies that count.
            quantile: above 0 and up to 1; 1: the largest.

        Raises:
            ValueError: an argument is out of range.
        """
        if window < 1 or not 0 < quantile <= 1:
            raise ValueError(f"window is {window} and quantile {quantile}; expected at least 1, and above 0 up to 1.")
        self._last: collections.deque[float] = collections.deque(maxlen=window)
        self._quantile = quantile

    def add(self, seconds: float) -> None:
        """Add a latency, from the observation to the arrival of its chunk."""
        self._last.append(seconds)

    def steps(self, control_hz: float) -> int | None:
        """The estimate in control steps, rounded up: chunks are received at the start of a step. None without any."""
        if not self._last:
            return None
        seconds = sorted(self._last)[math.ceil(self._quantile * len(self._last)) - 1]
        return math.ceil(seconds * control_hz - 1e-9)
