"""ALOHA: two ViperX arms with parallel grippers and up to four cameras, as openpi's clients send them.

π₀ was trained with another convention than ALOHA's software: some joints turn the other way, and the gripper is
measured as an angle, not as an opening. `adapt_to_pi` converts; the numbers are openpi's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from torchpi.robots.embodiment import HOOKS, ActionDim, Camera, Embodiment, Hook, StateKey

_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
_NAMES = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in (*_ARM, "gripper"))
_UNITS = tuple("opening, 0 to 1" if name.endswith("gripper") else "rad" for name in _NAMES)
_GRIPPERS = [6, 13]

# +1 where the two conventions turn a joint alike. The grippers' are converted below.
_SIGN = np.array([1, -1, -1, 1, 1, 1, 1] * 2, np.float64)

# ALOHA's opening is 0 to 1 between these positions of a finger, in metres.
_LINEAR_CLOSED, _LINEAR_OPEN = 0.01844, 0.05800
# The finger is moved by a horn on the motor's shaft and an arm between horn and finger, in metres.
_HORN_RADIUS, _ARM_LENGTH = 0.022, 0.036
# π₀'s gripper is 0 to 1 between these angles of the motor, in rad.
_ANGLE_CLOSED, _ANGLE_OPEN = 0.5476, 1.6296
# ALOHA's gripper command is 0 to 1 between these angles of the leader's gripper joint, in rad; openpi measures π₀'s
# outputs from _ANGLE_CLOSED on, without scaling them to _ANGLE_OPEN. So this is not the inverse of the state's
# conversion.
_COMMAND_CLOSED, _COMMAND_OPEN = -0.6213, 1.4910


def gripper_to_angular(opening: np.ndarray) -> Float[np.ndarray, "..."]:
    """π₀'s measure of the gripper's state from ALOHA's opening (0 to 1)."""
    linear = opening * (_LINEAR_OPEN - _LINEAR_CLOSED) + _LINEAR_CLOSED
    # The law of cosines in the triangle of horn, arm and finger.
    sine = (_HORN_RADIUS**2 + linear**2 - _ARM_LENGTH**2) / (2 * _HORN_RADIUS * linear)
    angle = np.arcsin(np.clip(sine, -1.0, 1.0))
    return (angle - _ANGLE_CLOSED) / (_ANGLE_OPEN - _ANGLE_CLOSED)


def gripper_from_angular(angular: np.ndarray) -> Float[np.ndarray, "..."]:
    """ALOHA's gripper command from π₀'s gripper action."""
    return (angular + _ANGLE_CLOSED - _COMMAND_CLOSED) / (_COMMAND_OPEN - _COMMAND_CLOSED)


def gripper_command_to_angular(command: np.ndarray) -> Float[np.ndarray, "..."]:
    """The inverse of `gripper_from_angular`, for training on ALOHA's recorded commands."""
    return command * (_COMMAND_OPEN - _COMMAND_CLOSED) + _COMMAND_CLOSED - _ANGLE_CLOSED


def _state_to_model(state: np.ndarray) -> np.ndarray:
    out = _SIGN * state
    out[..., _GRIPPERS] = gripper_to_angular(out[..., _GRIPPERS])
    return out


def _actions_to_model(actions: np.ndarray) -> np.ndarray:
    out = _SIGN * actions
    out[..., _GRIPPERS] = gripper_command_to_angular(out[..., _GRIPPERS])
    return out


def _actions_to_robot(actions: np.ndarray) -> np.ndarray:
    out = _SIGN * actions
    out[..., _GRIPPERS] = gripper_from_angular(out[..., _GRIPPERS])
    return out


HOOKS["aloha_pi"] = Hook(_state_to_model, _actions_to_model, _actions_to_robot)


def aloha(
    *,
    adapt_to_pi: bool = True,
    delta_actions: bool = True,
    name: str = "aloha",
    execute_steps: int = 25,
    default_prompt: str | None = None,
    asset_id: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Embodiment:
    """ALOHA. Observation: "state" [14], "images" {cam_high, cam_left_wrist, cam_right_wrist, cam_low: [3, h, w]},
    "prompt".

    Args:
        adapt_to_pi: convert joints and grippers to the convention of π₀'s pre-training; False if a policy was trained
            on ALOHA's own numbers.
        delta_actions: the model predicts the twelve joints relative to the state; the grippers are always absolute.
        name, execute_steps, default_prompt, asset_id, metadata: see `Embodiment`.
    """
    return Embodiment(
        name,
        cameras=(
            # dtype "any": the robot sends uint8, simulators and data sets floats in [0, 1].
            Camera("base_0_rgb", "images.cam_high", layout="chw", dtype="any"),
            Camera("left_wrist_0_rgb", "images.cam_left_wrist", "optional", layout="chw", dtype="any"),
            Camera("right_wrist_0_rgb", "images.cam_right_wrist", "optional", layout="chw", dtype="any"),
            Camera(None, "images.cam_low", "ignored", layout="chw", dtype="any"),
        ),
        state=(StateKey("state", _NAMES, units=_UNITS),),
        actions=tuple(
            ActionDim(dim, unit, "delta" if delta_actions and i not in _GRIPPERS else "absolute")
            for i, (dim, unit) in enumerate(zip(_NAMES, _UNITS, strict=True))
        ),
        hook="aloha_pi" if adapt_to_pi else None,
        control_hz=50,  # ALOHA's usual rate, as in its data sets
        execute_steps=execute_steps,  # 25: openpi's client for the robot
        default_prompt=default_prompt,
        asset_id=asset_id,
        metadata=metadata or {},
    )
