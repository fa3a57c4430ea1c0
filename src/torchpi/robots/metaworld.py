"""Meta-World's Sawyer arm: the hand moves by increments, its orientation is fixed."""

from torchpi.robots.embodiment import Embodiment


def metaworld() -> Embodiment:
    """The simulated Sawyer arm with a base and a wrist camera.

    The simulator reads an action as an increment of the hand's position (±1 is 1 cm) and the gripper's effort. The
    model predicts it as it is, so these are no delta actions.
    """
    return Embodiment.generic(
        "metaworld",
        cameras={"base_0_rgb": "base", "left_wrist_0_rgb": "wrist"},
        state=("hand_x", "hand_y", "hand_z", "gripper"),
        actions=("delta_x", "delta_y", "delta_z", "gripper"),
        control_hz=80,
        execute_steps=4,
    )
