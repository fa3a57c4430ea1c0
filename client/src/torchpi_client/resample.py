"""Actions at another rate, and slower."""

from __future__ import annotations

from typing import Sequence

import numpy as np


def resample(actions: np.ndarray, commands: Sequence[str], *, from_hz: float, to_hz: float) -> np.ndarray:
    """The same motion, at the same speed, in steps of another length.

    Positions are interpolated, increments keep their sum, velocities their time average; an effort is the moment's.

    Args:
        actions: [k, a]; action i is for the time from i/from_hz on.
        commands: of the dimensions, see `robot.COMMANDS`.
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
    """One action in several steps, which together lead where it leads.

    Args:
        last: [a], the command before.
        action: [a].
        commands: of the dimensions.
        times: n, the number of steps.

    Returns:
        float32 [n, a].
    """
    parts = np.arange(1, times + 1)[:, None] / times
    is_position = np.array([command == "position" for command in commands])
    is_effort = np.array([command == "effort" for command in commands])
    moving = np.where(is_position, last + parts * (action - last), action / times)
    return np.where(is_effort, action, moving).astype(np.float32)
