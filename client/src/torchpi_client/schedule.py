"""The choice of the next action. No clock and no thread: only actions that were really executed count.

Everything is counted on one axis, the actions that were executed since the beginning. A request remembers where on it
the robot was when it observed; the chunk that comes back belongs there. While the robot holds, nothing is executed, and
the axis stands still.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Request:
    """The moment at which a chunk was asked for."""

    start: int
    """Actions executed until then: the chunk's first action takes this place."""
    rest: np.ndarray | None
    """[k, a], what was left of the chunk under execution, in which action 0 takes the same place; None: nothing."""
    executed: int
    """Actions before `rest` in that chunk, H − k."""


class ActionQueue:
    """One chunk at a time, until the next replaces it."""

    def __init__(self, execute_steps: int, *, only: bool = False) -> None:
        """Begin without a chunk.

        Args:
            execute_steps: s, how many of a chunk's actions are executed before the next chunk is asked for.
            only: no more than these are executed, ever.
        """
        self._execute_steps = execute_steps
        self._only = only
        self._consumed = 0
        self._chunk: np.ndarray | None = None
        self._at = 0  # in the chunk

    @property
    def due(self) -> bool:
        """True when it is time to ask for a chunk."""
        return self._chunk is None or self._at >= min(self._execute_steps, len(self._chunk))

    def request(self) -> Request:
        """Note that a chunk is asked for now. What is left is cut here: the rest of it will be executed meanwhile."""
        rest = None if self._chunk is None else self._chunk[self._at :].copy()
        return Request(self._consumed, rest if rest is not None and len(rest) else None, self._at)

    def arrive(self, request: Request, chunk: np.ndarray) -> int | None:
        """Go on with this chunk.

        Returns:
            How many of its actions are discarded, because their places are taken: as many as were executed since the
            request. None: that is all of it; it is refused, and what is left of the last chunk stays.
        """
        discarded = self._consumed - request.start
        usable = chunk[: self._execute_steps] if self._only else chunk
        if discarded >= len(usable):
            return None
        self._chunk, self._at = usable, discarded
        return discarded

    def next(self) -> np.ndarray | None:
        """The next action [a], which counts as executed; None: there is none."""
        if self._chunk is None or self._at >= len(self._chunk):
            return None
        self._at += 1
        self._consumed += 1
        return self._chunk[self._at - 1]

    def clear(self) -> None:
        """Forget what is left of the chunk."""
        self._chunk = None


class Ensemble:
    """Temporal ensembling: each action is the weighted average of what all chunks say for its place
    (https://arxiv.org/abs/2304.13705)."""

    def __init__(self, execute_steps: int = 1, *, decay: float = 0.01) -> None:
        """Begin without chunks.

        Args:
            execute_steps: how many actions are executed between two requests, if the policy is as fast.
            decay: m: of the chunks from the oldest, number 0, to the newest, number i weighs exp(−m·i). Larger: more
                weight for old chunks; negative: for new ones.
        """
        self._execute_steps = execute_steps
        self._decay = decay
        self._consumed = 0
        self._asked: int | None = None
        self._chunks: list[tuple[int, np.ndarray]] = []  # place of the first action, [H, a]; oldest first

    @property
    def due(self) -> bool:
        """True when it is time to ask for a chunk."""
        return self._asked is None or self._consumed >= self._asked + self._execute_steps or not self._covering()

    def request(self) -> Request:
        """Note that a chunk is asked for now."""
        self._asked = self._consumed
        return Request(self._consumed, None, 0)

    def arrive(self, request: Request, chunk: np.ndarray) -> int | None:
        """Take this chunk in.

        Returns:
            How many of its actions are discarded, because their places are taken; None: all of it, it is refused.
        """
        discarded = self._consumed - request.start
        if discarded >= len(chunk):
            return None
        self._chunks.append((request.start, chunk))
        return discarded

    def next(self) -> np.ndarray | None:
        """The next action [a], which counts as executed; None: there is none."""
        self._chunks = self._covering()
        if not self._chunks:
            return None
        overlapping = np.stack([chunk[self._consumed - start] for start, chunk in self._chunks])
        weights = np.exp(-self._decay * np.arange(len(overlapping)))
        self._consumed += 1
        average: np.ndarray = (weights / weights.sum()) @ overlapping
        return average.astype(np.float32)

    def clear(self) -> None:
        """Forget all chunks."""
        self._chunks = []

    def _covering(self) -> list[tuple[int, np.ndarray]]:
        return [(start, chunk) for start, chunk in self._chunks if self._consumed < start + len(chunk)]
