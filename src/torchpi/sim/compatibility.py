"""Whether a policy can act in an environment, found out before anything runs."""

from collections.abc import Mapping
from typing import Any

from torchpi.errors import SimulationError
from torchpi.robots import Embodiment


def check_embodiment(policy: Embodiment, robot: Embodiment) -> None:
    """Whether the environment sends what the policy reads, and takes what it returns."""
    sides = f"the policy's embodiment {policy.name!r} and the environment's {robot.name!r} do not fit: "
    sent = {camera.key: camera.layout for camera in robot.cameras if camera.key}
    for camera in policy.read_cameras:
        if camera.presence == "required" and camera.key not in sent:
            required = ", ".join(c.key for c in policy.read_cameras if c.presence == "required" and c.key)
            raise SimulationError(
                f"{sides}the policy requires the cameras {required}, the environment has {', '.join(sent)}."
            )
        if camera.key in sent and camera.layout != sent[camera.key]:
            raise SimulationError(
                f"{sides}the policy reads camera {camera.key} as {camera.layout}, the environment sends "
                f"{sent[camera.key]}."
            )
    keys, sent_keys = ([part.key for part in side.state] for side in (policy, robot))
    if keys != sent_keys or len(robot.state_names) not in policy.state_dims:
        lengths = " or ".join(map(str, policy.state_dims))
        raise SimulationError(
            f"{sides}the policy reads a state of {lengths} numbers in {', '.join(keys)}, the environment sends "
            f"{len(robot.state_names)} ({', '.join(robot.state_names)}) in {', '.join(sent_keys)}."
        )
    _check_actions([action.name for action in policy.actions], robot, sides)
    _check_rate(policy.control_hz, robot, sides)


def check_metadata(metadata: Mapping[str, Any], robot: Embodiment) -> None:
    """As `check_embodiment`, for a served policy, as far as its metadata say something."""
    sides = (
        f"the served policy ({metadata.get('embodiment', 'no name')}) and the environment {robot.name!r} do not fit: "
    )
    if (names := metadata.get("action_names")) is not None:
        _check_actions(names, robot, sides)
    _check_rate(metadata.get("control_hz"), robot, sides)


def _check_actions(names: list[str], robot: Embodiment, sides: str) -> None:
    if len(names) != robot.action_size:
        raise SimulationError(
            f"{sides}the policy's actions have {len(names)} dimensions ({', '.join(names)}), the environment takes "
            f"{robot.action_size} ({', '.join(action.name for action in robot.actions)})."
        )


def _check_rate(control_hz: float | int | None, robot: Embodiment, sides: str) -> None:
    if control_hz is not None and robot.control_hz is not None and control_hz != robot.control_hz:
        raise SimulationError(
            f"{sides}the policy acts at {control_hz:g} Hz, the environment at {robot.control_hz:g} Hz, so that its "
            "actions would be executed too fast or too slowly."
        )
