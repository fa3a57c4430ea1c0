"""Guesses from a dataset's numbers: units of its dimensions, and what the robot does with an action.

They are for people to confirm, with the reason; nothing is computed with them.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

_GRIPPER = re.compile(r"grip|finger|jaw|claw", re.IGNORECASE)
_LENGTH = re.compile(r"(^|[._/ ])(eef?_|pos_|tcp_|hand_|delta_|d)?[xyz]([._](pos|m))?$", re.IGNORECASE)
_QUATERNION = re.compile(r"quat|(^|[._])q[wxyz]$", re.IGNORECASE)
_SPEED = re.compile(r"vel|speed", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Guess:
    """A guessed value, and why."""

    value: str
    """Empty: no guess."""
    reason: str
    certain: bool = True
    """False: something else is possible as well."""


def is_gripper(name: str) -> bool:
    """True for the name of a gripper's dimension."""
    return bool(_GRIPPER.search(name))


def guess_units(names: Sequence[str], low: Float[np.ndarray, " d"], high: Float[np.ndarray, " d"]) -> list[Guess]:
    """The units of dimensions, by their names and ranges; joints are taken to have the same one."""
    largest = np.maximum(np.abs(low), np.abs(high))
    kinds = [next((kind for kind in (_GRIPPER, _QUATERNION, _LENGTH) if kind.search(name)), None) for name in names]
    joints = [i for i, kind in enumerate(kinds) if kind is None]
    joint = _joint_unit(float(largest[joints].max())) if joints else Guess("", "")
    guesses = []
    for name, kind, value, lowest in zip(names, kinds, largest.tolist(), low.tolist(), strict=True):
        guess = joint
        if kind is _GRIPPER:
            guess = _gripper_unit(value, lowest, joint)
        elif kind is _QUATERNION:
            guess = Guess("quaternion", "named so")
        elif kind is _LENGTH:
            guess = (
                Guess("m", f"a position up to {value:.3g}", value < 3)
                if value < 10
                else Guess("mm", f"up to {value:.3g}", False)
            )
        if _SPEED.search(name) and guess.value:
            guess = Guess(f"{guess.value}/s", f"named a speed, {guess.reason}", False)
        guesses.append(guess)
    return guesses


def _joint_unit(largest: float) -> Guess:
    if largest <= 1.02:
        return Guess("rad", f"joints up to {largest:.3g}; normalized -1 to 1 as well", False)
    if largest <= 6.6:
        return Guess("rad", f"joints up to {largest:.3g}, within 2π")
    if largest <= 100.5:
        return Guess("deg", f"joints up to {largest:.3g}; LeRobot's normalized -100 to 100 as well", False)
    if largest <= 400:
        return Guess("deg", f"joints up to {largest:.3g}")
    return Guess("", f"values up to {largest:.4g}: counts of a motor's encoder?", False)


def _gripper_unit(largest: float, low: float, joint: Guess) -> Guess:
    if largest <= 0.15:
        return Guess("m", f"an opening up to {largest:.3g}", False)
    if largest <= 1.05:
        return Guess("opening, 0 to 1" if low > -0.2 else "-1 to 1", f"a gripper up to {largest:.3g}", False)
    if 6.6 < largest <= 101 and low > -5:
        return Guess("opening, 0 to 100", f"a gripper up to {largest:.3g}, LeRobot's unit", largest > 50)
    return dataclasses.replace(joint, certain=False)


def guess_command(
    action: Float[np.ndarray, " F"], state: Float[np.ndarray, " F"], inside: Int[np.ndarray, " n"], fps: float | int
) -> Guess:
    """The command of an action's dimension, by the state's dimension that it moves.

    Args:
        inside: the frames that have a next one in their episode.
    """
    if len(inside) < 2:
        return Guess("", "there are no two frames to compare", False)
    following, change = state[inside + 1], state[inside + 1] - state[inside]
    value = action[inside]
    if not (np.ptp(value) and np.ptp(following) and np.ptp(change)):
        return Guess("", "it does not move in this dataset", False)
    position, motion = (float(np.corrcoef(value, other)[0, 1]) for other in (following, change))
    if position > 0.9 and abs(float(np.mean(value - following))) < 0.25 * float(np.ptp(following)):
        return Guess("position", f"it is near the next state (correlation {position:.2f})", position > 0.97)
    if motion > 0.6:
        slope = float(value @ change / (value @ value))  # change of the state per unit of the action
        reason = f"it goes with the state's change (correlation {motion:.2f}), which is {slope:.3g} times the action"
        if 0.6 < slope < 1.5:
            return Guess("increment", reason, False)
        if 0.6 < slope * fps < 1.5:
            return Guess("velocity", reason, False)
        return Guess("", f"{reason}: an increment or a velocity, scaled?", False)
    return Guess("", f"neither the state (correlation {position:.2f}) nor its change ({motion:.2f}) follows it", False)


def unit_of_action(unit: Guess, command: Guess) -> Guess:
    """The unit of an action, which is the position's only where the action is one."""
    if command.value == "velocity":
        return Guess(
            f"{unit.value}/s" if unit.value and not unit.value.endswith("/s") else unit.value, unit.reason, False
        )
    if "scaled" in command.reason:
        return Guess("", "not the state's: the action is scaled", False)
    return unit
