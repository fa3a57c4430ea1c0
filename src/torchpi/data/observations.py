"""Conversion of a dataset's frame to the observation that the robot itself would send."""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data.names import names_determine_order, order_of
from torchpi.errors import DatasetError, UnknownKeyError, counted, listed
from torchpi.robots import Camera, Embodiment
from torchpi.robots.keys import nest


def to_observation(frame: Mapping[str, Any], embodiment: Embodiment) -> dict[str, Any]:
    """Convert a frame of a `LeRobotDataset` to the embodiment's observation, with "actions" and "prompt", as
    `Embodiment.to_model` takes it.

    Cameras are matched by the last part of their keys: "observation.images.cam_high" is the robot's "images.cam_high",
    "observation.images.base" its "base". Cameras that the model doesn't read are left out.

    Args:
        frame: images uint8 [h, w, 3], depths float32 [h, w, 1] in metres, "observation.state" [s], "action" [H, a] and
            "task"; all optional except what the embodiment requires.

    Returns:
        Nested dicts, with images in the embodiment's layout and dtype.

    Raises:
        KeyError: the dataset has no state, or lacks a required camera.
        ValueError: state or action has another length than the embodiment's; two cameras with the same last part; a
            depth camera where the embodiment has an RGB camera, or the other way round.
    """
    arrays = {key: value for key, value in frame.items() if isinstance(value, np.ndarray)}
    depths = [key for key, value in arrays.items() if value.dtype == np.float32 and value.shape[2:] == (1,)]
    images = [key for key, value in arrays.items() if value.dtype == np.uint8 and value.ndim == 3]
    matched = _matched(embodiment, [*images, *depths], depths)
    flat = {str(camera.key): camera.as_sent(frame[key]) for camera, key in matched}
    if embodiment.state and lerobot.STATE not in frame:
        raise UnknownKeyError(f"The frame has no {lerobot.STATE}; it has {', '.join(frame)}.")
    check_dims(embodiment, state=frame[lerobot.STATE].shape[-1] if embodiment.state else None)
    start = 0
    for part in embodiment.state:  # only the last one may be shorter
        flat[part.key] = frame[lerobot.STATE][start : start + len(part.names)]
        start += len(part.names)
    if lerobot.ACTION in frame:
        check_dims(embodiment, action=frame[lerobot.ACTION].shape[-1])
        flat["actions"] = frame[lerobot.ACTION]
    if "task" in frame:
        flat["prompt"] = frame["task"]
    return nest(flat)


def camera_keys_of(embodiment: Embodiment, camera_keys: Sequence[str], depth_keys: Collection[str] = ()) -> list[str]:
    """The cameras of a dataset (`depth_keys`: depth cameras) that the model reads, matched as by `to_observation`."""
    read = {key for _, key in _matched(embodiment, camera_keys, depth_keys)}
    return [key for key in camera_keys if key in read]


def check_dims(embodiment: Embodiment, *, state: int | None = None, action: int | None = None) -> None:
    """Raise an error if the dataset has no state, or its state or action has another length than the embodiment's."""
    if state == 0 and embodiment.state:
        raise UnknownKeyError(
            f"The dataset has no {lerobot.STATE}, from which embodiment '{embodiment.name}' reads "
            f"{', '.join(embodiment.state_names)}. If another column holds the state, rename it: --rename NAME="
            f'{lerobot.STATE}, or rename= in Python; a policy without state needs an embodiment with "state": [].'
        )
    for key, found, expected, names in (
        (lerobot.STATE, state, embodiment.state_dims, embodiment.state_names),
        (lerobot.ACTION, action, (embodiment.action_size,), embodiment.action_names),
    ):
        if found is not None and found not in expected:
            raise DatasetError(
                f"The dataset's {key} has {counted(found, 'dimension')}; embodiment '{embodiment.name}' has "
                f"{listed(expected, 'or')}: {', '.join(names)}. Choose the robot that the dataset was recorded with."
            )


def in_robot_order(
    embodiment: Embodiment, columns: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str] | None], where: object
) -> dict[str, list[int]]:
    """Indices of the robot's dimensions in a dataset's "observation.state" [F, s] and "action" [F, a], by key.

    Dimensions are matched by name, see `names.order_of`; without names the order is kept. Warns if it changes.
    """
    s, a = (columns[key].shape[1] for key in (lerobot.STATE, lerobot.ACTION))
    s = s if embodiment.state else 0  # the policy doesn't read the state
    check_dims(embodiment, state=s, action=a)
    order = {lerobot.STATE: list(range(s)), lerobot.ACTION: list(range(a))}
    robot_names = {lerobot.STATE: embodiment.state_names[:s], lerobot.ACTION: embodiment.action_names}
    reordered = []
    for key, expected in robot_names.items():
        found = names[key]
        if not expected or found is None:
            continue
        order[key] = robot_order(found, expected, f"{where}: {key}", embodiment.name)
        if order[key] != sorted(order[key]):
            reordered.append(key)
            # A fixed stack level shows the warning once, not for every dataset that is opened.
            warnings.warn(
                f"{where}: {key} has {', '.join(found)}; embodiment '{embodiment.name}' has {', '.join(expected)}. "
                "They are put into that order.",
                UserWarning,
                stacklevel=1,
            )
    for key, other in ((lerobot.STATE, lerobot.ACTION), (lerobot.ACTION, lerobot.STATE)):
        if s == a and key in reordered and not names_determine_order(names[other], robot_names[other]):
            raise DatasetError(
                f"{where}: {key} has {', '.join(names[key] or ())}, another order than embodiment '{embodiment.name}', "
                f"and the names of {other} ({', '.join(names[other] or ['none'])}) don't tell whether it has that "
                f"order, too. Write its names, in its own order, in {lerobot.INFO}."
            )
    _check_deltas(embodiment, order, names, where)
    return order


