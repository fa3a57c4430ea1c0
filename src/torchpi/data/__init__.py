"""Robot datasets in LeRobot's format: reading, writing, statistics."""

from torchpi.data.episodes import select_episodes
from torchpi.data.idle import idle_frames
from torchpi.data.lerobot import LeRobotDataset
from torchpi.data.observations import camera_keys_of, to_observation
from torchpi.data.stats import compute_norm_stats
from torchpi.data.writer import LeRobotWriter

__all__ = [
    "LeRobotDataset",
    "LeRobotWriter",
    "camera_keys_of",
    "compute_norm_stats",
    "idle_frames",
    "select_episodes",
    "to_observation",
]
