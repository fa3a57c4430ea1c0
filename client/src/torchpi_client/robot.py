"""Interfaces of the robot and the policy in the control loop, and the hold command."""

from __future__ import annotations

from typing import Any, Mapping, Protocol, Sequence, runtime_checkable

import numpy as np

COMMANDS = ("position", "velocity", "increment", "effort")
"""Commands of an action dimension: a target position (joint angle, gripper opening), a velocity, a position increment
per step, or an effort (gripper force). They determine how the robot is held still and slowed down."""


@runtime_checkable
class Robot(Protocol):
    """A robot; both methods are called from the thread that runs the control loop."""

    def observe(self) -> dict[str, Any]:
        """The observation of this moment, with the robot's own keys, as the policy's embodiment reads them."""
        ...

    def act(self, action: np.ndarray) -> None:
        """Start one step.

        Args:
            action: float32 [a], in the robot's units. Returns at once: the loop keeps the time.
        """
        ...


@runtime_checkable
class InferringPolicy(Protocol):
    """A source of chunks: a `WebsocketPolicy`, or any object with the same two members."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The loop reads "control_hz", "execute_steps", "action_names", "action_commands" and "torchpi/rtc"; any may be
        missing."""
        ...

    def infer(self, observation: dict[str, Any]) -> Mapping[str, Any]:
        """Infer {"actions": [H, a], …} from one observation."""
        ...


def check_commands(stated: Sequence[Any] | None, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """One of `COMMANDS` per dimension, from the settings or else the server's metadata.

    Raises:
        ValueError: a dimension has no command, or an unknown one; the settings state too many or too few.
    """
    # Earlier servers name the same list "action_kinds".
    servers = metadata.get("action_commands") or metadata.get("action_kinds")
    commands = servers if stated is None else stated
    names = list(metadata.get("action_names") or ())
    expected = len(names or servers or ())
    if stated is not None and expected and len(stated) != expected:
        raise ValueError(wrong_count(stated, expected, names))
    if commands is not None and all(command in COMMANDS for command in commands):
        return tuple(commands)
    missing = [i for i, command in enumerate(commands or ()) if command not in COMMANDS]
    dims = ", ".join(names[i] if i < len(names) else str(i) for i in missing) or ", ".join(names) or "all of them"
    raise ValueError(
        f"The action_commands are {commands}: they do not say what these dimensions of an action command: {dims}. "
        f"To hold the robot still the loop needs one of {', '.join(COMMANDS)} for each dimension. Pass "
        'action_commands= in ControlSettings, such as ["position"] * 7, or state "command" of each action in the '
        "policy's embodiment (policy.json) on the server."
    )


def wrong_count(stated: Sequence[str], expected: int, names: Sequence[str]) -> str:
    """The message for `action_commands` of another length than the policy's actions."""
    named = f": {', '.join(names)}" if names else ""
    return (
        f"action_commands in ControlSettings has {len(stated)} commands; the policy's actions have {expected} "
        f"dimensions{named}. State one command for each."
    )


def hold_command(last: np.ndarray, commands: Sequence[str]) -> np.ndarray:
    """The command [a] that keeps the robot still: the last position and effort, zero velocity, zero increment."""
    return np.where([command in ("position", "effort") for command in commands], last, 0).astype(np.float32)
