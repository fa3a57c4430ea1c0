"""What the control loop asks of a robot and of a policy, and how a robot stays where it is."""

from __future__ import annotations

from typing import Any, Mapping, Protocol, Sequence, runtime_checkable

import numpy as np

ACTION_KINDS = ("position", "velocity", "increment", "effort")
"""What one dimension of an action is to the robot: where to be (joint angles, a gripper's opening), how fast to move,
how far to move in this step, how strongly to push (a gripper's force). It decides what holding still and slowing down
mean."""


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
    """What answers: a `WebsocketPolicy`, or anything else with its metadata."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Read are "control_hz", "execute_steps", "action_names", "action_kinds" and "torchpi/rtc"; any may be
        missing."""
        ...

    def infer(self, observation: dict[str, Any]) -> Mapping[str, Any]:
        """One observation to {"actions": [H, a], …}."""
        ...


def check_kinds(kinds: Sequence[Any] | None) -> tuple[str, ...]:
    """One of `ACTION_KINDS` per dimension.

    Raises:
        ValueError: something else, or nothing.
    """
    if kinds is None or any(kind not in ACTION_KINDS for kind in kinds):
        raise ValueError(
            f"the kinds of the actions are {kinds}; to hold the robot still the loop needs one of "
            f"{', '.join(ACTION_KINDS)} for each dimension. The server's metadata don't say them all: pass "
            'action_kinds=, such as ("position",) * 7'
        )
    return tuple(kinds)


def hold_command(last: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """The command [a] with which the robot stays where the last one brought it: the same position and effort again, no
    velocity, no increment."""
    return np.where([kind in ("position", "effort") for kind in kinds], last, 0).astype(np.float32)
