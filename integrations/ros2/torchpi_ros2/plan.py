"""Combination of the settings with the server's metadata: inputs, commands, or an error that names the mismatch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchpi_client import ActionLimits, ControlSettings
from torchpi_client.robot import check_commands
from torchpi_ros2.config import TRAJECTORY, CameraTopic, Config, Dimension, Output
from torchpi_ros2.images import read_image

TURNS = 6 * math.pi
"""Larger than any joint's training range in radians; ranges in degrees exceed it."""


@dataclasses.dataclass(frozen=True)
class Camera:
    """Camera topic, and the image format that the policy expects."""

    topic: CameraTopic
    layout: str = "hwc"
    """"hwc" or "chw"."""
    dtype: str = "uint8"
    """"uint8" or "float32" (0 to 1) for colours, "uint16" or "float32" for depth."""

    def read(self, message: Any) -> np.ndarray:
        """Convert a message to an image; raises an UnusableError as `read_image` does."""
        image = read_image(message, self.topic.type, self.topic.depth_unit)
        if self.topic.depth_unit is not None:
            if self.dtype == "uint16":
                image = np.rint(np.nan_to_num(image, nan=0, posinf=65535, neginf=0)).clip(0, 65535)
            image = image[..., None]
        elif self.dtype == "float32":
            image = image.astype(np.float32) / 255
        image = np.moveaxis(image, -1, 0) if self.layout == "chw" else image
        return np.ascontiguousarray(image, self.dtype)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the node needs to know about the robot and the policy."""

    cameras: tuple[Camera, ...]
    state: Mapping[str, tuple[str, ...]]
    """Dimension names for each state key of the observation, in the policy's order."""
    action_names: tuple[str, ...]
    """In the policy's order; each is in one output."""
    commands: tuple[str, ...]
    """Command of each action, see torchpi_client.robot.COMMANDS."""
    outputs: tuple[Output, ...]
    settings: ControlSettings


def make_plan(config: Config, metadata: Mapping[str, Any]) -> Plan:
    """Combine the settings with a server's metadata.

    Raises:
        ValueError: they contradict each other, or neither states a required value.
    """
    expected = metadata.get("observation") or {}
    names = _action_names(config, metadata.get("action_names"))
    settings = _settings(config, metadata, names)
    commands = check_commands(settings.action_commands, metadata)
    if len(commands) != len(names):
        raise ValueError(
            f"The outputs have {len(names)} dimensions ({', '.join(names)}), but there are {len(commands)} commands "
            "(action_commands); expected one for each."
        )
    for output in config.actions:
        others = [one.name for one in output.dimensions if commands[names.index(one.name)] != "position"]
        if output.type == TRAJECTORY and others:
            raise ValueError(
                f"{output.topic} is a trajectory of positions, but {', '.join(others)} are not position commands; "
                "send them as std_msgs/msg/Float64MultiArray to a matching controller."
            )
    _check_units(config, metadata, names, commands)
    if config.prompt is None and config.prompt_topic is None and metadata.get("default_prompt", "") is None:
        raise ValueError("Neither the settings nor the server have an instruction; set prompt or prompt_topic.")
    return Plan(
        _cameras(config.cameras, expected.get("cameras")),
        _state(config, expected.get("state")),
        names,
        commands,
        config.actions,
        settings,
    )


def _cameras(topics: Sequence[CameraTopic], stated: Sequence[Mapping[str, Any]] | None) -> tuple[Camera, ...]:
    if stated is None:  # openpi's server
        return tuple(Camera(topic, dtype="float32" if topic.depth_unit else "uint8") for topic in topics)
    known = {camera["key"]: camera for camera in stated}
    given = [topic.key for topic in topics]
    unknown = [key for key in given if key not in known]
    missing = [key for key, camera in known.items() if camera["presence"] == "required" and key not in given]
    if unknown or missing:
        raise ValueError(
            f"The policy reads the cameras {', '.join(known)}; the settings have {', '.join(given)}: "
            f"{', '.join(unknown) or 'none'} unknown, {', '.join(missing) or 'none'} missing."
        )
    cameras = []
    for topic in topics:
        camera = known[topic.key]
        unit = camera.get("depth_unit")
        if topic.depth_unit not in (None, unit):
            raise ValueError(
                f"cameras, {topic.key!r}: depth_unit is {topic.depth_unit}, but the policy reads "
                f"{'colours' if unit is None else f'depth in {unit}'}; leave it out."
            )
        dtype = camera["dtype"] if camera["dtype"] != "any" else "float32" if unit else "uint8"
        cameras.append(Camera(dataclasses.replace(topic, depth_unit=unit), camera["layout"], dtype))
    return tuple(cameras)


