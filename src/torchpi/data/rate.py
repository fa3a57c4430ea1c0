"""The rate of a dataset compared with that of its robot, and frames and actions at another one than was recorded."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Num

from torchpi.errors import DatasetError
from torchpi.robots import Embodiment
from torchpi.robots.parts import COMMANDS

_SAME_RATE = 0.005
"""Relative difference of two rates that are taken as one: 30 and 29.97, the rates of cameras."""


def same_rate(one: float | int, other: float | int) -> bool:
    """True if a robot would not tell these rates apart."""
    return abs(one - other) <= _SAME_RATE * max(one, other)


@dataclasses.dataclass(frozen=True)
class Resampling:
    """Another rate: the frames that are nearest to its times, and actions by their command.

    Positions and efforts are those of the frames: the robot is sent at any time what it was sent then. Increments are
    summed, and velocities averaged, from one time to the next, so that the robot moves as far.
    """

    recorded_fps: float | int
    fps: float | int
    commands: tuple[str, ...]
    """Of each dimension of the action, see `ActionDim`."""

    def __post_init__(self) -> None:
        if not set(self.commands) <= set(COMMANDS):
            raise DatasetError(
                f"The commands are {', '.join(self.commands)}; expected one of {', '.join(COMMANDS)} for each action."
            )

    def frames(self, length: int) -> Int[np.ndarray, " T"]:
        """The frames of an episode, numbers in the recorded one."""
        step = self.recorded_fps / self.fps
        count = int((length - 1) / step + 1e-6) + 1
        return np.minimum(np.rint(np.arange(count) * step).astype(np.int64), length - 1)

    def actions(self, actions: Num[np.ndarray, "F a"]) -> Float[np.ndarray, "T a"]:
        """The actions of an episode's frames."""
        frames, step = self.frames(len(actions)), self.recorded_fps / self.fps
        begin = np.arange(len(frames)) * step
        edges = np.stack([begin, np.minimum(begin + step, len(actions))])
        taken = actions[frames].astype(np.result_type(actions, np.float32))  # sums in proportion are no whole numbers
        for i, command in enumerate(self.commands):
            if command in ("increment", "velocity"):
                # The motion before each recorded frame, and, between two, in proportion to the time.
                motion = np.concatenate([[0.0], np.cumsum(actions[:, i], dtype=np.float64)])
                moved = np.diff(np.interp(edges, np.arange(len(motion)), motion), axis=0)[0]
                taken[:, i] = moved if command == "increment" else moved / np.diff(edges, axis=0)[0]
        return taken


def resampling_for(
    path: Path, recorded_fps: float | int, embodiment: Embodiment | None, fps: float | int | None
) -> Resampling | None:
    """The resampling of a dataset to `fps`, by default the recorded rate, which must be the robot's control_hz; None:
    it was recorded so."""
    rate, hz = recorded_fps if fps is None else fps, None if embodiment is None else embodiment.control_hz
    if not 0 < rate < np.inf:
        raise DatasetError(f"fps is {rate}; expected a positive number of frames per second.")
    if embodiment is not None and hz is not None and not same_rate(rate, hz):
        read = "" if fps is None else f", read at {fps:g}"
        raise DatasetError(
            f"The dataset {path} has {recorded_fps:g} frames per second{read}, and embodiment '{embodiment.name}' acts "
            f"at {hz:g} Hz (control_hz): the robot would move at {hz / rate:.3g} times the speed that was shown. Read "
            f"the dataset at the robot's rate, fps={hz:g}, or, if the robot acts at {rate:g} Hz, write that as "
            "control_hz in its embodiment (a JSON file)."
        )
    if same_rate(rate, recorded_fps):
        return None
    if embodiment is None:
        raise DatasetError(f"fps is {rate:g}, for which the robot has to be known; give embodiment=, too.")
    if unstated := [action.name for action in embodiment.actions if action.command is None]:
        raise DatasetError(
            f"{path} can't be read at {rate:g} instead of {recorded_fps:g} frames per second: embodiment "
            f"'{embodiment.name}' doesn't state the command of {', '.join(unstated)}, which decides whether an action "
            f'is taken as it is, averaged or summed. Write "command", one of {", ".join(COMMANDS)}, for each of them.'
        )
    return Resampling(recorded_fps, rate, tuple(str(action.command) for action in embodiment.actions))


def check_increments(actions: Float[np.ndarray, "F a"], embodiment: Embodiment, fps: float | int) -> None:
    """Refuse sums of increments that the robot can't be sent."""
    for i, action in enumerate(embodiment.actions):
        low, high = (np.inf * sign if limit is None else limit for sign, limit in ((-1, action.low), (1, action.high)))
        if action.command == "increment" and ((actions[:, i] < low) | (actions[:, i] > high)).any():
            raise DatasetError(
                f"At {fps:g} frames per second {action.name}, an increment, would be {actions[:, i].min():.4g} to "
                f"{actions[:, i].max():.4g}; embodiment '{embodiment.name}' takes {low:g} to {high:g}. Its robot has "
                "to act at the rate that was recorded."
            )


def with_rate(embodiment: Embodiment, fps: float | int) -> Embodiment:
    """The embodiment, with this rate where it states none."""
    if embodiment.control_hz is not None:
        return embodiment
    return dataclasses.replace(embodiment, control_hz=int(fps) if fps == int(fps) else fps)


def rate_note(fps: float | int, recorded_fps: float | int, embodiment: Embodiment) -> str | None:
    """A sentence about a dataset that is read at another rate than it was recorded with; None: it isn't."""
    if fps == recorded_fps:
        return None
    done = {"velocity": "averaged", "increment": "summed"}
    names = {command: [a.name for a in embodiment.actions if a.command == command] for command in done}
    changed = [f"; {', '.join(found)} {done[command]} between them" for command, found in names.items() if found]
    return (
        f"read at {fps:g} instead of {recorded_fps:g} frames per second: the frames that are nearest in time, with "
        f"their states and actions{''.join(changed)}"
    )
