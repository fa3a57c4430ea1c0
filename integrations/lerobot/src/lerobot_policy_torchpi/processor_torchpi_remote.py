"""Processors of the policy `torchpi_remote`, which do not change numbers."""

from typing import Any

from lerobot.processor import make_default_pre_post_processors


def make_torchpi_remote_pre_post_processors(config: Any, dataset_stats: Any = None) -> tuple[Any, Any]:
    """Create LeRobot's processors for renaming, batching and moving to the device; the server normalizes."""
    return make_default_pre_post_processors(config)
