"""Guesses from a dataset's numbers: the units of its dimensions and the commands of its actions.

Each guess comes with its reason, for a person to confirm; nothing is computed from guesses.
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
"""Patterns of the dimensions' names by kind; all others are joints."""
OTHER_UNIT = "it follows the state in another unit"
"""Reason given when action and state seem to have different units."""
OTHER_SCALE = 20.0
"""Ratio of scales from which two units are assumed. Radians and degrees differ by 57; an action and the state that
follows it never differ by this much in one unit."""
_SPEED = re.compile(r"vel|speed", re.IGNORECASE)
_UNITS = tomllib.loads((assets() / "units.toml").read_text(encoding="utf-8"))
"""Rules by kind: range, unit, reason and certainty. The first rule whose range holds the values applies."""


@dataclasses.dataclass(frozen=True)
class Guess:
    """A guessed value, and why."""

    value: str
    """Empty if nothing could be guessed."""
    reason: str
    certain: bool = False
    """False if other values are possible as well."""

    def __str__(self) -> str:
        return f"{self.value or 'unknown'}: {self.reason}"


def is_gripper(name: str) -> bool:
    return bool(_KINDS["gripper"].search(name))


def guess_units(names: Sequence[str], low: Float[np.ndarray, " d"], high: Float[np.ndarray, " d"]) -> list[Guess]:
    """Guess the units of dimensions from their names and ranges. All joints are assumed to share one unit."""
    kinds = [next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), "joint") for name in names]
    joints = [i for i, kind in enumerate(kinds) if kind == "joint"]

    def guess(kind: str, dims: Sequence[int]) -> Guess:
        lowest, highest = float(low[dims].min()), float(high[dims].max())
        for rule_low, rule_high, unit, reason, is_certain in _UNITS[kind]:
            if rule_low <= lowest and highest <= rule_high:
                return Guess(unit, f"from {lowest:.4g} to {highest:.4g}: {reason}", is_certain)
        raise AssertionError(f"the last rule of {kind} has an infinite range")

    guesses = []
    for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        unit = guess(kind, joints if kind == "joint" else [i])
        if kind == "gripper" and not unit.value:  # probably driven like a joint
            unit = dataclasses.replace(guess("joint", joints or [i]), certain=False)
        if _SPEED.search(name) and unit.value:
            unit = Guess(f"{unit.value}/s", f"named a speed, {unit.reason}")
        guesses.append(unit)
    return guesses


def differ_in_unit(action: Float[np.ndarray, " F"], state: Float[np.ndarray, " F"]) -> bool:
    """True if an action follows its state at another scale."""
    stds = float(action.std(dtype=np.float64)), float(state.std(dtype=np.float64))
    if min(stds) < 1e-6 or max(stds) < OTHER_SCALE * min(stds):
        return False
    return bool(np.corrcoef(action, state)[0, 1] >= 0.8)


def guess_command(
    action: Float[np.ndarray, " F"], state: Float[np.ndarray, " F"], frames: Int[np.ndarray, " n"], fps: float | int
) -> Guess:
    """Guess the command of an action's dimension from the state's dimension that it moves, over all `frames` that have
    a next frame in their episode."""
    value, next_state = action[frames], state[frames + 1]
    change = next_state - state[frames]
    if len(frames) < 2 or not (np.ptp(value) and np.ptp(next_state) and np.ptp(change)):
        return Guess("", "it does not move in this dataset")
    if differ_in_unit(action, state):
        return Guess("", OTHER_UNIT)
    position, motion = (float(np.corrcoef(value, other)[0, 1]) for other in (next_state, change))
    if position > 0.9 and abs(float(np.mean(value - next_state))) < 0.25 * float(np.ptp(next_state)):
        return Guess("position", f"it is near the next state (correlation {position:.2f})", position > 0.97)
    if motion <= 0.6:
        return Guess("", f"neither the state (correlation {position:.2f}) nor its change ({motion:.2f}) follows it")
    slope = float(value @ change / (value @ value))  # change of the state per unit of the action
    reason = f"it correlates with the state's change (correlation {motion:.2f}), which is {slope:.3g} times the action"
    for command, scale in (("increment", slope), ("velocity", slope * fps)):
        if 0.6 < scale < 1.5:
            return Guess(command, reason)
    return Guess("", f"{reason}: an increment or a velocity, scaled?")


def unit_of_action(unit: Guess, command: Guess) -> Guess:
    """The unit of an action, from the unit of its position and its command."""
    if command.value == "velocity":
        return Guess(f"{unit.value.removesuffix('/s')}/s" if unit.value else "", unit.reason)
    if "scaled" in command.reason:
        return Guess("", "not the state's: the action is scaled")
    if not command.value and unit.reason.endswith("a position"):  # it may be a motion instead
        return Guess("", f"{unit.reason} in {unit.value}?")
    return unit if command.value else dataclasses.replace(unit, certain=False)
