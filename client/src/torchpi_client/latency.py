"""Estimate of the control steps that pass until a chunk is there."""

from __future__ import annotations

import collections
import math


class LatencyEstimate:
    """A high quantile of the last latencies: a delay that is too small makes the robot jump, one that is too large only
    binds it longer to the last chunk."""

    def __init__(self, *, window: int = 10, quantile: float = 1.0) -> None:
        """Begin without any.

        Args:
            window: how many of the last latencies count.
            quantile: above 0 and up to 1; 1: the largest.

        Raises:
            ValueError: one is out of range.
        """
        if window < 1 or not 0 < quantile <= 1:
            raise ValueError(f"window is {window} and quantile {quantile}; expected at least 1, and above 0 up to 1.")
        self._last: collections.deque[float] = collections.deque(maxlen=window)
        self._quantile = quantile

    def add(self, seconds: float) -> None:
        """One more, from the observation until the chunk was there."""
        self._last.append(seconds)

    def steps(self, control_hz: float) -> int | None:
        """In control steps, rounded up: a chunk is looked for at the beginning of a step. None: nothing measured."""
        if not self._last:
            return None
        seconds = sorted(self._last)[math.ceil(self._quantile * len(self._last)) - 1]
        return math.ceil(seconds * control_hz - 1e-9)
