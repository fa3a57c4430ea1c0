"""Interfaces of the robot and the policy in the control loop, and the hold command."""

from __future__ import annotations

from typing import Any, Mapping, Protocol, Sequence, runtime_checkable

import numpy as np

COMMANDS = ("position", "velocity", "increment", "effort")
"""Kinds of command of an action dimension: a target position (joint angle, gripper opening), a velocity, a position
increment per step, or an effort (gripper force). They determine how the robot is held still and slowed down."""


@runtime_checkable
class Robot(Protocol):
    """A robot; both methods are called from the thread that runs the control loop."""

    def observe(self) -> dict[str, Any]:
        """The current observation, with the keys that the policy's embodiment reads. While it blocks, no command is
        sent."""

    def act(self, action: np.ndarray) -> None:
        """Send an action, float32 [a] in the robot's units. Return immediately: the loop keeps the time."""


@runtime_checkable
class InferringPolicy(Protocol):
    """Source of chunks: a `WebsocketPolicy`, or any object with these two members."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """May have "control_hz", "execute_steps", "action_names", "action_commands" and "torchpi/rtc" for the loop."""

    def infer(self, observation: dict[str, Any]) -> Mapping[str, Any]:
        """Infer {"actions": [H, a], …} from one observation."""


def check_commands(own: Sequence[Any] | None, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """One of `COMMANDS` per dimension, from the settings (`own`) or else from the server's metadata.

    Raises:
        ValueError: a dimension has no command or an unknown one, or the settings have too many or too few commands.
    """
    # Earlier servers call the same list "action_kinds".
    from_server = metadata.get("action_commands") or metadata.get("action_kinds")
    commands = from_server if own is None else own
    names = list(metadata.get("action_names") or ())
    expected = len(names or from_server or ())
    if own is not None and expected and len(own) != expected:
        raise ValueError(wrong_count(own, expected, names))
    if commands is not None and all(command in COMMANDS for command in commands):
        return tuple(commands)
    missing = [i for i, command in enumerate(commands or ()) if command not in COMMANDS]
    dims = ", ".join(names[i] if i < len(names) else str(i) for i in missing) or ", ".join(names) or "all of them"
    each = f"each of the {expected} dimensions" if expected else "each dimension"
    raise ValueError(
        f"The action_commands are {commands}; these action dimensions have no valid command: {dims}. "
        f"To hold the robot still, the loop needs one of {', '.join(COMMANDS)} for each dimension. Pass "
        f"action_commands= in ControlSettings, a list of what act() expects in {each}, for example "
        '["increment", …, "effort"]; or set "command" for each action in the policy\'s embodiment (policy.json) on the '
        'server. A wrong command moves a robot that should be held: with "position" a velocity robot keeps its '
        'velocity, with "velocity" a position robot moves to 0.'
    )


def wrong_count(commands: Sequence[str], expected: int, names: Sequence[str]) -> str:
    """Error message for `action_commands` of another length than the policy's actions."""
    dimensions = f"{expected} dimensions: {', '.join(names)}" if names else f"{expected} dimensions"
    return (
        f"action_commands in ControlSettings has {len(commands)} commands; the policy's actions have {dimensions}. "
        "Give one command for each."
    )


def hold_command(last: np.ndarray, commands: Sequence[str]) -> np.ndarray:
    """Command [a] that keeps the robot still: the last position and effort, zero velocity, zero increment."""
    return np.where([command in ("position", "effort") for command in commands], last, 0).astype(np.float32)
