"""Packaged camera frames: the first observation of an episode of each of the embedded policy's tasks."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from torchpi.assets import assets
from torchpi.errors import UnknownKeyError, listed


def demo_tasks() -> tuple[str, ...]:
    """Names of the tasks with packaged frames."""
    return tuple(_frames())


def demo_observation(task: str | None = None) -> dict[str, Any]:
    """First observation of an episode of the simulated arm, a request for `load_policy("demo")`.

    Args:
        task: one of `demo_tasks()`; None: the first one.

    Returns:
        base and wrist uint8 [96, 96, 3]; state float64 [4], the hand's position in metres and the gripper's opening
        from 0 to 1; prompt.

    Raises:
        KeyError: there are no frames of this task.
    """
    frames = _frames()
    task = next(iter(frames)) if task is None else task
    if task not in frames:
        raise UnknownKeyError(f"There are no packaged camera frames of {task!r}; expected {listed(frames, 'or')}.")
    frame = frames[task]
    images = {key: np.asarray(Image.open(assets() / "demo" / name)) for key, name in frame["images"].items()}
    return {**images, "state": np.array(frame["state"]), "prompt": frame["prompt"]}


@functools.cache
def _frames() -> Mapping[str, Any]:
    text = (assets() / "demo" / "moments.json").read_text(encoding="utf-8")
    return json.loads(text)["tasks"]
