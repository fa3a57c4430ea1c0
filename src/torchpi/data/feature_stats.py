"""The statistics inside of a data set, per episode and for all of it, in LeRobot's layout.

torchpi itself reads none of them (see `torchpi.data.stats`): those of other writers are not always what they say.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Num, UInt8

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_NAMES = ("min", "max", "mean", "std", "count", *_QUANTILES)  # in LeRobot's order
# Images are counted at every n-th row and column, so that a large camera takes no longer than one of this height.
_COUNTED_HEIGHT = 128


def number_stats(values: Num[np.ndarray, "F d"]) -> dict[str, list[Any]]:
    """Exact statistics of a numeric feature, one value per dimension."""
    exact = np.asarray(values, np.float64)
    quantiles = np.quantile(exact, list(_QUANTILES.values()), axis=0)
    return {
        "min": exact.min(axis=0).tolist(),
        "max": exact.max(axis=0).tolist(),
        "mean": exact.mean(axis=0).tolist(),
        "std": exact.std(axis=0).tolist(),
        "count": [len(exact)],
        **{name: row.tolist() for name, row in zip(_QUANTILES, quantiles, strict=True)},
    }


def image_histogram(image: UInt8[np.ndarray, "h w 3"]) -> Int64[np.ndarray, "3 256"]:
    """How often each value occurs in each channel; histograms of several images can be added."""
    step = max(1, image.shape[0] // _COUNTED_HEIGHT)
    thinned = image[::step, ::step]
    return np.stack([np.bincount(thinned[..., channel].ravel(), minlength=256) for channel in range(3)])


def image_stats(histogram: Int64[np.ndarray, "3 256"], num_frames: int) -> dict[str, list[Any]]:
    """Statistics of a camera in [0, 1], each [3, 1, 1], from the sum of its images' histograms."""
    channels = [_channel_stats(counts) for counts in histogram]
    return {name: [num_frames] if name == "count" else [[[channel[name]]] for channel in channels] for name in _NAMES}


def _channel_stats(counts: np.ndarray) -> dict[str, float]:
    levels = np.arange(256) / 255
    total = int(counts.sum())
    mean = float(counts @ levels) / total
    seen = np.flatnonzero(counts)
    return {
        "min": float(levels[seen[0]]),
        "max": float(levels[seen[-1]]),
        "mean": mean,
        "std": float(np.sqrt(counts @ (levels - mean) ** 2 / total)),
        **{name: float(levels[_quantile_level(counts, q)]) for name, q in _QUANTILES.items()},
    }


def _quantile_level(counts: np.ndarray, q: float) -> int:
    return int(np.searchsorted(np.cumsum(counts), q * counts.sum()))


def summed(histograms: Sequence[Any]) -> Int64[np.ndarray, "3 256"]:
    """The histogram of all images together."""
    return np.sum(np.asarray(histograms, np.int64), axis=0)
