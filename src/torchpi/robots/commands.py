"""The hold command: the action that keeps a robot still, dimension by dimension."""

import dataclasses
import re
from collections.abc import Iterator

from torchpi.errors import first_of
from torchpi.robots.embodiment import Embodiment
from torchpi.robots.parts import COMMANDS, ActionDim

_WHERE = "in the file of --embodiment, or in policy.json"


@dataclasses.dataclass(frozen=True)
class HoldCommand:
    """The action of one dimension that keeps the robot still."""

    index: int | None
    """Dimension of the state that the action repeats; None: the action is a motion, and is 0."""
    text: str
    """Readable form: "state left_waist" or "no motion"."""


def hold_commands(embodiment: Embodiment) -> tuple[HoldCommand | None, ...]:
    """The hold command of each dimension; None: the state doesn't tell, as for efforts.

    A velocity or an increment is 0. A position is the dimension of the state that the model predicts it relative to, or
    the only one of its name; where both state a unit, it must be the same.
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
    """Warnings about what a control loop needs and the robot's description lacks, for chunks of `horizon` actions."""
    if (steps := embodiment.execute_steps) and horizon and steps > horizon:
        yield f"execute_steps is {steps}, but its chunk has only {horizon} actions; write at most {horizon} {_WHERE}."
    if unstated := [action.name for action in embodiment.actions if action.command is None]:
        yield (
            f"no command is stated for {first_of(unstated)}, without which the control loop refuses to begin; write "
            f'"command", one of {", ".join(COMMANDS)}, for each {_WHERE}.'
        )


def with_guessed_commands(embodiment: Embodiment) -> Embodiment:
    """The embodiment of a policy folder older than `command`, with what was guessed then from names and units."""
    motions = [_guessed_motion(action) for action in embodiment.actions]
    positions = tuple(dataclasses.replace(action, command="position") for action in embodiment.actions)
    units, actions = embodiment.state_units, []
    holds = hold_commands(dataclasses.replace(embodiment, actions=positions))
    for action, motion, hold in zip(embodiment.actions, motions, holds, strict=True):
        index = None if hold is None else hold.index
        has_units = index is not None and bool(action.unit and units[index])
        # A robot that is moved by increments may have a gripper that is moved by effort.
        is_position = index is not None and (has_units or action.kind == "delta" or not any(motions))
        command = motion or ("position" if is_position else "effort")
        actions.append(dataclasses.replace(action, command=command))
    return dataclasses.replace(embodiment, actions=tuple(actions))


def _guessed_motion(action: ActionDim) -> str | None:
    words = set(re.split(r"[^a-z]+", f"{action.name} {action.unit}".lower()))
    if words & {"speed", "vel", "velocity", "twist"} or "/s" in action.unit:
        return "velocity"
    return "increment" if words & {"delta", "increment"} else None
