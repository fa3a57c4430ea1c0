"""Random numbers that belong to a position in the work, not to a process: one process and many draw the same."""

import zlib
from typing import Any

import numpy as np

from torchpi.errors import UsageError, is_whole


def checked_seed(seed: Any, *, below: int = 2**64) -> int:
    """The seed of a whole run, where it is a whole number that the generators take: PyTorch's have 64 bits."""
    if not is_whole(seed) or not 0 <= seed < below:
        raise UsageError(f"The seed is {seed!r:.80}; expected a whole number from 0 to {below - 1}.")
    return int(seed)


def generator_at(seed: int, *position: int | str) -> np.random.Generator:
    """The generator of one place, for example `generator_at(seed, "noise", step, index)`.

    Args:
        seed: of the whole run, see `checked_seed`.
        position: where: what is drawn, and the counters that say for which sample. Positions must not be negative.
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in position]
    if any(word < 0 for word in words):
        raise UsageError(f"A position must not be negative, got {position}.")
    return np.random.default_rng([checked_seed(seed), *words])
