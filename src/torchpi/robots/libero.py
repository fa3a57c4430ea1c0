"""LIBERO: a simulated Franka arm, one fixed and one wrist camera, as openpi's client sends them."""

from torchpi.robots.embodiment import ActionDim, Camera, Embodiment, StateKey

_POSE = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z")


def libero(
    *,
    delta_actions: bool = False,
    name: str = "libero",
    layout: str = "hwc",
    dtype: str = "uint8",
    asset_id: str | None = None,
) -> Embodiment:
    """LIBERO. Observation: "observation/image", "observation/wrist_image", "observation/state" [8], "prompt"; the '/'
    belongs to the keys. A state of 7 is taken as well, for policies that were trained on one.

    Args:
        delta_actions: the first six actions are relative to the state, as in openpi's π₀ configurations, which
            subtract the pose although LIBERO's actions are increments already; π₀.₅'s are not.
        name, asset_id: see `Embodiment`.
        layout, dtype: of both images, see `Camera`; LeRobot's data sets have "chw" and "float32".
    """
    kind = "delta" if delta_actions else "absolute"
    return Embodiment(
        name,
        cameras=(
            Camera("base_0_rgb", "observation/image", layout=layout, dtype=dtype),
            Camera("left_wrist_0_rgb", "observation/wrist_image", layout=layout, dtype=dtype),
            Camera("right_wrist_0_rgb", None, "masked"),
        ),
        state=(
            StateKey(
                "observation/state",
                (*_POSE, "finger_left", "finger_right"),
                min_dim=7,
                units=("m",) * 3 + ("rad",) * 3 + ("m",) * 2,
            ),
        ),
        actions=(
            # The simulator's controller scales -1 to 1 to its largest increment.
            *(ActionDim(f"delta_{dim}", "increment, -1 to 1", kind) for dim in _POSE),
            ActionDim("gripper", "-1 open, 1 close"),
        ),
        control_hz=10,  # the rate that openpi's LIBERO data set states; the simulator itself steps at 20 Hz
        execute_steps=5,  # openpi's client
        asset_id=asset_id,
    )
