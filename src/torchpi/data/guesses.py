"""Guesses from a dataset's numbers: units of its dimensions, and what the robot does with an action.

They are for people to confirm, with the reason; nothing is computed with them.
"""

import dataclasses
import re
import tomllib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from torchpi.assets import assets

_KINDS = {
    "gripper": re.compile(r"grip|finger|jaw|claw", re.IGNORECASE),
    "quaternion": re.compile(r"quat|(^|[._])q[wxyz]$", re.IGNORECASE),
    "length": re.compile(r"(^|[._/ ])(eef?_|pos_|tcp_|hand_|delta_|d)?[xyz]([._](pos|m))?$", re.IGNORECASE),
}
"""Names of dimensions; others are joints."""
OTHER_UNIT = "it goes with the state in another unit"
"""The reason of a guess for such an action."""
OTHER_SCALE = 20.0
"""An action and its state don't differ by this factor on a robot that goes where it is sent; rad and degrees by 57."""
_SPEED = re.compile(r"vel|speed", re.IGNORECASE)
_UNITS = tomllib.loads((assets() / "units.toml").read_text(encoding="utf-8"))
"""Of each kind the units with the ranges that they need, a reason, and whether it is certain; the first that fits."""


@dataclasses.dataclass(frozen=True)
class Guess:
    """A guessed value, and why."""

    value: str
    """Empty: no guess."""
    reason: str
    certain: bool = False
    """False: something else is possible as well."""

    def __str__(self) -> str:
        return f"{self.value or 'unknown'}: {self.reason}"


def is_gripper(name: str) -> bool:
    return bool(_KINDS["gripper"].search(name))


def guess_units(names: Sequence[str], low: Float[np.ndarray, " d"], high: Float[np.ndarray, " d"]) -> list[Guess]:
    """The units of dimensions, by their names and ranges; joints are taken to have the same one."""
    kinds = [next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), "joint") for name in names]
    joints = [i for i, kind in enumerate(kinds) if kind == "joint"]

    def guess(kind: str, dims: Sequence[int]) -> Guess:
        least, most = float(low[dims].min()), float(high[dims].max())
        unit, reason, is_certain = next(rule[2:] for rule in _UNITS[kind] if rule[0] <= least and most <= rule[1])
        return Guess(unit, f"from {least:.4g} to {most:.4g}: {reason}", is_certain)

    guesses = [guess(kind, joints if kind == "joint" else [i]) for i, kind in enumerate(kinds)]
    for i, (name, kind, found) in enumerate(zip(names, kinds, guesses, strict=True)):
        if kind == "gripper" and not found.value:  # a joint as the others
            guesses[i] = found = dataclasses.replace(guess("joint", joints or [i]), certain=False)
        if _SPEED.search(name) and found.value:
            guesses[i] = Guess(f"{found.value}/s", f"named a speed, {found.reason}")
    return guesses


def differ_in_unit(action: Float[np.ndarray, " F"], state: Float[np.ndarray, " F"]) -> bool:
    """True for an action that goes with its state at another scale."""
    moves = float(action.std(dtype=np.float64)), float(state.std(dtype=np.float64))
    if min(moves) < 1e-6 or max(moves) < OTHER_SCALE * min(moves):
        return False
    return bool(np.corrcoef(action, state)[0, 1] >= 0.8)


def guess_command(
    action: Float[np.ndarray, " F"], state: Float[np.ndarray, " F"], inside: Int[np.ndarray, " n"], fps: float | int
) -> Guess:
    """The command of an action's dimension, by the state's dimension that it moves; `inside`: the frames that have a
    next one in their episode."""
    value, following, change = action[inside], state[inside + 1], state[inside + 1] - state[inside]
    if len(inside) < 2 or not (np.ptp(value) and np.ptp(following) and np.ptp(change)):
        return Guess("", "it does not move in this dataset")
    if differ_in_unit(action, state):
        return Guess("", OTHER_UNIT)
    position, motion = (float(np.corrcoef(value, other)[0, 1]) for other in (following, change))
    if position > 0.9 and abs(float(np.mean(value - following))) < 0.25 * float(np.ptp(following)):
        return Guess("position", f"it is near the next state (correlation {position:.2f})", position > 0.97)
    if motion <= 0.6:
        return Guess("", f"neither the state (correlation {position:.2f}) nor its change ({motion:.2f}) follows it")
    slope = float(value @ change / (value @ value))  # change of the state per unit of the action
    reason = f"it goes with the state's change (correlation {motion:.2f}), which is {slope:.3g} times the action"
    for command, scale in (("increment", slope), ("velocity", slope * fps)):
        if 0.6 < scale < 1.5:
            return Guess(command, reason)
    return Guess("", f"{reason}: an increment or a velocity, scaled?")


def unit_of_action(unit: Guess, command: Guess) -> Guess:
    """The unit of an action, which is the position's only where the action is one."""
    if command.value == "velocity":
        return Guess(f"{unit.value.removesuffix('/s')}/s" if unit.value else "", unit.reason)
    if "scaled" in command.reason:
        return Guess("", "not the state's: the action is scaled")
    return unit if command.value else dataclasses.replace(unit, certain=False)
