"""Settings of the node: a YAML file parsed into frozen dataclasses. Unknown keys are errors."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import yaml

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
JOINT_STATE = "sensor_msgs/msg/JointState"
TRAJECTORY, ARRAY = "trajectory_msgs/msg/JointTrajectory", "std_msgs/msg/Float64MultiArray"

UNITS = {"rad": 1.0, "deg": 180 / math.pi, "m": 1.0, "cm": 100.0, "mm": 1000.0}
"""Number of each policy unit per ROS unit (REP 103: radians, metres); velocities are per second."""
FIELDS = ("position", "velocity", "effort")
"""Arrays of a JointState."""
DEPTH_UNITS = {"m": 1.0, "cm": 100.0, "mm": 1000.0}


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One dimension of the policy's state or action as a joint in ROS: policy = scale · ROS + offset."""

    name: str
    """Name in the policy."""
    joint: str
    """Name of the joint in ROS."""
    scale: float
    offset: float = 0.0
    """Applies to positions only, not to increments and velocities."""
    field: str = "position"
    """Array of the JointState to read; one of `FIELDS`."""
    unit: str | None = None
    """Unit of the policy, one of `UNITS`; None if the scale is given instead."""


@dataclasses.dataclass(frozen=True)
class CameraTopic:
    """A camera of the observation."""

    key: str
    """Key in the observation, nested keys joined by '.'."""
    topic: str
    type: str
    """IMAGE or COMPRESSED."""
    depth_unit: str | None = None
    """Unit in which the policy reads a depth camera, one of `DEPTH_UNITS`; None for a colour camera."""


@dataclasses.dataclass(frozen=True)
class StateTopic:
    """Part of a state vector, read from one publisher's messages."""

    key: str
    topic: str
    dimensions: tuple[Dimension, ...]


@dataclasses.dataclass(frozen=True)
class Output:
    """Command topic, and the action dimensions that it carries, in the order of the message."""

    topic: str
    type: str
    """TRAJECTORY or ARRAY."""
    dimensions: tuple[Dimension, ...]
    time_from_start: float | None = None
    """Seconds in which a trajectory controller reaches a command's positions; None: one control period."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the node; docs/ros2.md describes the file.

    Raises:
        ValueError: a dimension or command topic occurs twice, or there is no camera or action.
    """

    server: Mapping[str, Any]
    """Arguments of `WebsocketPolicy`, including the url."""
    cameras: tuple[CameraTopic, ...]
    state: tuple[StateTopic, ...]
    actions: tuple[Output, ...]
    prompt: str | None
    """Instruction; None: the server's default."""
    prompt_topic: str | None
    """std_msgs/String topic whose messages replace the prompt."""
    time: str
    """"header": messages are matched by their stamps; "arrival": by their arrival times."""
    max_age: float
    """Largest age of a message used in an observation, in seconds."""
    slop: float
    """Largest time difference between the messages of an observation, in seconds."""
    wait: float
    """Seconds to wait at the start until all topics have a usable message."""
    stop_after: float
    """Seconds without a usable observation after which the run ends; until then the robot is held."""
    control: Mapping[str, Any]
    """Arguments of `ControlSettings`."""
    limits: str | Mapping[str, Mapping[str, float]]
    """"server", "none", or "low", "high" and "max_step" per dimension, which override the server's."""
    heartbeat_hz: float

    def __post_init__(self) -> None:
        outputs = [dimension.name for output in self.actions for dimension in output.dimensions]
        for what, values in (
            ("The action dimension", outputs),
            ("The command topic", [output.topic for output in self.actions]),
            ("The state dimension", [dimension.name for part in self.state for dimension in part.dimensions]),
        ):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"{what} {', '.join(twice)} occurs more than once; expected it once.")
        if not outputs:
            raise ValueError("No dimension of the action has a topic; expected at least one in actions.")
        if not self.cameras:
            raise ValueError("No camera is configured; expected at least one in cameras.")


