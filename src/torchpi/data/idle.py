"""Frames in which the robot does nothing: a policy that is trained on many of them learns to stand still."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from torchpi.data import format as lerobot
from torchpi.data.lerobot import LeRobotDataset
from torchpi.errors import DatasetError

# Encoders' noise is far below a hundredth of a joint's range, and what takes over 100 s for its range is no movement
# that a task needs.
IDLE_THRESHOLD = 0.01
# Shorter rests belong to a task: a gripper that closes, a hand that waits for a drawer to swing.
IDLE_SECONDS = 1.0


def idle_frames(
    dataset: LeRobotDataset, *, threshold: float = IDLE_THRESHOLD, seconds: float = IDLE_SECONDS
) -> Bool[np.ndarray, " F"]:
    """Mark idle frames: from each of them on, neither state nor action changes for a while.

    In no dimension of state or action may the smallest and the largest value of the `seconds` that begin with the frame
    differ by more than `threshold` × (q99 - q01) of that dimension in the dataset. So a robot that is commanded a
    constant velocity is not idle, because its state moves; and the last `seconds` before a movement are not idle,
    because they show how it begins. Near an episode's end its last `seconds` decide; in a shorter episode no frame is
    idle.

    A dimension that has nothing but noise never rests by this measure, because its range is the noise's.

    Args:
        threshold: in parts of the range of a dimension.
        seconds: the duration.

    Raises:
        ValueError: a threshold that is negative, or seconds that are not positive.
    """
    if threshold < 0 or seconds <= 0:
        raise DatasetError(f"Expected threshold ≥ 0 and seconds > 0, got {threshold} and {seconds}.")
    window = max(2, math.ceil(seconds * dataset.fps))  # within one frame nothing can change
    columns = [dataset.columns[name] for name in (lerobot.STATE, lerobot.ACTION)]  # [F, d]
    return np.logical_and(*(_still(values, threshold, window, dataset.episode_rows) for values in columns))


def _still(values: np.ndarray, threshold: float, window: int, episodes: Sequence[slice]) -> Bool[np.ndarray, " F"]:
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)  # [d]
    still = np.zeros(len(values), bool)
    for rows in episodes:
        length = rows.stop - rows.start
        if length >= window:
            windows = np.lib.stride_tricks.sliding_window_view(values[rows], window, axis=0)  # [T - w + 1, d, w]
            rests = (np.ptp(windows, axis=-1) <= threshold * (q99 - q01)).all(axis=1)  # [T - w + 1]
            still[rows] = rests[np.minimum(np.arange(length), length - window)]
    return still
