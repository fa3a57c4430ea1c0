"""How a robot stays where it is: which action does that, dimension by dimension."""

import dataclasses
import re
from typing import Any

from torchpi.robots.embodiment import ActionDim, Embodiment

_MOTION_WORDS = {"delta", "increment", "speed", "vel", "velocity", "twist"}
_VELOCITY_WORDS = {"speed", "vel", "velocity", "twist"}


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


def action_kinds(embodiment: Embodiment) -> tuple[str, ...]:
    """What each dimension of an action commands, for who has to keep the robot still: "velocity" and "increment" are 0
    then, "position" and "effort" the last command again. What is no motion and has no dimension of the state of its own
    counts as an effort, such as a gripper's.
    """
    kinds = []
    for action, hold in zip(embodiment.actions, holds(embodiment), strict=True):
        if hold is None:
            kinds.append("effort")
        elif hold.index is not None:
            kinds.append("position")
        else:
            is_velocity = bool(_VELOCITY_WORDS & _words(action)) or "/s" in action.unit
            kinds.append("velocity" if is_velocity else "increment")
    return tuple(kinds)


def _is_motion(action: ActionDim) -> bool:
    return bool(_MOTION_WORDS & _words(action)) or "/s" in action.unit


def _words(action: ActionDim) -> set[str]:
    words: list[Any] = re.split(r"[^a-z]+", f"{action.name} {action.unit}".lower())
    return set(words)
