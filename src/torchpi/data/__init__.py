"""Robot datasets in LeRobot's format: reading, writing, statistics."""

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

_MODULES = {
    "LeRobotDataset": "lerobot",
    "LeRobotWriter": "writer",
    "camera_keys_of": "observations",
    "compute_norm_stats": "stats",
    "idle_frames": "idle",
    "select_episodes": "episodes",
    "to_observation": "observations",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'torchpi.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"torchpi.data.{_MODULES[name]}"), name)
