"""Estimate of the inference latency in control steps."""

from __future__ import annotations

import collections
import math


class LatencyEstimate:
    """A high quantile of the last latencies.

    An underestimate makes the robot jump, while an overestimate only keeps it on the previous chunk for longer.

    Args:
        window: number of last latencies to use.
        quantile: above 0 and up to 1, the largest latency.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, window: int = 10, quantile: float = 1.0) -> None:
        if window < 1 or not 0 < quantile <= 1:
            raise ValueError(f"window is {window} and quantile {quantile}; expected at least 1, and above 0 up to 1.")
        self._latencies: collections.deque[float] = collections.deque(maxlen=window)
        self._quantile = quantile

    def add(self, seconds: float) -> None:
        """Add a latency, from the observation to the arrival of its chunk."""
        self._latencies.append(seconds)

    def steps(self, control_hz: float) -> int | None:
        """Estimate in control steps, rounded up: chunks are received at the start of a step. None without latencies."""
        if not self._latencies:
            return None
        seconds = sorted(self._latencies)[math.ceil(self._quantile * len(self._latencies)) - 1]
        return math.ceil(seconds * control_hz - 1e-9)
