"""From a dataset's frame to the observation that the robot itself would send."""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data.names import order_of, tell_order
from torchpi.errors import DatasetError, UnknownKeyError, counted, listed
from torchpi.robots import Camera, Embodiment
from torchpi.robots.keys import nest


def to_observation(frame: Mapping[str, Any], embodiment: Embodiment) -> dict[str, Any]:
    """A frame of a `LeRobotDataset` as the embodiment's observation, with "actions" and "prompt", for
    `Embodiment.to_model`.

    Cameras are matched by the last part of their keys: "observation.images.cam_high" is "images.cam_high" of the robot,
    "observation.images.base" is "base". Cameras that the model doesn't read are left out.

    Args:
        frame: images uint8 [h, w, 3] and depths float32 [h, w, 1] in metres, "observation.state" [s], "action" [H, a]
            and "task", as far as it has them.

    Returns:
        Nested dicts; images in the layout and dtype that the embodiment states.

    Raises:
        KeyError: the dataset doesn't have a required camera, or no state.
        ValueError: a state or action of another length than the embodiment's; two cameras with the same last part; a
            depth camera where the embodiment has an RGB one, or the other way round.
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
    """The cameras of a dataset, of which some are depth cameras, that the model reads of this embodiment; matched, or
    refused, as by `to_observation`."""
    read = {key for _, key in _matched(embodiment, camera_keys, depth_keys)}
    return [key for key in camera_keys if key in read]


def check_dims(embodiment: Embodiment, *, state: int | None = None, action: int | None = None) -> None:
    """Raise an error if the dataset's state or action has another length than the embodiment's, or it has no state."""
    if state == 0 and embodiment.state:
        raise UnknownKeyError(
            f"The dataset has no {lerobot.STATE}, of which embodiment '{embodiment.name}' reads "
            f"{', '.join(embodiment.state_names)}. If another of its columns is the state, say so: --rename NAME="
            f'{lerobot.STATE}, or rename= in Python; a policy without state needs an embodiment with "state": [].'
        )
    for key, found, fitting, names in (
        (lerobot.STATE, state, embodiment.state_dims, embodiment.state_names),
        (lerobot.ACTION, action, (embodiment.action_size,), embodiment.action_names),
    ):
        if found is not None and found not in fitting:
            raise DatasetError(
                f"The dataset's {key} has {counted(found, 'dimension')}; embodiment '{embodiment.name}' has "
                f"{listed(fitting, 'or')}: {', '.join(names)}. Choose the robot that it was recorded with."
            )


def in_robot_order(
    embodiment: Embodiment, columns: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str] | None], where: object
) -> dict[str, list[int]]:
    """The places of the robot's dimensions among those of a dataset's "observation.state" [F, s] and "action" [F, a],
    by their names, see `names.order_of`; None: the order decides. Warns about another order than the robot's."""
    s, a = (columns[key].shape[1] for key in (lerobot.STATE, lerobot.ACTION))
    s = s if embodiment.state else 0  # a state that the policy doesn't read
    check_dims(embodiment, state=s, action=a)
    order = {lerobot.STATE: list(range(s)), lerobot.ACTION: list(range(a))}
    robots = {lerobot.STATE: embodiment.state_names[:s], lerobot.ACTION: embodiment.action_names}
    for key, expected in robots.items():
        if expected and (found := names[key]) is not None:
            order[key] = robot_order(found, expected, f"{where}: {key}", embodiment.name)
            if order[key] != sorted(order[key]):
                # The same place in the code for every dataset that is opened: said once.
                warnings.warn(
                    f"{where}: {key} has {', '.join(found)}; embodiment '{embodiment.name}' has {', '.join(expected)}. "
                    "They are put into that order.",
                    UserWarning,
                    stacklevel=1,
                )
    for key, other in ((lerobot.STATE, lerobot.ACTION), (lerobot.ACTION, lerobot.STATE)):
        if s == a and order[key] != sorted(order[key]) and not tell_order(names[other], robots[other]):
            raise DatasetError(
                f"{where}: {key} has {', '.join(names[key] or ())}, another order than embodiment '{embodiment.name}', "
                f"and the names of {other} ({', '.join(names[other] or ['none'])}) don't tell whether it has that one, "
                f"too. Write its names, in its own order, in {lerobot.INFO}."
            )
    state, action = ([found[i] for i in places] if (found := names[key]) else None for key, places in order.items())
    deltas = [i for i, is_delta in enumerate(embodiment.action_mask) if is_delta]
    if state and action and deltas:
        moved, base = [action[i] for i in deltas], [state[i] for i in deltas]
        try:
            agree = order_of(moved, base) == list(range(len(deltas)))
        except DatasetError:
            agree = False
        if not agree:
            raise DatasetError(
                f"{where}: the actions {', '.join(moved)} would be taken relative to the state's {', '.join(base)}, "
                f"which are other joints. Make them absolute in embodiment '{embodiment.name}', or give it the "
                "dataset's names."
            )
    return order


