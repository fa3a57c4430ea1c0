"""`torchpi view`: recorded episodes, and the chunks that a policy predicts in them, for the Rerun viewer."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from torchpi.data import LeRobotDataset
from torchpi.data import format as lerobot
from torchpi.data.metadata import open_metadata
from torchpi.data.names import dimension_names
from torchpi.errors import DatasetError, UsageError
from torchpi.evaluation.chunks import open_recorded, predict_chunks
from torchpi.extras import require
from torchpi.policy import Policy
from torchpi.robots import Embodiment, get_embodiment
from torchpi.ui.progress import progress_bar

_CHUNK_STEP = re.compile(r".*@\d+")
"""Name of an action in a server's recording: dimension @ step of the chunk, see `torchpi.serving.recorder`."""


def write_view(
    source: str,
    target: Path,
    *,
    policy: Policy | None = None,
    embodiment: str | Embodiment | None = None,
    stride: int = 1,
    every: int | None = None,
    seed: int = 0,
    **reading: Any,
) -> LeRobotDataset:
    """Write a dataset, or a server's recording, as an .rrd file.

    Episodes follow each other on the timelines "frame", which counts through them, and "time", the dataset's clock.
    See `torchpi view` for the arguments; `reading` are further ones of `LeRobotDataset`.
    """
    for name, value in (("stride", stride), ("every", every)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; expected 1 or more.")
    robot: Embodiment | None
    action = open_metadata(source, rename=reading.get("rename")).info.features.get(lerobot.ACTION, {})
    is_requests = all(map(_CHUNK_STEP.fullmatch, dimension_names(action, *action.get("shape", [0])) or ("",)))
    if is_requests and policy is not None:
        raise UsageError(f"{source} is a server's recording, which has chunks already; leave the policy out.")
    if policy is not None:
        dataset, robot = open_recorded(policy, source, **reading), policy.embodiment
    else:
        robot = None if embodiment is None or is_requests else get_embodiment(embodiment)
        dataset = LeRobotDataset(source, action_horizon=1, embodiment=robot, columns=(), **reading)
    if is_requests:
        robot = _robot_of_requests(dataset, embodiment)
    seconds = _seconds(dataset)
    with rerun_log(target) as log:
        robot_log = log.robot(_metadata(dataset, robot, is_requests))
        if policy is not None:
            _write_chunks(robot_log, seconds, policy, dataset, every, seed)
        with progress_bar("frames", len(dataset)) as advance:
            for i in range(len(dataset)):
                item = dataset[i] if i % stride == 0 else dataset.numbers(i)
                _write_frame(robot_log, seconds[i], item, None if is_requests else i, robot)
                advance()
    return dataset


def rerun_log(target: str | os.PathLike[str]) -> Any:
    """A `RerunLog` that blocks instead of dropping entries."""
    require("rerun", "rerun")
    return require("torchpi_client.rerun_log", "rerun").RerunLog(target, wait=True)


def _robot_of_requests(dataset: LeRobotDataset, embodiment: str | Embodiment | None) -> Embodiment:
    """The robot of a server's recording; its control rate gives the times of a chunk's actions."""
    robot = get_embodiment(embodiment or dataset.robot_type or "")
    names = list(dict.fromkeys(name.rpartition("@")[0] for name in dataset.action_names or ()))
    if robot.control_hz is None or names != list(robot.action_names):
        raise DatasetError(
            f"{dataset.path} is a server's recording of chunks of {', '.join(names)}; embodiment '{robot.name}' has "
            f"{', '.join(robot.action_names)} at {robot.control_hz} Hz. Give the robot that was served, embodiment=, "
            "with its control_hz, which says when the actions were due."
        )
    return robot


def _metadata(dataset: LeRobotDataset, robot: Embodiment | None, is_requests: bool) -> dict[str, Any]:
    """Description of the dataset in the form of a policy's metadata."""
    state, action = (
        names or tuple(map(str, range(dataset.columns[key].shape[1])))
        for key, names in ((lerobot.STATE, dataset.state_names), (lerobot.ACTION, dataset.action_names))
    )
    if robot is not None:  # state and actions were read in its order
        state, action = robot.state_names[: len(state)] or state, robot.action_names
    cameras = [
        {"key": key.removeprefix(lerobot.IMAGES)} | ({"depth_unit": "m"} if key in dataset.depth_keys else {})
        for key in dataset.camera_keys
    ]
    units = robot.state_units[: len(state)] if robot else ()
    return {
        "observation": {"cameras": cameras, "state": [{"key": "state", "names": state, "units": units}]},
        "action_names": action,
        "action_units": robot.action_units if robot else (),
        "control_hz": robot.control_hz if robot and is_requests else dataset.fps,
    }


def _seconds(dataset: LeRobotDataset) -> Float[np.ndarray, "F"]:
    """Times of all frames: each episode's own clock, shifted to follow the episode before it."""
    clock = dataset.columns["timestamp"].astype(np.float64).copy()
    for rows in dataset.episode_rows:
        clock[rows] += rows.start / dataset.fps - clock[rows.start]
    return clock


def _write_frame(
    robot_log: Any, seconds: float, item: Mapping[str, Any], frame: int | None, robot: Embodiment | None
) -> None:
    """Write one frame or, if `frame` is None, a request and its chunk from a server's recording."""
    images = {key.removeprefix(lerobot.IMAGES): value for key, value in item.items() if key.startswith(lerobot.IMAGES)}
    text = f"episode {int(item['episode_index'])}: {item['task']}"
    robot_log.observe(seconds, images | {"state": item[lerobot.STATE], "prompt": text}, frame=frame)
    if frame is None and robot is not None:
        robot_log.predict(seconds, item[lerobot.ACTION][0].reshape(-1, robot.action_size))
    else:
        robot_log.execute(seconds, item[lerobot.ACTION][0], frame=frame)


def _write_chunks(
    robot_log: Any, seconds: np.ndarray, policy: Policy, dataset: LeRobotDataset, every: int | None, seed: int
) -> None:
    """Predict and write the chunk at every n-th frame of each episode, cut at the episode's end."""
    every = every or policy.embodiment.execute_steps or max(1, dataset.action_horizon // 2)
    frames = [frame for rows in dataset.episode_rows for frame in range(rows.start, rows.stop, every)]
    with progress_bar("chunks", len(frames)) as advance:
        chunks = predict_chunks(policy, dataset, frames, seed=seed, on_batch=lambda count: advance(by=count))
    for frame, chunk, is_pad in zip(frames, chunks.predicted[:, 0], chunks.is_pad, strict=True):
        robot_log.predict(seconds[frame], chunk[~is_pad], frame=frame)
