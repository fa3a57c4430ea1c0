"""The control loop's interfaces of a robot and of a policy, and the command that holds a robot still."""

from __future__ import annotations

from typing import Any, Mapping, Protocol, Sequence, runtime_checkable

import numpy as np

COMMANDS = ("position", "velocity", "increment", "effort")
"""The meaning of one dimension of an action to the robot: where to be (joint angles, a gripper's opening), how fast to
move, how far to move in this step, how strongly to push (a gripper's force). It decides what holding still and slowing
down mean."""


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
    """A source of chunks: a `WebsocketPolicy`, or anything else with its metadata."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Read are "control_hz", "execute_steps", "action_names", "action_commands" and "torchpi/rtc"; any may be
        missing."""
        ...

    def infer(self, observation: dict[str, Any]) -> Mapping[str, Any]:
        """One observation to {"actions": [H, a], …}."""
        ...


def check_commands(stated: Sequence[Any] | None, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """One of `COMMANDS` per dimension: what the settings state, or else the server's metadata.

    Raises:
        ValueError: a dimension has none, or something else.
    """
    # Servers before "action_commands" say the same as "action_kinds".
    commands = stated or metadata.get("action_commands") or metadata.get("action_kinds")
    if commands is not None and all(command in COMMANDS for command in commands):
        return tuple(commands)
    names = list(metadata.get("action_names") or ())
    missing = [i for i, command in enumerate(commands or ()) if command not in COMMANDS]
    dims = ", ".join(names[i] if i < len(names) else str(i) for i in missing) or ", ".join(names) or "all of them"
    raise ValueError(
        f"The action_commands are {commands}: they do not say what these dimensions of an action command: {dims}. "
        f"To hold the robot still the loop needs one of {', '.join(COMMANDS)} for each dimension. Pass "
        'action_commands= in ControlSettings, such as ["position"] * 7, or state "command" of each action in the '
        "policy's embodiment (policy.json) on the server."
    )


def hold_command(last: np.ndarray, commands: Sequence[str]) -> np.ndarray:
    """The command [a] with which the robot stays where the last one brought it: the same position and effort again, no
    velocity, no increment."""
    return np.where([command in ("position", "effort") for command in commands], last, 0).astype(np.float32)
