"""Actions at another rate, and slower."""

from __future__ import annotations

from typing import Sequence

import numpy as np


def resample(chunk: np.ndarray, kinds: Sequence[str], *, policy_hz: float, control_hz: float) -> np.ndarray:
    """The same motion, at the same speed, in steps of another length.

    Positions are interpolated, increments keep their sum, velocities their time average; an effort is the moment's.

    Args:
        chunk: [H, a]; action i is for the time from i/policy_hz on.
        kinds: of the dimensions, see `robot.ACTION_KINDS`.
        policy_hz, control_hz: actions per second, before and after.

    Returns:
        float32 [floor(H · control_hz / policy_hz), a].

    Raises:
        ValueError: not one whole action is left.
    """
    ratio = policy_hz / control_hz
    steps = int(len(chunk) / ratio + 1e-9)
    if steps < 1:
        raise ValueError(
            f"a chunk of {len(chunk)} actions at {policy_hz} Hz is shorter than one step at {control_hz} Hz"
        )
    times = np.arange(steps + 1) * ratio  # in actions of the chunk
    source = np.arange(len(chunk))
    out = np.empty((steps, chunk.shape[1]), np.float32)
    for dim, kind in enumerate(kinds):
        if kind == "position":
            out[:, dim] = np.interp(times[:-1], source, chunk[:, dim])
        elif kind == "effort":
            out[:, dim] = chunk[(times[:-1] + 1e-9).astype(int), dim]
        else:
            travelled = np.concatenate([[0.0], np.cumsum(chunk[:, dim], dtype=np.float64)])
            moved = np.diff(np.interp(times, np.arange(len(travelled)), travelled))
            out[:, dim] = moved if kind == "increment" else moved / ratio
    return out


def stretch(last: np.ndarray, action: np.ndarray, kinds: Sequence[str], times: int) -> np.ndarray:
    """One action in several steps, which together lead where it leads.

    Args:
        last: [a], the command before.
        action: [a].
        kinds: of the dimensions.
        times: n, the number of steps.

    Returns:
        float32 [n, a].
    """
    parts = np.arange(1, times + 1)[:, None] / times
    is_position = np.array([kind == "position" for kind in kinds])
    is_effort = np.array([kind == "effort" for kind in kinds])
    moving = np.where(is_position, last + parts * (action - last), action / times)
    return np.where(is_effort, action, moving).astype(np.float32)
