"""Action schedules: the choice of the next action, without clock or threads.

The time axis is the number of actions executed since the beginning. A request stores its position on this axis, at
which its chunk begins. While the robot is held no action is executed, and the position does not change.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Request:
    """The state of the schedule when a chunk is requested."""

    start: int
    """Number of actions executed before: the position of the new chunk's first action."""
    rest: np.ndarray | None
    """[k, a], the rest of the chunk being executed, beginning at the same position; None: there is none."""
    executed: int
    """Number of actions before `rest` in that chunk, H − k."""


class ActionQueue:
    """Execution of one chunk at a time, until the next replaces it."""

    def __init__(self, execute_steps: int, *, only: bool = False) -> None:
        """Start without a chunk.

        Args:
            execute_steps: s, the number of a chunk's actions executed before the next chunk is requested.
            only: never execute more than these.
        """
        self._execute_steps = execute_steps
        self._only = only
        self._consumed = 0
        self._chunk: np.ndarray | None = None
        self._at = 0  # index in the chunk

    @property
    def due(self) -> bool:
        """True when a chunk should be requested."""
        return self._chunk is None or self._at >= min(self._execute_steps, len(self._chunk))

    def request(self) -> Request:
        """Register a request. The rest of the current chunk is copied: it is executed during the inference."""
        rest = None if self._chunk is None else self._chunk[self._at :].copy()
        return Request(self._consumed, rest if rest is not None and len(rest) else None, self._at)

    def arrive(self, request: Request, chunk: np.ndarray) -> int | None:
        """Replace the current chunk by this one.

        Returns:
            The number of its actions that are discarded, equal to the actions executed since the request. None: all of
            them; the chunk is refused, and the current one stays.
        """
        discarded = self._consumed - request.start
        usable = chunk[: self._execute_steps] if self._only else chunk
        if discarded >= len(usable):
            return None
        self._chunk, self._at = usable, discarded
        return discarded

    def next(self) -> np.ndarray | None:
        """Take the next action [a], which then counts as executed; None: there is none."""
        if self._chunk is None or self._at >= len(self._chunk):
            return None
        self._at += 1
        self._consumed += 1
        return self._chunk[self._at - 1]

    def clear(self) -> None:
        """Drop the rest of the chunk."""
        self._chunk = None


class Ensemble:
    """Temporal ensembling: each action is the weighted average of all chunks' predictions for its step
    (https://arxiv.org/abs/2304.13705)."""

    def __init__(self, execute_steps: int = 1, *, decay: float = 0.01) -> None:
        """Start without chunks.

        Args:
            execute_steps: the number of actions between two requests, if the policy is fast enough.
            decay: m; chunk i, counted from the oldest (0), has the weight exp(−m·i). Larger values favour old chunks,
                negative values new ones.
        """
        self._execute_steps = execute_steps
        self._decay = decay
        self._consumed = 0
        self._asked: int | None = None
        self._chunks: list[tuple[int, np.ndarray]] = []  # position of the first action, [H, a]; oldest first

    @property
    def due(self) -> bool:
        """True when a chunk should be requested."""
        return self._asked is None or self._consumed >= self._asked + self._execute_steps or not self._covering()

    def request(self) -> Request:
        """Register a request."""
        self._asked = self._consumed
        return Request(self._consumed, None, 0)

    def arrive(self, request: Request, chunk: np.ndarray) -> int | None:
        """Add this chunk.

        Returns:
            The number of its actions that are discarded, as their steps have passed; None: all, it is refused.
        """
        discarded = self._consumed - request.start
        if discarded >= len(chunk):
            return None
        self._chunks.append((request.start, chunk))
        return discarded

    def next(self) -> np.ndarray | None:
        """Take the next action [a], which then counts as executed; None: there is none."""
        self._chunks = self._covering()
        if not self._chunks:
            return None
        overlapping = np.stack([chunk[self._consumed - start] for start, chunk in self._chunks])
        weights = np.exp(-self._decay * np.arange(len(overlapping)))
        self._consumed += 1
        average: np.ndarray = (weights / weights.sum()) @ overlapping
        return average.astype(np.float32)

    def clear(self) -> None:
        """Drop all chunks."""
        self._chunks = []

    def _covering(self) -> list[tuple[int, np.ndarray]]:
        return [(start, chunk) for start, chunk in self._chunks if self._consumed < start + len(chunk)]
