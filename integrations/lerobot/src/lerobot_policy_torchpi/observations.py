"""Conversion of LeRobot's batches to the robot's observations, as the policy's metadata describe them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lerobot_policy_torchpi.errors import MissingKeyError, PluginError

STATE, ACTION, IMAGE = "observation.state", "action", "observation.image"
"""LeRobot's keys; camera keys begin with IMAGE."""
_ROUNDING = 1e-3
"""Tolerance for image values outside [0, 1], caused by resizing."""


def require_format(metadata: Mapping[str, Any], source: str) -> None:
    """Refuse a policy whose metadata do not describe observations and actions, such as openpi's server's."""
    if missing := [name for name in ("observation", "action_names", "action_horizon") if not metadata.get(name)]:
        raise PluginError(
            f"{source} does not state {', '.join(missing)} in its metadata, so LeRobot's cameras and state can't be "
            "matched with the policy's. Serve the checkpoint with torchpi serve, with a config that states its horizon."
        )


def check_features(config: Any, metadata: Mapping[str, Any]) -> None:
    """Compare the known features of LeRobot's dataset or environment with the policy's, and the number of executed
    actions with the length of its chunks.

    Raises:
        KeyError: a camera or the state is missing.
        ValueError: state or actions have another size; a chunk has fewer actions.
    """
    if (config.n_action_steps or 0) > metadata["action_horizon"]:
        raise PluginError(
            f"n_action_steps is {config.n_action_steps}; the policy's chunks have {metadata['action_horizon']} actions."
        )
    names = list(metadata["action_names"])
    action = (config.output_features or {}).get(ACTION)
    if action is not None and action.shape[0] != len(names):
        raise PluginError(
            f"LeRobot's {ACTION} has {action.shape[0]} dimensions, the policy's has {len(names)}: "
            f"{', '.join(names)}. Use a policy for this robot."
        )
    if not (features := config.input_features):
        return
    form = metadata["observation"]
    match_cameras(form, [key for key in features if key.startswith(IMAGE)], config.cameras)
    if form["state"]:
        if STATE not in features:
            raise _no_state(form, list(features))
        _check_state(form, features[STATE].shape[0])


def match_cameras(form: Mapping[str, Any], keys: Sequence[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """Find LeRobot's key for each of the policy's cameras; an optional one may be missing.

    Cameras match if the last parts of their keys are equal, or by `renamed`: {policy's key: LeRobot's key}.

    Raises:
        KeyError: a required camera is missing, or `renamed` names an unknown camera.
        ValueError: several of LeRobot's cameras match, or the policy reads depth.
    """
    own = [camera["key"] for camera in form["cameras"]]
    named = {_one_of(name, own, "The policy"): _one_of(key, keys, "LeRobot's batch") for name, key in renamed.items()}
    matched = {}
    for camera in form["cameras"]:
        key = camera["key"]
        found = [named[key]] if key in named else [other for other in keys if _last(other) == _last(key)]
        if "depth_unit" in camera and found:
            raise PluginError(f"The policy's camera {key} reads depth, which this package does not support.")
        if len(found) > 1:
            raise PluginError(f"{', '.join(found)} end in {_last(key)}; choose the one for {key}: {_option(key)}.")
        if found:
            matched[key] = found[0]
        elif camera["presence"] == "required":
            raise MissingKeyError(
                f"LeRobot's batch has no camera for {key}, which the policy requires; it has "
                f"{', '.join(keys) or 'no image'}, and the policy's cameras are {', '.join(own)}. If one of LeRobot's "
                f"is this camera, pass {_option(key, keys)}."
            )
    return matched


def requests_of(batch: Mapping[str, Any], form: Mapping[str, Any], renamed: Mapping[str, str]) -> list[dict[str, Any]]:
    """Split a batch into the observations that the policy's robot would send; the batch is not changed.

    Args:
        batch: images [B, 3, h, w], in [0, 1] or uint8; "observation.state" [B, s] in the robot's units; "task", one or
            B texts. For a blank task the policy's default prompt is used, if it has one.
        form: "observation" of the policy's metadata.
        renamed: see `match_cameras`.
    """
    cameras = {camera["key"]: camera for camera in form["cameras"]}
    keys = [key for key in batch if key.startswith(IMAGE)]
    matched = match_cameras(form, keys, renamed)
    columns = {key: _as_sent(batch[of], of, cameras[key]) for key, of in matched.items()}
    if form["state"]:
        columns |= _state_parts(batch, form)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if (task := batch.get("task")) is not None:
        tasks = [task] * len(rows) if isinstance(task, str) else list(task)
        if len(tasks) != len(rows):
            raise PluginError(f"The batch has {len(tasks)} tasks for {len(rows)} observations; expected one for each.")
        for row, text in zip(rows, tasks, strict=True):
            row.update({"prompt": text} if text.strip() else {})
    return rows


def _as_sent(images: Tensor, key: str, camera: Mapping[str, Any]) -> np.ndarray:
    """Convert images [B, 3, h, w] to the layout and dtype that the robot sends."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise PluginError(f"{key} is {list(images.shape)}; expected colours, [B, 3, h, w].")
    if images.dtype != torch.uint8:
        low, high = images.min().item(), images.max().item()
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN is neither
            raise PluginError(
                f"{key} is {images.dtype} from {low:g} to {high:g}; expected uint8, or numbers in [0, 1]. The policy "
                "normalizes images itself: leave VISUAL at IDENTITY."
            )
        images = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    array = (images if camera["layout"] == "chw" else images.permute(0, 2, 3, 1)).contiguous().cpu().numpy()
    return array.astype(np.float32) / 255 if camera["dtype"] == "float32" else array


def _state_parts(batch: Mapping[str, Any], form: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parts of the state [B, d], by the robot's keys."""
    if STATE not in batch:
        raise _no_state(form, list(batch))
    state = batch[STATE]
    if state.ndim != 2:
        raise PluginError(f"{STATE} is {list(state.shape)}; expected [B, s], one observation step.")
    _check_state(form, state.shape[1])
    array, parts, start = state.float().cpu().numpy(), {}, 0
    for part in form["state"]:  # the last one may be shorter, which the policy checks
        parts[part["key"]] = array[:, start : start + len(part["names"])]
        start += len(part["names"])
    return parts


def _check_state(form: Mapping[str, Any], found: int) -> None:
    names = [name for part in form["state"] for name in part["names"]]
    shortest = len(names) - len(form["state"][-1]["names"]) + 1
    if not shortest <= found <= len(names):
        raise PluginError(
            f"LeRobot's {STATE} has {found} dimensions, the policy reads {len(names)}: {', '.join(names)}. Use a "
            "policy for this robot."
        )


def _no_state(form: Mapping[str, Any], keys: Sequence[str]) -> MissingKeyError:
    names = [name for part in form["state"] for name in part["names"]]
    return MissingKeyError(
        f"LeRobot's batch has no {STATE}, from which the policy reads {', '.join(names)}; it has {', '.join(keys)}."
    )


def _one_of(key: str, known: Sequence[str], whose: str) -> str:
    found = [each for each in known if key in (each, _last(each))]
    if len(found) != 1:
        raise MissingKeyError(f"{whose} has no camera {key} (option cameras); expected one of {', '.join(known)}.")
    return found[0]


def _option(key: str, keys: Sequence[str] = ()) -> str:
    return f'--policy.cameras=\'{{"{key}": "{keys[0] if len(keys) == 1 else f"{IMAGE}s.NAME"}"}}\''


def _last(key: str) -> str:
    return re.split(r"[./]", key)[-1]
