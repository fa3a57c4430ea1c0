"""DROID: a Franka arm with a Robotiq gripper, one exterior and one wrist camera, as openpi's client sends them."""

from torchpi.robots.embodiment import ActionDim, Camera, Embodiment, StateKey

_JOINTS = tuple(f"joint_{i}" for i in range(1, 8))


def droid(*, name: str = "droid", layout: str = "hwc", dtype: str = "uint8", asset_id: str | None = None) -> Embodiment:
    """DROID. Observation: "observation/exterior_image_1_left", "observation/wrist_image_left",
    "observation/joint_position" [7], "observation/gripper_position" [1] or a number, "prompt"; the '/' belongs to the
    keys.

    Args:
        name, asset_id: see `Embodiment`.
        layout, dtype: of both images, see `Camera`; LeRobot's data sets have "chw" and "float32".
    """
    return Embodiment(
        name,
        cameras=(
            Camera("base_0_rgb", "observation/exterior_image_1_left", layout=layout, dtype=dtype),
            Camera("left_wrist_0_rgb", "observation/wrist_image_left", layout=layout, dtype=dtype),
            Camera("right_wrist_0_rgb", None, "masked"),
        ),
        state=(
            StateKey("observation/joint_position", _JOINTS, units=("rad",) * 7),
            StateKey("observation/gripper_position", ("gripper",), units=("0 open, 1 closed",)),
        ),
        actions=(
            *(ActionDim(f"{joint}_velocity", "fraction of the largest velocity, -1 to 1") for joint in _JOINTS),
            ActionDim("gripper", "0 open, 1 closed"),
        ),
        control_hz=15,  # DROID's rate
        execute_steps=8,  # openpi's client
        asset_id=asset_id,
    )
