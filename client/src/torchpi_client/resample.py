"""Resampling of actions to another rate, and slower execution."""

from __future__ import annotations

from typing import Sequence

import numpy as np


def resample(actions: np.ndarray, commands: Sequence[str], *, from_hz: float, to_hz: float) -> np.ndarray:
    """Resample actions to another rate: the same motion at the same speed.

    Positions are interpolated, increments keep their sum, velocities their time average; efforts are sampled.

    Args:
        actions: [k, a]; action i begins at time i/from_hz.
        commands: per dimension, see `robot.COMMANDS`.
        from_hz, to_hz: actions per second, before and after.

    Returns:
        float32 [floor(k · to_hz / from_hz), a].
    """
    ratio = from_hz / to_hz
    steps = int(len(actions) / ratio + 1e-9)
    times = np.arange(steps + 1) * ratio  # in the old steps
    source = np.arange(len(actions))
    out = np.empty((steps, actions.shape[1]), np.float32)
    for dim, command in enumerate(commands):
        if command == "position":
            out[:, dim] = np.interp(times[:-1], source, actions[:, dim])
        elif command == "effort":
            out[:, dim] = actions[(times[:-1] + 1e-9).astype(int), dim]
        else:
            travelled = np.concatenate([[0.0], np.cumsum(actions[:, dim], dtype=np.float64)])
            moved = np.diff(np.interp(times, np.arange(len(travelled)), travelled))
            out[:, dim] = moved if command == "increment" else moved / ratio
    return out


def stretch(last: np.ndarray, action: np.ndarray, commands: Sequence[str], times: int) -> np.ndarray:
    """Split one action into several steps with the same end result.

    Args:
        last: [a], the previous command.
        action: [a].
        commands: per dimension.
        times: n, the number of steps.

    Returns:
        float32 [n, a].
    """
    parts = np.arange(1, times + 1)[:, None] / times
    is_position = np.array([command == "position" for command in commands])
    is_effort = np.array([command == "effort" for command in commands])
    moving = np.where(is_position, last + parts * (action - last), action / times)
    return np.where(is_effort, action, moving).astype(np.float32)
