"""Action schedules: the choice of the next action, without clock or threads.

Time is counted in executed actions. A request stores the current count, at which its chunk begins. While the robot is
held no action is executed, and the count does not change.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Request:
    """State of the schedule when a chunk is requested."""

    start: int
    """Number of actions executed so far: the time of the new chunk's first action."""
    rest: np.ndarray | None
    """[k, a], the rest of the chunk being executed, beginning at the same time; None if there is none."""
    executed: int
    """Number of actions before `rest` in that chunk, H − k."""


class ActionQueue:
    """Executes one chunk at a time, until the next replaces it.

    Args:
        execute_steps: s, the number of a chunk's actions executed before the next chunk is requested.
        drop_rest: never execute more than these.
    """

    def __init__(self, execute_steps: int, *, drop_rest: bool = False) -> None:
        self._execute_steps = execute_steps
        self._drop_rest = drop_rest
        self._num_executed = 0
        self._chunk: np.ndarray | None = None
        self._index = 0  # in the chunk

    @property
    def due(self) -> bool:
        """True when a chunk should be requested."""
        return self._chunk is None or self._index >= min(self._execute_steps, len(self._chunk))

    @property
    def empty(self) -> bool:
        """True if there is no next action."""
        return self._chunk is None or self._index >= len(self._chunk)

    def request(self) -> Request:
        """Register a request. The rest of the current chunk is copied: it is executed during the inference."""
        rest = None if self._chunk is None else self._chunk[self._index :].copy()
        return Request(self._num_executed, rest if rest is not None and len(rest) else None, self._index)

    def arrive(self, request: Request, chunk: np.ndarray) -> int | None:
        """Replace the current chunk by this one.

        Returns:
            The number of the new chunk's actions that are discarded: those executed since the request. None if that is
            all of them; then the chunk is refused, and the current one stays.
        """
        discarded = self._num_executed - request.start
        usable = chunk[: self._execute_steps] if self._drop_rest else chunk
        if discarded >= len(usable):
            return None
        self._chunk, self._index = usable, discarded
        return discarded

    def next(self) -> np.ndarray | None:
        """Take the next action [a], which then counts as executed; None if there is none."""
        if self._chunk is None or self._index >= len(self._chunk):
            return None
        self._index += 1
        self._num_executed += 1
        return self._chunk[self._index - 1]

    def clear(self) -> None:
        """Drop the rest of the chunk."""
        self._chunk = None


class Ensemble:
    """Temporal ensembling: each action is the weighted average of all chunks' predictions for its step.

    See https://arxiv.org/abs/2304.13705.

    Args:
        execute_steps: number of actions between two requests, if the policy is fast enough.
        decay: m; chunk i, counted from the oldest (0), has the weight exp(−m·i). Larger values favour old chunks,
            negative values new ones.
    """

    def __init__(self, execute_steps: int = 1, *, decay: float = 0.01) -> None:
        self._execute_steps = execute_steps
        self._decay = decay
        self._num_executed = 0
        self._last_request: int | None = None
        self._chunks: list[tuple[int, np.ndarray]] = []  # time of the first action, [H, a]; oldest first

    @property
    def due(self) -> bool:
        """True when a chunk should be requested."""
        if self._last_request is None or self.empty:
            return True
        return self._num_executed >= self._last_request + self._execute_steps

    @property
    def empty(self) -> bool:
        """True if there is no next action."""
        return not self._current_chunks()

    def request(self) -> Request:
        """Register a request."""
        self._last_request = self._num_executed
        return Request(self._num_executed, None, 0)

    def arrive(self, request: Request, chunk: np.ndarray) -> int | None:
        """Add this chunk.

        Returns:
            The number of its actions whose steps have passed. None if that is all of them; then the chunk is refused.
        """
        discarded = self._num_executed - request.start
        if discarded >= len(chunk):
            return None
        self._chunks.append((request.start, chunk))
        return discarded

    def next(self) -> np.ndarray | None:
        """Take the next action [a], which then counts as executed; None if there is none."""
        self._chunks = self._current_chunks()
        if not self._chunks:
            return None
        predictions = np.stack([chunk[self._num_executed - start] for start, chunk in self._chunks])
        weights = np.exp(-self._decay * np.arange(len(predictions)))
        self._num_executed += 1
        average: np.ndarray = (weights / weights.sum()) @ predictions
        return average.astype(np.float32)

    def clear(self) -> None:
        """Drop all chunks."""
        self._chunks = []

    def _current_chunks(self) -> list[tuple[int, np.ndarray]]:
        return [(start, chunk) for start, chunk in self._chunks if self._num_executed < start + len(chunk)]
