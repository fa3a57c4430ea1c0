"""Hold commands: the action that keeps a robot still, per dimension."""

import dataclasses
import re
from collections.abc import Iterator

from torchpi.errors import first_of
from torchpi.robots.embodiment import Embodiment
from torchpi.robots.parts import COMMANDS, ActionDim


@dataclasses.dataclass(frozen=True)
class HoldCommand:
    """Value of one action dimension that keeps the robot still."""

    index: int | None
    """Index of the state dimension to command; None: the action is a motion, so the command is 0."""
    text: str
    """Description: "state left_waist" or "no motion"."""


def hold_commands(embodiment: Embodiment) -> tuple[HoldCommand | None, ...]:
    """Determine the hold command of each dimension; None if it does not follow from the state, as for efforts.

    A velocity or an increment is held by 0. A position is held by a state dimension: the one that a delta refers to, or
    the only one with the action's name. If both state a unit, the units must be equal.
    """
    return tuple(_hold_command(i, action, embodiment) for i, action in enumerate(embodiment.actions))


def _hold_command(i: int, action: ActionDim, embodiment: Embodiment) -> HoldCommand | None:
    if action.command in ("velocity", "increment"):
        return HoldCommand(None, "no motion")
    names = embodiment.state_names
    if action.command != "position" or (action.kind == "absolute" and names.count(action.name) != 1):
        return None
    index = i if action.kind == "delta" else names.index(action.name)
    unit = embodiment.state_units[index]
    may_be_missing = index >= embodiment.state_dims[0]
    if may_be_missing or (action.unit and unit and action.unit != unit):
        return None
    return HoldCommand(index, f"state {names[index]}")


def control_gaps(embodiment: Embodiment, horizon: int | None) -> Iterator[str]:
    """Warn about missing or wrong fields that a control loop needs, for chunks of `horizon` actions."""
    where = "in the file of --embodiment, or in policy.json"
    if (steps := embodiment.execute_steps) and horizon and steps > horizon:
        yield f"execute_steps is {steps}, but its chunk has only {horizon} actions; write at most {horizon} {where}."
    if unstated := [action.name for action in embodiment.actions if action.command is None]:
        yield (
            f"no command is stated for {first_of(unstated)}, without which the control loop refuses to begin; write "
            f'"command", one of {", ".join(COMMANDS)}, for each {where}.'
        )


def with_guessed_commands(embodiment: Embodiment) -> Embodiment:
    """Add `command` to the embodiment of a policy folder older than that field, guessed from names and units."""
    motions = [_guess_motion(action) for action in embodiment.actions]
    positions = tuple(dataclasses.replace(action, command="position") for action in embodiment.actions)
    units, actions = embodiment.state_units, []
    holds = hold_commands(dataclasses.replace(embodiment, actions=positions))
    for action, motion, hold in zip(embodiment.actions, motions, holds, strict=True):
        index = None if hold is None else hold.index
        has_units = index is not None and bool(action.unit and units[index])
        # A robot controlled by increments may have a gripper controlled by effort.
        is_position = index is not None and (has_units or action.kind == "delta" or not any(motions))
        command = motion or ("position" if is_position else "effort")
        actions.append(dataclasses.replace(action, command=command))
    return dataclasses.replace(embodiment, actions=tuple(actions))


def _guess_motion(action: ActionDim) -> str | None:
    words = set(re.split(r"[^a-z]+", f"{action.name} {action.unit}".lower()))
    if words & {"speed", "vel", "velocity", "twist"} or "/s" in action.unit:
        return "velocity"
    return "increment" if words & {"delta", "increment"} else None
