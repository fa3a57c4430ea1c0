"""Conversion between ALOHA's units and π₀'s: the hook "aloha_pi".

π₀ was trained with a different convention than ALOHA's software: some joints have the opposite sign, and the gripper is
measured as an angle instead of an opening. The constants are openpi's.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float

from torchpi.robots.parts import HOOKS, Hook

_GRIPPERS = [6, 13]  # of 14 dimensions: six joints and the gripper per arm

# -1 for joints with opposite signs in the two conventions. The grippers are converted below.
_SIGN = np.array([1, -1, -1, 1, 1, 1, 1] * 2, np.float64)

# Finger positions in metres at which ALOHA's opening is 0 and 1.
_LINEAR_CLOSED, _LINEAR_OPEN = 0.01844, 0.05800
# The finger is moved by a horn on the motor shaft and an arm between horn and finger; lengths in metres.
_HORN_RADIUS, _ARM_LENGTH = 0.022, 0.036
# Motor angles in rad at which π₀'s gripper is 0 and 1.
_ANGLE_CLOSED, _ANGLE_OPEN = 0.5476, 1.6296
# Angles in rad of the leader's gripper joint at which ALOHA's gripper command is 0 and 1. openpi measures π₀'s outputs
# from _ANGLE_CLOSED, without scaling them to _ANGLE_OPEN, so the command is not the inverse of the state's conversion.
_COMMAND_CLOSED, _COMMAND_OPEN = -0.6213, 1.4910


def gripper_to_angular(opening: np.ndarray) -> Float[np.ndarray, "..."]:
    """Convert ALOHA's gripper opening (0 to 1) to π₀'s gripper state."""
    linear = opening * (_LINEAR_OPEN - _LINEAR_CLOSED) + _LINEAR_CLOSED
    # Law of cosines in the triangle of horn, arm and finger.
    sine = (_HORN_RADIUS**2 + linear**2 - _ARM_LENGTH**2) / (2 * _HORN_RADIUS * linear)
    angle = np.arcsin(np.clip(sine, -1.0, 1.0))
    return (angle - _ANGLE_CLOSED) / (_ANGLE_OPEN - _ANGLE_CLOSED)


def gripper_to_opening(angular: np.ndarray) -> Float[np.ndarray, "..."]:
    """Invert `gripper_to_angular`."""
    horn = _HORN_RADIUS * np.sin(angular * (_ANGLE_OPEN - _ANGLE_CLOSED) + _ANGLE_CLOSED)
    linear = horn + np.sqrt(horn**2 + _ARM_LENGTH**2 - _HORN_RADIUS**2)
    return (linear - _LINEAR_CLOSED) / (_LINEAR_OPEN - _LINEAR_CLOSED)


def gripper_from_angular(angular: np.ndarray) -> Float[np.ndarray, "..."]:
    """Convert π₀'s gripper action to ALOHA's gripper command."""
    return (angular + _ANGLE_CLOSED - _COMMAND_CLOSED) / (_COMMAND_OPEN - _COMMAND_CLOSED)


def gripper_command_to_angular(command: np.ndarray) -> Float[np.ndarray, "..."]:
    """Invert `gripper_from_angular`, for training on recorded ALOHA commands."""
    return command * (_COMMAND_OPEN - _COMMAND_CLOSED) + _COMMAND_CLOSED - _ANGLE_CLOSED


def _convert(values: np.ndarray, gripper: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    out = _SIGN * values
    out[..., _GRIPPERS] = gripper(out[..., _GRIPPERS])
    return out


HOOKS["aloha_pi"] = Hook(
    state_to_model=partial(_convert, gripper=gripper_to_angular),
    actions_to_model=partial(_convert, gripper=gripper_command_to_angular),
    actions_to_robot=partial(_convert, gripper=gripper_from_angular),
    state_to_robot=partial(_convert, gripper=gripper_to_opening),
)