def load_config(path: str | pathlib.Path) -> Config:
    """Read the node's YAML file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not YAML, or a key is unknown, missing or of the wrong type.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no settings file {str(path)!r}; pass one as the parameter config.")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        return parse_config(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_config(content: Any) -> Config:
    """Parse the content of a settings file; raises a ValueError as `load_config` does."""
    table = _Table(content, "the file")
    joints = _read_joints(table.take("joints", dict))
    limits = table.take("limits", (str, dict), "server")
    if isinstance(limits, str) and limits not in ("server", "none"):
        raise ValueError(f'limits is {limits!r}; expected "server", "none" or a table of dimensions.')
    config = Config(
        server=_read_server(table.take("server", (str, dict))),
        cameras=tuple(_read_camera(key, value) for key, value in table.take("cameras", dict).items()),
        state=tuple(
            part for key, value in table.take("state", dict, {}).items() for part in _read_state(key, value, joints)
        ),
        actions=tuple(
            _read_output(f"actions, entry {i}", value, joints) for i, value in enumerate(table.take("actions", list))
        ),
        prompt=table.take("prompt", str, None),
        prompt_topic=table.take("prompt_topic", str, None),
        time=table.choice("time", ("header", "arrival"), "header"),
        max_age=table.positive("max_age", 0.5),
        slop=table.positive("slop", 0.05),
        wait=table.positive("wait", 10.0),
        stop_after=table.positive("stop_after", 10.0),
        control=table.take("control", dict, {}),
        limits=limits if isinstance(limits, str) else _read_limits(limits),
        heartbeat_hz=table.positive("heartbeat_hz", 5.0),
    )
    table.check_all_taken()
    return config


def _read_server(value: Any) -> dict[str, Any]:
    # The token is read from the environment (TORCHPI_TOKEN), because settings files are shared.
    table = _Table({"url": value} if isinstance(value, str) else value, "server")
    server = {
        "url": table.take("url", str),
        "timeout": table.positive("timeout", 30.0),
        "answer_timeout": table.positive("answer_timeout", 1.0),
        "jpeg_quality": table.take("jpeg_quality", int, None),
    }
    table.check_all_taken()
    return server


def _read_joints(content: Mapping[str, Any]) -> dict[str, Dimension]:
    joints = {}
    for name, value in content.items():
        table = _Table(value, f"joints, {name!r}")
        unit = table.choice("unit", (None, *UNITS), None)
        field = table.choice("field", FIELDS, "position")
        scale, offset = table.number("scale", None), table.number("offset", None)
        ros, policy = table.take("from", list, None), table.take("to", list, None)
        joint = table.take("joint", str, name)
        table.check_all_taken()
        if [unit is not None, scale is not None, ros is not None or policy is not None].count(True) != 1:
            raise ValueError(
                f"{table.where} states {_listed(value)}; expected one of: unit ({', '.join(UNITS)}), scale (policy = "
                "scale · ROS + offset), or from and to (two positions in ROS, and the policy's values there)."
            )
        if ros is not None or policy is not None:
            if offset is not None:
                raise ValueError(f"{table.where} has an offset in addition to from and to, which already define it.")
            scale, offset = _line(table.where, ros, policy)
        elif unit is not None:
            scale = UNITS[unit]
        if not scale:
            raise ValueError(f"{table.where}: the scale is 0; expected another number.")
        if offset and field != "position":
            raise ValueError(f"{table.where} has an offset and reads {field}; only positions have an offset.")
        joints[name] = Dimension(name, joint, scale, offset or 0.0, field, unit)
    return joints


def _line(where: str, ros: Any, policy: Any) -> tuple[float, float]:
    """Compute scale and offset of the line through two points."""
    for ends in (ros, policy):
        numbers = isinstance(ends, list) and all(_is_number(end) for end in ends)
        if not numbers or len(ends) != 2 or ends[0] == ends[1]:
            raise ValueError(f"{where}: from is {ros} and to is {policy}; expected two different numbers in each.")
    scale = (policy[1] - policy[0]) / (ros[1] - ros[0])
    return scale, policy[0] - scale * ros[0]


def _read_camera(key: str, value: Any) -> CameraTopic:
    table = _Table(value, f"cameras, {key!r}")
    camera = CameraTopic(
        key,
        table.take("topic", str),
        table.choice("type", (IMAGE, COMPRESSED)),
        table.choice("depth_unit", (None, *DEPTH_UNITS), None),
    )
    table.check_all_taken()
    return camera


def _read_state(key: str, value: Any, joints: Mapping[str, Dimension]) -> list[StateTopic]:
    parts = []
    for entry in value if isinstance(value, list) else [value]:
        table = _Table(entry, f"state, {key!r}")
        parts.append(StateTopic(key, table.take("topic", str), _dimensions(table, joints)))
        table.check_all_taken()
    return parts


def _read_output(where: str, value: Any, joints: Mapping[str, Dimension]) -> Output:
    table = _Table(value, where)
    output = Output(
        table.take("topic", str),
        table.choice("type", (TRAJECTORY, ARRAY)),
        _dimensions(table, joints),
        table.positive("time_from_start", None),
    )
    table.check_all_taken()
    if output.time_from_start is not None and output.type != TRAJECTORY:
        raise ValueError(f"{where} has time_from_start, which {output.type} cannot carry.")
    names = [dimension.joint for dimension in output.dimensions]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{where} commands the joint {', '.join(twice)} more than once.")
    return output


def _read_limits(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    limits = {}
    for name, value in content.items():
        table = _Table(value, f"limits, {name!r}")
        found = {field: table.number(field, None) for field in ("low", "high", "max_step")}
        table.check_all_taken()
        limits[name] = {field: number for field, number in found.items() if number is not None}
    return limits


def _dimensions(table: _Table, joints: Mapping[str, Dimension]) -> tuple[Dimension, ...]:
    names = table.take("dimensions", list)
    if not names or (unknown := [name for name in names if not isinstance(name, str) or name not in joints]):
        raise ValueError(
            f"{table.where}: dimensions has {unknown if names else 'no entries'}; expected names of joints: "
            f"{', '.join(joints)}."
        )
    return tuple(joints[name] for name in names)


_REQUIRED = object()


class _Table:
    """Table of the file; each key that is read is recorded, so that unknown keys can be reported."""

    def __init__(self, content: Any, where: str) -> None:
        self.where = where
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise ValueError(f"{where} is {content!r:.80}; expected a table of names and values.")
        self._content = content
        self._known: list[str] = []

    def take(self, key: str, kinds: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """Read a key's value, which must have one of these types."""
        self._known.append(key)
        value = self._content.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.where} has no {key}; found {_listed(self._content)}.")
            return default
        if not isinstance(value, kinds) or isinstance(value, bool):
            expected = " or ".join(_KINDS[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise ValueError(f"{self.where}: {key} is {value!r:.80}; expected {expected}.")
        return value

    def number(self, key: str, default: Any) -> Any:
        """Read a finite number."""
        value = self.take(key, (float, int), default)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{self.where}: {key} is {value}; expected a finite number.")
        return value

    def positive(self, key: str, default: Any) -> Any:
        """Read a positive number."""
        value = self.number(key, default)
        if value is not None and value <= 0:
            raise ValueError(f"{self.where}: {key} is {value}; expected a positive number.")
        return value

    def choice(self, key: str, choices: Sequence[str | None], default: Any = _REQUIRED) -> Any:
        """Read a string, which must be one of the choices."""
        value = self.take(key, str, default)
        if value not in choices:
            expected = ", ".join(choice for choice in choices if choice is not None)
            raise ValueError(f"{self.where}: {key} is {value!r}; expected one of {expected}.")
        return value

    def check_all_taken(self) -> None:
        """Raise a ValueError if there are unknown keys."""
        if unknown := [key for key in self._content if key not in self._known]:
            raise ValueError(
                f"{self.where} has the unknown key {', '.join(unknown)}; expected {', '.join(self._known)}."
            )


_KINDS: Mapping[type, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    dict: "a table of names and values",
    list: "a list",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _listed(content: Mapping[str, Any]) -> str:
    return ", ".join(content) or "nothing"


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, of which the last would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := sorted({key for key in map(str, keys) if list(map(str, keys)).count(key) > 1}):
            raise ValueError(f"{', '.join(twice)} occurs twice in a table{node.start_mark}.")
        return super().construct_mapping(node, deep)
