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
    times = np.arange(steps + 1) * ratio  # in steps of the old rate
    source_times = np.arange(len(actions))
    out = np.empty((steps, actions.shape[1]), np.float32)
    for dim, command in enumerate(commands):
        if command == "position":
            out[:, dim] = np.interp(times[:-1], source_times, actions[:, dim])
        elif command == "effort":
            out[:, dim] = actions[(times[:-1] + 1e-9).astype(int), dim]
        else:
            positions = np.concatenate([[0.0], np.cumsum(actions[:, dim], dtype=np.float64)])
            increments = np.diff(np.interp(times, np.arange(len(positions)), positions))
            out[:, dim] = increments if command == "increment" else increments / ratio
    return out


def stretch(last: np.ndarray, action: np.ndarray, commands: Sequence[str], times: int) -> np.ndarray:
    """Split an action [a] into `times` steps with the same end result, float32 [times, a].

    Args:
        last: [a], the previous command.
        commands: per dimension, see `robot.COMMANDS`.
    """
    fractions = np.arange(1, times + 1)[:, None] / times
    is_position = np.array([command == "position" for command in commands])
    is_effort = np.array([command == "effort" for command in commands])
    moving = np.where(is_position, last + fractions * (action - last), action / times)
    return np.where(is_effort, action, moving).astype(np.float32)
