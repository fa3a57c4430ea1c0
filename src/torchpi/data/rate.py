"""Comparison of a dataset's frame rate with its robot's control rate, and resampling to another rate."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Num

from torchpi.errors import DatasetError
from torchpi.robots import Embodiment
from torchpi.robots.parts import COMMANDS

_SAME_RATE = 0.005
"""Relative difference below which two rates are considered equal, such as the camera rates 30 and 29.97."""


def same_rate(one: float | int, other: float | int) -> bool:
    """True if the difference of two rates makes none for a robot."""
    return abs(one - other) <= _SAME_RATE * max(one, other)


@dataclasses.dataclass(frozen=True)
class Resampling:
    """Resampling of episodes to another rate: nearest frames, and actions by their command.

    Positions and efforts are taken from the nearest frame: at any time the robot gets the command that it got then.
    Increments are summed and velocities averaged between consecutive frames, so that the robot moves as far.
    """

    recorded_fps: float | int
    fps: float | int
    commands: tuple[str, ...]
    """Command of each action dimension, see `ActionDim`."""

    def __post_init__(self) -> None:
        if not set(self.commands) <= set(COMMANDS):
            raise DatasetError(
                f"The commands are {', '.join(self.commands)}; expected one of {', '.join(COMMANDS)} for each action."
            )

    def frames(self, length: int) -> Int[np.ndarray, " T"]:
        """Frame numbers, in the recorded episode, of the resampled one."""
        step = self.recorded_fps / self.fps
        count = int((length - 1) / step + 1e-6) + 1
        return np.minimum(np.rint(np.arange(count) * step).astype(np.int64), length - 1)

    def actions(self, actions: Num[np.ndarray, "F a"]) -> Float[np.ndarray, "T a"]:
        """Resample the actions of an episode."""
        frames, step = self.frames(len(actions)), self.recorded_fps / self.fps
        start = np.arange(len(frames)) * step
        edges = np.stack([start, np.minimum(start + step, len(actions))])
        resampled = actions[frames].astype(np.result_type(actions, np.float32))  # partial sums are not whole numbers
        for i, command in enumerate(self.commands):
            if command in ("increment", "velocity"):
                # Cumulative motion before each recorded frame, interpolated linearly in between.
                motion = np.concatenate([[0.0], np.cumsum(actions[:, i], dtype=np.float64)])
                moved = np.diff(np.interp(edges, np.arange(len(motion)), motion), axis=0)[0]
                resampled[:, i] = moved if command == "increment" else moved / np.diff(edges, axis=0)[0]
        return resampled


def resampling_for(
    path: Path, recorded_fps: float | int, embodiment: Embodiment | None, fps: float | int | None
) -> Resampling | None:
    """The resampling of a dataset to `fps`, by default the recorded rate; None if it was recorded at this rate. An
    error if the rate is not the robot's control_hz, or if the command of an action is not known."""
    rate, hz = recorded_fps if fps is None else fps, None if embodiment is None else embodiment.control_hz
    if not 0 < rate < np.inf:
        raise DatasetError(f"fps is {rate}; expected a positive number of frames per second.")
    if embodiment is not None and hz is not None and not same_rate(rate, hz):
        read = "" if fps is None else f", read at {fps:g}"
        raise DatasetError(
            f"The dataset {path} has {recorded_fps:g} frames per second{read}, and embodiment '{embodiment.name}' acts "
            f"at {hz:g} Hz (control_hz): the robot would move at {hz / rate:.3g} times the recorded speed. Read "
            f"the dataset at the robot's rate, fps={hz:g}, or, if the robot acts at {rate:g} Hz, state this as "
            "control_hz in its embodiment (a JSON file)."
        )
    if same_rate(rate, recorded_fps):
        return None
    if embodiment is None:
        raise DatasetError(f"Reading at fps={rate:g} requires the robot's commands; give embodiment=, too.")
    if unstated := [action.name for action in embodiment.actions if action.command is None]:
        raise DatasetError(
            f"{path} can't be read at {rate:g} instead of {recorded_fps:g} frames per second: embodiment "
            f"'{embodiment.name}' doesn't state the command of {', '.join(unstated)}, which decides whether an action "
            f'is kept, averaged or summed. State "command", one of {", ".join(COMMANDS)}, for each of them.'
        )
    return Resampling(recorded_fps, rate, tuple(str(action.command) for action in embodiment.actions))


def check_increments(actions: Float[np.ndarray, "F a"], embodiment: Embodiment, fps: float | int) -> None:
    """Refuse summed increments that exceed the robot's limits."""
    for i, action in enumerate(embodiment.actions):
        low = -np.inf if action.low is None else action.low
        high = np.inf if action.high is None else action.high
        if action.command == "increment" and ((actions[:, i] < low) | (actions[:, i] > high)).any():
            raise DatasetError(
                f"At {fps:g} frames per second {action.name}, an increment, would be {actions[:, i].min():.4g} to "
                f"{actions[:, i].max():.4g}; embodiment '{embodiment.name}' takes {low:g} to {high:g}. Its robot has "
                "to act at the recorded rate."
            )


def with_rate(embodiment: Embodiment, fps: float | int) -> Embodiment:
    """The embodiment, with this control rate if it states none."""
    if embodiment.control_hz is not None:
        return embodiment
    return dataclasses.replace(embodiment, control_hz=int(fps) if fps == int(fps) else fps)


def rate_note(fps: float | int, recorded_fps: float | int, embodiment: Embodiment) -> str | None:
    """Description of the resampling of a dataset; None if it is read at the recorded rate."""
    if fps == recorded_fps:
        return None
    note = (
        f"read at {fps:g} instead of {recorded_fps:g} frames per second: the frames that are nearest in time, with "
        "their states and actions"
    )
    for command, operation in {"velocity": "averaged", "increment": "summed"}.items():
        if names := [action.name for action in embodiment.actions if action.command == command]:
            note += f"; {', '.join(names)} {operation} between them"
    return note