def _check_deltas(
    embodiment: Embodiment, order: Mapping[str, list[int]], names: Mapping[str, Sequence[str] | None], where: object
) -> None:
    """Raise an error if delta actions would be taken relative to other joints of the state."""
    state_names, action_names = names[lerobot.STATE], names[lerobot.ACTION]
    deltas = [i for i, is_delta in enumerate(embodiment.action_mask) if is_delta]
    if not (state_names and action_names and order[lerobot.STATE] and deltas):
        return
    actions = [action_names[order[lerobot.ACTION][i]] for i in deltas]
    base = [state_names[order[lerobot.STATE][i]] for i in deltas]
    try:
        agree = order_of(actions, base) == list(range(len(deltas)))
    except DatasetError:
        agree = False
    if not agree:
        raise DatasetError(
            f"{where}: the actions {', '.join(actions)} would be taken relative to the state's {', '.join(base)}, "
            f"which are other joints. Make them absolute in embodiment '{embodiment.name}', or give it the dataset's "
            "names."
        )


def robot_order(found: Sequence[str], expected: Sequence[str], column: str, robot: str) -> list[int]:
    """`order_of`, with an error that names the column and the robot."""
    try:
        return order_of(found, expected)
    except DatasetError as error:
        raise DatasetError(
            f"{column} has {', '.join(found)}; embodiment '{robot}' has {', '.join(expected)}: {error}. Choose the "
            "robot's embodiment, or give it the dataset's names; to use other columns, join them with --rename; if the "
            f"dataset's names are wrong, correct them in {lerobot.INFO} (null: keep the order)."
        ) from error


def _matched(embodiment: Embodiment, keys: Sequence[str], depth_keys: Collection[str]) -> list[tuple[Camera, str]]:
    """The cameras that the model reads, with their keys in the dataset; without missing optional ones."""
    matched = []
    for camera in embodiment.read_cameras:
        same_name = [key for key in keys if camera.key is not None and _last(key) == _last(camera.key)]
        found = [key for key in same_name if (key in depth_keys) == (camera.depth is not None)]
        if same_name and not found:
            raise _wrong_camera_kind(camera, same_name[0])
        if len(found) > 1:
            raise DatasetError(
                f"The dataset has two cameras that end in {_last(found[0])}, {found[0]} and {found[1]}, which is "
                f"ambiguous. Rename one: --rename {found[1]}={lerobot.IMAGES}NAME, or rename= in Python."
            )
        if not found and camera.presence == "required" and camera.key is not None:
            raise _missing_camera(camera.key, embodiment, keys)
        matched += [(camera, key) for key in found]
    return matched


def _wrong_camera_kind(camera: Camera, key: str) -> DatasetError:
    if camera.depth is not None:
        return DatasetError(
            f"{key} has colours, but the embodiment's camera {camera.key} maps depth. Choose another camera (--rename "
            f'NAME={key}), or remove "depth" from the embodiment\'s camera.'
        )
    return DatasetError(
        f"{key} is a depth camera, but the model reads colours. Choose another camera (--rename NAME={key}), or map "
        f'depth to colours in the embodiment\'s camera {camera.key}: "dtype": "any", "depth": {{"near": 0.2, "far": 2, '
        '"unit": "mm", "colormap": "grey"}, in metres, with the unit that the robot sends.'
    )


def _missing_camera(missing: str, embodiment: Embodiment, keys: Sequence[str]) -> UnknownKeyError:
    read = {_last(camera.key or "") for camera in embodiment.read_cameras}
    unread = [key for key in keys if _last(key) not in read]
    message = (
        f"The dataset has no camera for {missing}, which embodiment '{embodiment.name}' requires; its cameras are "
        f"{', '.join(map(_last, keys)) or 'none'}. Choose the robot's embodiment"
    )
    if unread:
        option = f"--rename {unread[0] if len(unread) == 1 else 'NAME'}={lerobot.IMAGES}{_last(missing)}"
        message += f", or, if {listed(unread, 'or')} is this camera, rename it: {option}, or rename= in Python"
    return UnknownKeyError(f"{message}.")


def _last(key: str) -> str:
    return re.split(r"[./]", key)[-1]
