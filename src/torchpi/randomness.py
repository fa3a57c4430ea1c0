"""Random generators keyed by position (seed, step, sample), so that results don't depend on the number of processes."""

import zlib
from typing import Any

import numpy as np

from torchpi.errors import UsageError, is_whole


def checked_seed(seed: Any, *, below: int = 2**64) -> int:
    """Check the seed of a run: a whole number from 0 to `below` - 1 (PyTorch's generators take 64 bits)."""
    if not is_whole(seed) or not 0 <= seed < below:
        raise UsageError(f"The seed is {seed!r:.80}; expected a whole number from 0 to {below - 1}.")
    return int(seed)


def generator_at(seed: int, *position: int | str) -> np.random.Generator:
    """Create the generator of one position, for example `generator_at(seed, "noise", step, index)`.

    Args:
        seed: seed of the run, see `checked_seed`.
        position: purpose and non-negative counters that identify the sample.
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in position]
    if any(word < 0 for word in words):
        raise UsageError(f"A position must not be negative, got {position}.")
    return np.random.default_rng([checked_seed(seed), *words])