def _state(config: Config, stated: Sequence[Mapping[str, Any]] | None) -> dict[str, tuple[str, ...]]:
    given: dict[str, list[str]] = {}
    for part in config.state:
        given.setdefault(part.key, []).extend(dimension.name for dimension in part.dimensions)
    if stated is None:
        return {key: tuple(names) for key, names in given.items()}
    known = {part["key"]: list(part["names"]) for part in stated}
    if set(known) != set(given):
        raise ValueError(
            f"The policy reads the state {', '.join(known) or 'of none'}; the settings have "
            f"{', '.join(given) or 'none'}. The keys must be the same."
        )
    for key, names in given.items():
        # A policy may take a state without its last dimensions; the server checks that.
        if set(names) != set(known[key][: len(names)]):
            raise ValueError(
                f"state, {key!r} has the dimensions {', '.join(names)}; the policy reads {', '.join(known[key])}. "
                "The names in joints must be the policy's."
            )
    return {key: tuple(names[: len(given[key])]) for key, names in known.items()}


def _action_names(config: Config, stated: Sequence[str] | None) -> tuple[str, ...]:
    given = [dimension.name for output in config.actions for dimension in output.dimensions]
    if not stated:
        return tuple(given)
    if twice := sorted({name for name in stated if list(stated).count(name) > 1}):
        raise ValueError(
            f"The policy's actions have the name {', '.join(twice)} more than once; rename them in its file."
        )
    if set(given) != set(stated):
        unknown, missing = sorted(set(given) - set(stated)), sorted(set(stated) - set(given))
        raise ValueError(
            f"The policy's actions are {', '.join(stated)}; the outputs carry {', '.join(given)}: "
            f"{', '.join(unknown) or 'none'} unknown, {', '.join(missing) or 'none'} missing. The names in joints must "
            "be the policy's, and each must be in exactly one output."
        )
    return tuple(stated)


def _settings(config: Config, metadata: Mapping[str, Any], names: Sequence[str]) -> ControlSettings:
    known = {field.name for field in dataclasses.fields(ControlSettings)} - {"limits", "start"}
    if unknown := sorted(set(config.control) - known):
        raise ValueError(f"control has the unknown key {', '.join(unknown)}; expected {', '.join(sorted(known))}.")
    try:
        settings = ControlSettings(**config.control, limits=_limits(config, metadata, names))
    except ValueError as error:
        raise ValueError(f"control: {error}") from error
    settings.rates(metadata.get("control_hz"))
    return settings


def _limits(config: Config, metadata: Mapping[str, Any], names: Sequence[str]) -> ActionLimits | None:
    if config.limits == "none":
        return None
    stated = any(metadata.get(name) is not None for name in ("action_limits", "action_range"))
    if config.limits == "server" and not stated:
        raise ValueError(
            "The server states no action limits; set limits: a table of dimensions with low, high and max_step, "
            'or "none".'
        )
    unlimited = ActionLimits.of([None] * len(names), [None] * len(names))
    limits = ActionLimits.from_metadata(metadata) if stated else unlimited
    if isinstance(config.limits, str):
        return limits
    if unknown := [name for name in config.limits if name not in names]:
        raise ValueError(f"limits has {', '.join(unknown)}; the policy's actions are {', '.join(names)}.")
    ends = {field: getattr(limits, field).copy() for field in ("low", "high", "max_step")}
    for name, values in config.limits.items():
        for field, value in values.items():
            ends[field][names.index(name)] = value
    return ActionLimits(**ends)


def _check_units(config: Config, metadata: Mapping[str, Any], names: Sequence[str], commands: Sequence[str]) -> None:
    """Raise a ValueError if the positions' training range shows another unit than the settings state."""
    trained = metadata.get("action_range")
    if trained is None:
        return
    angles: dict[str, list[tuple[Dimension, float]]] = {"rad": [], "deg": []}
    for output in config.actions:
        for dimension in output.dimensions:
            index = names.index(dimension.name)
            if dimension.unit in angles and commands[index] == "position":
                reach = max(abs(trained["low"][index]), abs(trained["high"][index]))
                angles[dimension.unit].append((dimension, reach))
    beyond = [f"{dimension.name} {reach:.4g}" for dimension, reach in angles["rad"] if reach > TURNS]
    if beyond:
        raise ValueError(
            f"The unit of joints is stated as rad, but the policy was trained with positions of up to "
            f"{', '.join(beyond)}, which are degrees or another unit; state that unit."
        )
    degrees = angles["deg"]
    if degrees and max(reach for _, reach in degrees) <= 2 * math.pi:
        raise ValueError(
            f"The unit of {', '.join(dimension.name for dimension, _ in degrees)} is stated as deg, but the policy was "
            f"trained with positions within ±{max(reach for _, reach in degrees):.3g}, which are radians; state rad. "
            "If they are degrees, set scale: 57.29578 instead of the unit."
        )
