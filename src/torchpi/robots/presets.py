"""The robots that torchpi knows, as openpi's clients and the simulators send their observations."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torchpi.robots.aloha  # noqa: F401  registers the hook
from torchpi.robots.embodiment import Embodiment
from torchpi.robots.parts import ActionDim, Camera, StateKey

_ALOHA_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
_ALOHA_NAMES = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in (*_ALOHA_ARM, "gripper"))
_ALOHA_UNITS = tuple("opening, 0 to 1" if name.endswith("gripper") else "rad" for name in _ALOHA_NAMES)
_ALOHA_CAMERAS = (
    # dtype "any": the robot sends uint8, simulators and datasets floats in [0, 1].
    Camera("base_0_rgb", "images.cam_high", layout="chw", dtype="any"),
    Camera("left_wrist_0_rgb", "images.cam_left_wrist", "optional", layout="chw", dtype="any"),
    Camera("right_wrist_0_rgb", "images.cam_right_wrist", "optional", layout="chw", dtype="any"),
    Camera(None, "images.cam_low", "ignored", layout="chw", dtype="any"),
)
_DROID_JOINTS = tuple(f"joint_{i}" for i in range(1, 8))
_LIBERO_POSE = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z")


def aloha(*, adapt_to_pi: bool = True, delta_actions: bool = True) -> Embodiment:
    """ALOHA: two ViperX arms with parallel grippers and up to four cameras.

    Observation: "state" [14], "images" {cam_high, cam_left_wrist, cam_right_wrist, cam_low: [3, h, w]}, "prompt".

    Args:
        adapt_to_pi: convert joints and grippers to the convention of π₀'s pre-training; False if a policy was trained
            on ALOHA's own numbers.
        delta_actions: the model predicts the twelve joints relative to the state; the grippers are always absolute.
    """
    actions = []
    for dimension, unit in zip(_ALOHA_NAMES, _ALOHA_UNITS, strict=True):
        is_delta = delta_actions and not dimension.endswith("gripper")
        actions.append(ActionDim(dimension, unit, "delta" if is_delta else "absolute", "position"))
    return Embodiment(
        "aloha",
        cameras=_ALOHA_CAMERAS,
        state=(StateKey("state", _ALOHA_NAMES, units=_ALOHA_UNITS),),
        actions=tuple(actions),
        hook="aloha_pi" if adapt_to_pi else None,
        control_hz=50,  # ALOHA's usual rate, as in its datasets
        execute_steps=25,  # openpi's client for the robot
    )


def droid(*, layout: str = "hwc", dtype: str = "uint8") -> Embodiment:
    """DROID: a Franka arm with a Robotiq gripper, one exterior and one wrist camera.

    Observation: "observation/exterior_image_1_left", "observation/wrist_image_left", "observation/joint_position" [7],
    "observation/gripper_position" [1] or a number, "prompt"; the '/' belongs to the keys.

    Args:
        layout, dtype: of both images, see `Camera`; LeRobot's datasets have "chw" and "float32".
    """
    velocity = "fraction of the largest velocity, -1 to 1"
    return Embodiment(
        "droid",
        cameras=(
            Camera("base_0_rgb", "observation/exterior_image_1_left", layout=layout, dtype=dtype),
            Camera("left_wrist_0_rgb", "observation/wrist_image_left", layout=layout, dtype=dtype),
            Camera("right_wrist_0_rgb", None, "masked"),
        ),
        state=(
            StateKey("observation/joint_position", _DROID_JOINTS, units=("rad",) * 7),
            StateKey("observation/gripper_position", ("gripper",), units=("0 open, 1 closed",)),
        ),
        actions=(
            *(ActionDim(f"{joint}_velocity", velocity, command="velocity") for joint in _DROID_JOINTS),
            ActionDim("gripper", "0 open, 1 closed", command="position"),
        ),
        control_hz=15,  # DROID's rate
        execute_steps=8,  # openpi's client
    )


def libero(*, delta_actions: bool = False, layout: str = "hwc", dtype: str = "uint8") -> Embodiment:
    """LIBERO: a simulated Franka arm, one fixed and one wrist camera.

    Observation: "observation/image", "observation/wrist_image", "observation/state" [8], "prompt"; the '/' belongs to
    the keys. A state of 7 is taken as well, for policies that were trained on one.

    Args:
        delta_actions: the first six actions are relative to the state, as in openpi's π₀ configurations, which
            subtract the pose although LIBERO's actions are increments already; π₀.₅'s are not.
        layout, dtype: of both images, see `Camera`; LeRobot's datasets have "chw" and "float32".
    """
    kind = "delta" if delta_actions else "absolute"
    return Embodiment(
        "libero",
        cameras=(
            Camera("base_0_rgb", "observation/image", layout=layout, dtype=dtype),
            Camera("left_wrist_0_rgb", "observation/wrist_image", layout=layout, dtype=dtype),
            Camera("right_wrist_0_rgb", None, "masked"),
        ),
        state=(
            StateKey(
                "observation/state",
                (*_LIBERO_POSE, "finger_left", "finger_right"),
                min_dim=7,
                units=("m",) * 3 + ("rad",) * 3 + ("m",) * 2,
            ),
        ),
        actions=(
            # The simulator's controller scales -1 to 1 to its largest increment.
            *(ActionDim(f"delta_{dim}", "increment, -1 to 1", kind, "increment") for dim in _LIBERO_POSE),
            ActionDim("gripper", "-1 open, 1 close", command="effort"),
        ),
        control_hz=10,  # the rate that openpi's LIBERO dataset states; the simulator itself steps at 20 Hz
        execute_steps=5,  # openpi's client
    )


def metaworld() -> Embodiment:
    """Meta-World's simulated Sawyer arm with a base and a wrist camera; the hand's orientation is fixed.

    The simulator reads an action as an increment of the hand's position (±1 is 1 cm) and the gripper's effort. The
    model predicts it as it is, so these are no delta actions.
    """
    increments = ("delta_x", "delta_y", "delta_z")
    return Embodiment.generic(
        "metaworld",
        cameras={"base_0_rgb": "base", "left_wrist_0_rgb": "wrist"},
        state=("hand_x", "hand_y", "hand_z", "gripper"),
        actions=(*increments, "gripper"),
        command=dict.fromkeys(increments, "increment") | {"gripper": "effort"},
        control_hz=80,
        execute_steps=4,
    )


# The published policies; prompts, assets and delta actions are those of their training.
_ALOHA_PROMPTS = {
    "pi0_aloha_towel": "fold the towel",
    "pi0_aloha_tupperware": "open the tupperware and put the food on the plate",
    "pi0_aloha_pen_uncap": "uncap the pen",
}
_RESET_POSE = {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}  # of each arm, in rad; clients move there before an episode
_LIBERO_ASSET = "physical-intelligence/libero"


# The robot of each, and what it has of its own.
_PUBLISHED: dict[str, tuple[Callable[[], Embodiment], dict[str, Any]]] = {
    **{
        name: (aloha, {"default_prompt": prompt, "asset_id": "trossen", "metadata": _RESET_POSE})
        for name, prompt in _ALOHA_PROMPTS.items()
    },
    # 10: openpi's client for the simulator
    "pi0_aloha_sim": (partial(aloha, delta_actions=False), {"default_prompt": "Transfer cube", "execute_steps": 10}),
    "pi0_droid": (droid, {"asset_id": "droid"}),
    "pi05_droid": (droid, {"asset_id": "droid"}),
    "pi0_libero": (partial(libero, delta_actions=True), {"asset_id": _LIBERO_ASSET}),
    "pi05_libero": (libero, {"asset_id": _LIBERO_ASSET}),
}


def _published(name: str) -> Embodiment:
    make, fields = _PUBLISHED[name]
    return dataclasses.replace(make(), name=name, **fields)


EMBODIMENTS: dict[str, Callable[[], Embodiment]] = {
    **{"aloha": aloha, "droid": droid, "libero": libero, "metaworld": metaworld},
    **{name: partial(_published, name) for name in _PUBLISHED},
}
