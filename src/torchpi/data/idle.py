"""Idle frames, in which the robot does nothing. A policy trained on many of them learns to stand still."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from torchpi.data import format as lerobot
from torchpi.data.lerobot import LeRobotDataset
from torchpi.errors import DatasetError

# Encoder noise is far below 1 % of a joint's range, and no task needs a movement that takes over 100 s for the range.
IDLE_THRESHOLD = 0.01
# Shorter pauses are part of a task: a gripper closes, or the arm waits for a drawer to stop moving.
IDLE_SECONDS = 1.0


def idle_frames(
    dataset: LeRobotDataset, *, threshold: float = IDLE_THRESHOLD, seconds: float = IDLE_SECONDS
) -> Bool[np.ndarray, " F"]:
    """Mark frames after which neither state nor action changes for a while.

    A frame is idle if, during the `seconds` that start with it, no dimension of state or action varies by more than
    `threshold` × (q99 - q01) of that dimension over the dataset. Hence a robot under a constant velocity command is not
    idle, because its state moves; and the last `seconds` before a movement are not idle, because they show its start.
    Near the end of an episode its last `seconds` decide; episodes shorter than that have no idle frames.

    A dimension that contains only noise is never idle, because its range is that of the noise.

    Args:
        threshold: largest variation, as a fraction of a dimension's range.
        seconds: duration.

    Raises:
        ValueError: the threshold is negative, or seconds is not positive.
    """
    if threshold < 0 or seconds <= 0:
        raise DatasetError(f"Expected threshold ≥ 0 and seconds > 0, got {threshold} and {seconds}.")
    window = max(2, math.ceil(seconds * dataset.fps))  # a single frame never varies
    columns = [dataset.columns[name] for name in (lerobot.STATE, lerobot.ACTION)]  # [F, d]
    return np.logical_and(*(_still(values, threshold, window, dataset.episode_rows) for values in columns))


def _still(values: np.ndarray, threshold: float, window: int, episodes: Sequence[slice]) -> Bool[np.ndarray, " F"]:
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)  # [d]
    still = np.zeros(len(values), bool)
    for rows in episodes:
        length = rows.stop - rows.start
        if length >= window:
            windows = np.lib.stride_tricks.sliding_window_view(values[rows], window, axis=0)  # [T - w + 1, d, w]
            is_still = (np.ptp(windows, axis=-1) <= threshold * (q99 - q01)).all(axis=1)  # [T - w + 1]
            still[rows] = is_still[np.minimum(np.arange(length), length - window)]
    return still