def robot_order(found: Sequence[str], expected: Sequence[str], column: str, robot: str) -> list[int]:
    """`order_of`, with an error that says which column and which robot."""
    try:
        return order_of(found, expected)
    except DatasetError as error:
        raise DatasetError(
            f"{column} has {', '.join(found)}; embodiment '{robot}' has {', '.join(expected)}: {error}. Choose the "
            "robot's embodiment, or give it the dataset's names; if other columns are meant, join them with --rename; "
            f"if the dataset's names are wrong, correct them in {lerobot.INFO} (null: the order decides)."
        ) from error


def _matched(embodiment: Embodiment, keys: Sequence[str], depth_keys: Collection[str]) -> list[tuple[Camera, str]]:
    """The cameras that the model reads, each with its key in the dataset; without optional ones that are missing."""
    matched = []
    for camera in embodiment.read_cameras:
        named = [key for key in keys if camera.key is not None and _last(key) == _last(camera.key)]
        found = [key for key in named if (key in depth_keys) == (camera.depth is not None)]
        if named and not found:
            raise _other_kind(camera, named[0])
        if len(found) > 1:
            raise DatasetError(
                f"The dataset has two cameras that end in {_last(found[0])}, {found[0]} and {found[1]}; they can't be "
                f"told apart. Rename one: --rename {found[1]}={lerobot.IMAGES}NAME, or rename= in Python."
            )
        if not found and camera.presence == "required" and camera.key is not None:
            raise _no_camera(camera.key, embodiment, keys)
        matched += [(camera, key) for key in found]
    return matched


def _other_kind(camera: Camera, key: str) -> DatasetError:
    advice = f"Choose another camera (--rename NAME={key}), or "
    if camera.depth is not None:
        found, way = f"has colours, but the embodiment's camera {camera.key} maps depth", 'leave "depth" out of it'
    else:
        found = "is a depth camera, and the model reads colours"
        way = f'map depth to colours in the embodiment\'s camera {camera.key}: "dtype": "any", "depth": {{"near": 0.2, '
        way += '"far": 2, "unit": "mm", "colormap": "grey"}, in metres, with the unit that the robot sends'
    return DatasetError(f"{key} {found}. {advice}{way}.")


def _no_camera(missing: str, embodiment: Embodiment, keys: Sequence[str]) -> UnknownKeyError:
    read = {_last(camera.key or "") for camera in embodiment.read_cameras}
    unread = [key for key in keys if _last(key) not in read]
    option = f"--rename {unread[0] if len(unread) == 1 else 'NAME'}={lerobot.IMAGES}{_last(missing)}"
    return UnknownKeyError(
        f"The dataset has no camera for {missing}, which embodiment '{embodiment.name}' requires; its cameras are "
        f"{', '.join(map(_last, keys)) or 'none'}. Choose the robot's embodiment"
        + (f", or if {listed(unread, 'or')} is the camera, say so: {option}, or rename= in Python." if unread else ".")
    )


def _last(key: str) -> str:
    return re.split(r"[./]", key)[-1]
