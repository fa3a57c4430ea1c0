"""From a data set's frame to what the robot itself would send."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchpi.data import format as lerobot
from torchpi.errors import DatasetError, UnknownKeyError
from torchpi.robots import Camera, Embodiment
from torchpi.robots.embodiment import nested


def to_observation(frame: Mapping[str, Any], embodiment: Embodiment) -> dict[str, Any]:
    """A frame of a `LeRobotDataset` as the embodiment's observation, with "actions" and "prompt", for
    `Embodiment.to_model`.

    Cameras are matched by the last part of their keys: "observation.images.cam_high" is "images.cam_high" of the robot,
    "observation.images.base" is "base". Cameras that the model doesn't read are left out.

    Args:
        frame: images uint8 [h, w, 3], "observation.state" [s], "action" [H, a] and "task", as far as it has them.

    Returns:
        Nested dicts; images in the layout and dtype that the embodiment states.

    Raises:
        KeyError: the data set doesn't have a required camera, or no state.
        ValueError: a state or action of another length than the embodiment's; two cameras with the same last part.
    """
    flat: dict[str, Any] = {}
    keys = _image_keys(frame)
    for camera in embodiment.read_cameras:
        if camera.key is None:
            continue
        key = keys.get(_last(camera.key))
        if key is not None:
            flat[camera.key] = _in_layout_of(camera, frame[key])
        elif camera.presence == "required":
            raise _no_camera(camera, embodiment, keys)
    if lerobot.STATE not in frame:
        raise UnknownKeyError(f"The frame has no {lerobot.STATE}; it has {', '.join(frame)}.")
    check_dims(embodiment, state=frame[lerobot.STATE].shape[-1])
    start = 0
    for part in embodiment.state:  # only the last one may be shorter
        flat[part.key] = frame[lerobot.STATE][start : start + len(part.names)]
        start += len(part.names)
    if lerobot.ACTION in frame:
        check_dims(embodiment, action=frame[lerobot.ACTION].shape[-1])
        flat["actions"] = frame[lerobot.ACTION]
    if "task" in frame:
        flat["prompt"] = frame["task"]
    return nested(flat)


def camera_keys_of(embodiment: Embodiment, camera_keys: Sequence[str]) -> list[str]:
    """Of a data set's cameras those that the model reads of this embodiment, matched as by `to_observation`.

    Args:
        camera_keys: all cameras of the data set.

    Raises:
        KeyError: a required camera is missing.
    """
    keys = {_last(key): key for key in camera_keys}
    cameras = [camera for camera in embodiment.read_cameras if camera.key is not None]
    for camera in cameras:
        if camera.presence == "required" and _last(camera.key or "") not in keys:
            raise _no_camera(camera, embodiment, keys)
    read = {_last(camera.key or "") for camera in cameras}
    return [key for key in camera_keys if _last(key) in read]


def check_dims(embodiment: Embodiment, *, state: int | None = None, action: int | None = None) -> None:
    """Raises a ValueError if the data set's state or action has another length than the embodiment's."""
    if state is not None and state not in embodiment.state_dims:
        lengths = " or ".join(map(str, embodiment.state_dims))
        raise DatasetError(
            f"The data set's {lerobot.STATE} has {state} dimensions; embodiment '{embodiment.name}' has {lengths}: "
            f"{', '.join(embodiment.state_names)}. Choose the embodiment of the robot that it was recorded with."
        )
    if action is not None and action != embodiment.action_size:
        raise DatasetError(
            f"The data set's {lerobot.ACTION} has {action} dimensions; embodiment '{embodiment.name}' has "
            f"{embodiment.action_size}: {', '.join(dim.name for dim in embodiment.actions)}. Choose the embodiment of "
            "the robot that it was recorded with."
        )


def _no_camera(camera: Camera, embodiment: Embodiment, keys: Mapping[str, str]) -> KeyError:
    """Of a camera that is not among a data set's keys by their last part."""
    read = {_last(other.key or "") for other in embodiment.read_cameras}
    unread = [key for last, key in keys.items() if last not in read]
    old = unread[0] if len(unread) == 1 else "NAME"
    option = f"--rename {old}={lerobot.IMAGES}{_last(camera.key or '')}"
    return KeyError(
        f"The data set has no camera for {camera.key}, which embodiment '{embodiment.name}' requires; its cameras are "
        f"{', '.join(keys) or 'none'}. Choose the robot's embodiment"
        + (f", or if {' or '.join(unread)} is the camera, say so: {option}, or rename= in Python." if unread else ".")
    )


def _image_keys(frame: Mapping[str, Any]) -> dict[str, str]:
    """The keys of the images by their last part."""
    keys: dict[str, str] = {}
    for key, value in frame.items():
        if not (isinstance(value, np.ndarray) and value.ndim == 3 and value.dtype == np.uint8):
            continue
        if _last(key) in keys:
            raise DatasetError(
                f"The data set has two cameras that end in {_last(key)}, {keys[_last(key)]} and {key}; they can't be "
                f"told apart. Rename one: --rename {key}={lerobot.IMAGES}NAME, or rename= in Python."
            )
        keys[_last(key)] = key
    return keys


def _last(key: str) -> str:
    return re.split(r"[./]", key)[-1]


def _in_layout_of(camera: Camera, image: np.ndarray) -> np.ndarray:
    if camera.dtype == "float32":
        image = image.astype(np.float32) / 255
    return np.moveaxis(image, -1, 0) if camera.layout == "chw" else image
