"""Conversion of joints between ROS and the policy: JointState to state values, actions to command messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from torchpi_ros2.config import TRAJECTORY, Dimension, Output
from torchpi_ros2.errors import UnusableError


def read_joints(message: Any, dimensions: Sequence[Dimension]) -> np.ndarray | None:
    """Read the policy's state values, float32 [n], from a JointState with its joints in any order.

    Returns:
        None for a message that has none of these joints, because several publishers may share a topic.

    Raises:
        UnusableError: a joint is missing, duplicated or has no value, or a value is not finite.
    """
    names = list(message.name)
    wanted = [dimension.joint for dimension in dimensions]
    if not set(wanted) & set(names):
        return None
    if missing := [joint for joint in wanted if joint not in names]:
        raise UnusableError(
            f"the message has the joints {', '.join(names)}, without {', '.join(missing)}; joints of another publisher "
            "need their own entry in the list of this state"
        )
    if twice := sorted({joint for joint in wanted if names.count(joint) > 1}):
        raise UnusableError(f"the message has {', '.join(twice)} more than once")
    values = []
    for dimension in dimensions:
        array, index = getattr(message, dimension.field), names.index(dimension.joint)
        if index >= len(array):
            raise UnusableError(
                f"the message has {len(names)} joints, but {len(array)} numbers of {dimension.field}; expected one of "
                f"{dimension.joint}"
            )
        value = float(array[index])
        if not math.isfinite(value):
            raise UnusableError(f"the {dimension.field} of {dimension.joint} is {value}")
        values.append(dimension.scale * value + dimension.offset)
    return np.array(values, np.float32)


def to_ros(value: float, dimension: Dimension, command: str) -> float:
    """Convert an action value to ROS's unit; only positions have an offset."""
    return (value - (dimension.offset if command == "position" else 0.0)) / dimension.scale


def command_message(types: Callable[[str], Any], output: Output, values: Sequence[float], period: float) -> Any:
    """Build the message of one command.

    Args:
        types: returns the message class of a name such as "std_msgs/msg/Header".
        values: in ROS's units, in the order of the output's dimensions.
        period: control period in seconds.
    """
    if output.type != TRAJECTORY:
        layout = types("std_msgs/msg/MultiArrayLayout")(dim=[], data_offset=0)
        return types(output.type)(layout=layout, data=list(values))
    point = types("trajectory_msgs/msg/JointTrajectoryPoint")(
        positions=list(values),
        velocities=[],
        accelerations=[],
        effort=[],
        time_from_start=_duration(types, period if output.time_from_start is None else output.time_from_start),
    )
    # A stamp of 0 means now, so the controller's clock may differ from this machine's.
    header = types("std_msgs/msg/Header")(stamp=types("builtin_interfaces/msg/Time")(sec=0, nanosec=0), frame_id="")
    names = [dimension.joint for dimension in output.dimensions]
    return types(TRAJECTORY)(header=header, joint_names=names, points=[point])


def _duration(types: Callable[[str], Any], seconds: float) -> Any:
    nanoseconds = round(1e9 * seconds)
    return types("builtin_interfaces/msg/Duration")(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
