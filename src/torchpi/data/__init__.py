"""Robot data sets in LeRobot's format: reading, writing, statistics."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchpi.data.episodes import select_episodes as select_episodes
    from torchpi.data.idle import idle_frames as idle_frames
    from torchpi.data.lerobot import LeRobotDataset as LeRobotDataset
    from torchpi.data.observations import camera_keys_of as camera_keys_of
    from torchpi.data.observations import to_observation as to_observation
    from torchpi.data.stats import compute_norm_stats as compute_norm_stats
    from torchpi.data.writer import LeRobotWriter as LeRobotWriter

_HOME_OF = {
    "LeRobotDataset": "torchpi.data.lerobot",
    "LeRobotWriter": "torchpi.data.writer",
    "camera_keys_of": "torchpi.data.observations",
    "compute_norm_stats": "torchpi.data.stats",
    "idle_frames": "torchpi.data.idle",
    "select_episodes": "torchpi.data.episodes",
    "to_observation": "torchpi.data.observations",
}

__all__ = [
    "LeRobotDataset",
    "LeRobotWriter",
    "camera_keys_of",
    "compute_norm_stats",
    "idle_frames",
    "select_episodes",
    "to_observation",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'torchpi.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
