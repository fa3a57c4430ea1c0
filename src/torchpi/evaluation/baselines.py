"""What a policy that knows nothing would predict: that the robot stays where it is."""

import dataclasses
import re
from typing import Any

import numpy as np
from jaxtyping import Float

from torchpi.robots import ActionDim, Embodiment

_MOTION_WORDS = {"delta", "increment", "speed", "vel", "velocity", "twist"}


@dataclasses.dataclass(frozen=True)
class Hold:
    """The action of one dimension with which the robot stays where it is."""

    index: int | None
    """Of the dimension of the state that is held; None: the action is a motion, and holding means 0."""
    text: str
    """For people: "state left_waist" or "no motion"."""


def holds(embodiment: Embodiment) -> tuple[Hold | None, ...]:
    """How to stay, for each dimension of an action; None: the embodiment doesn't tell.

    - An action whose name or unit speaks of a motion (delta, increment, velocity, …) is 0.
    - An action that the model predicts relative to the state is the state of its index.
    - An action that is named as a dimension of the state is that dimension. Both must be in the same unit; where no
      unit is stated, only if no other action is a motion: a robot that is moved by increments may have a gripper that
      is moved by effort.
    """
    return tuple(_hold(i, action, embodiment) for i, action in enumerate(embodiment.actions))


def held_actions(embodiment: Embodiment, state: np.ndarray) -> Float[np.ndarray, "F a"]:
    """The actions with which the robot stays in states [F, s]; NaN where `holds` is None."""
    actions = np.full((len(state), embodiment.action_size), np.nan)
    for i, hold in enumerate(holds(embodiment)):
        if hold is not None:
            actions[:, i] = 0.0 if hold.index is None else state[:, hold.index]
    return actions


def _hold(i: int, action: ActionDim, embodiment: Embodiment) -> Hold | None:
    if _is_motion(action):
        return Hold(None, "no motion")
    names = embodiment.state_names
    units = [unit for part in embodiment.state for unit in part.units or ("",) * len(part.names)]
    if action.kind == "delta":
        index = i
    elif names.count(action.name) == 1:
        index = names.index(action.name)
    else:
        return None
    if index >= embodiment.state_dims[0]:
        return None  # a dimension that may be missing
    stated = bool(action.unit and units[index])
    if stated and action.unit != units[index]:
        return None
    if not stated and action.kind != "delta" and any(map(_is_motion, embodiment.actions)):
        return None
    return Hold(index, f"state {names[index]}")


def _is_motion(action: ActionDim) -> bool:
    words: Any = re.split(r"[^a-z]+", f"{action.name} {action.unit}".lower())
    return bool(_MOTION_WORDS & set(words)) or "/s" in action.unit
