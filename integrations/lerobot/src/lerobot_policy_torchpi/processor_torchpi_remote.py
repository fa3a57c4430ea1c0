"""The processors around the policy `torchpi_remote`, which leave all numbers alone."""

from typing import Any

from lerobot.processor import make_default_pre_post_processors


def make_torchpi_remote_pre_post_processors(config: Any, dataset_stats: Any = None) -> tuple[Any, Any]:
    """LeRobot's renaming, batching and moving to the device; the server normalizes."""
    return make_default_pre_post_processors(config)
