"""Known robots: JSON files in assets/robots, three robots with arguments, and those of released policies."""

import dataclasses
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torchpi.robots.aloha  # noqa: F401  registers the hook
from torchpi.assets import assets
from torchpi.errors import EmbodimentError
from torchpi.robots.embodiment import Embodiment
from torchpi.schema import read_json, without_comments

RELEASED = tomllib.loads((assets() / "released.toml").read_text(encoding="utf-8"))
ROBOT_FILES = {file.stem: file for file in sorted((assets() / "robots").glob("*.json"))}
"""JSON files by robot name; each robot has a page in docs/robots. "comment" states the sources of the data."""


def read_embodiment(file: Path) -> Embodiment:
    """Read an embodiment from a JSON file, with or without comments; see `get_embodiment`."""
    where = f"The embodiment {file}"
    robot = Embodiment.from_dict(without_comments(read_json(file, error=EmbodimentError)), where=where)
    robot.check_names(where)
    return robot


def aloha(*, adapt_to_pi: bool = True, delta_actions: bool = True) -> Embodiment:
    """ALOHA: two ViperX arms with parallel grippers and up to four cameras.

    Observation: "state" [14], "images" {cam_high, cam_left_wrist, cam_right_wrist, cam_low: [3, h, w]}, "prompt".

    Args:
        adapt_to_pi: convert joints and grippers to the convention of π₀'s pre-training; False for a policy trained on
            ALOHA's own units.
        delta_actions: the model predicts the twelve joints relative to the state; the grippers are always absolute.
    """
    robot = read_embodiment(ROBOT_FILES["aloha"])
    if not delta_actions:
        absolute = tuple(dataclasses.replace(action, kind="absolute") for action in robot.actions)
        robot = dataclasses.replace(robot, actions=absolute)
    return dataclasses.replace(robot, hook=robot.hook if adapt_to_pi else None)


def droid(*, layout: str = "hwc", dtype: str = "uint8") -> Embodiment:
    """DROID: a Franka arm with a Robotiq gripper, one exterior and one wrist camera.

    Observation: "observation/exterior_image_1_left", "observation/wrist_image_left", "observation/joint_position" [7],
    "observation/gripper_position" [1] or a number, "prompt"; the '/' belongs to the keys.

    Args:
        layout, dtype: of both images, see `Camera`; LeRobot's datasets have "chw" and "float32".
    """
    return _with_images("droid", layout, dtype)


def libero(*, delta_actions: bool = False, layout: str = "hwc", dtype: str = "uint8") -> Embodiment:
    """LIBERO: a simulated Franka arm, one fixed and one wrist camera.

    Observation: "observation/image", "observation/wrist_image", "observation/state" [8], "prompt"; the '/' belongs to
    the keys. A state of 7 dimensions is accepted too, for policies trained with one.

    Args:
        delta_actions: the first six actions are relative to the state, as in openpi's π₀ configs, which subtract the
            pose although LIBERO's actions are increments already; not so in its π₀.₅ config.
        layout, dtype: of both images, see `Camera`; LeRobot's datasets have "chw" and "float32".
    """
    robot = _with_images("libero", layout, dtype)
    if not delta_actions:
        return robot
    pose = (dataclasses.replace(action, kind="delta") for action in robot.actions[:6])
    return dataclasses.replace(robot, actions=(*pose, *robot.actions[6:]))


def _with_images(name: str, layout: str, dtype: str) -> Embodiment:
    robot = read_embodiment(ROBOT_FILES[name])
    cameras = (
        dataclasses.replace(camera, layout=layout, dtype=dtype) if camera.key else camera for camera in robot.cameras
    )
    return dataclasses.replace(robot, cameras=tuple(cameras))


def _of_policy(name: str) -> Embodiment:
    fields = dict(RELEASED["policies"][name])
    robot = _WITH_ARGUMENTS[fields.pop("robot")](**fields.pop("arguments", {}))
    return dataclasses.replace(robot, name=name, **fields)


metaworld: Callable[[], Embodiment] = partial(read_embodiment, ROBOT_FILES["metaworld"])
_WITH_ARGUMENTS: dict[str, Callable[..., Embodiment]] = {"aloha": aloha, "droid": droid, "libero": libero}
EMBODIMENTS: dict[str, Callable[[], Embodiment]] = (
    {**_WITH_ARGUMENTS, "metaworld": metaworld}
    | {name: partial(read_embodiment, file) for name, file in ROBOT_FILES.items()}
    | _WITH_ARGUMENTS  # override their files
    | {name: partial(_of_policy, name) for name in RELEASED["policies"]}
)
