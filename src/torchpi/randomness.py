"""Random numbers that belong to a position in the work, not to a process: one process and many draw the same."""

import zlib

import numpy as np

from torchpi.errors import UsageError


def generator_at(seed: int, *position: int | str) -> np.random.Generator:
    """The generator of one place, for example `generator_at(seed, "noise", step, index)`.

    Args:
        seed: of the whole run, not negative.
        position: where: what is drawn, and the counters that say for which sample. Positions must not be negative.
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in (seed, *position)]
    if any(word < 0 for word in words):
        raise UsageError(f"seed and position must not be negative, got {(seed, *position)}.")
    return np.random.default_rng(words)
