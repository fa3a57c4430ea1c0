"""Processors of the policy `torchpi`, which do not change numbers."""

from typing import Any

from lerobot.processor import make_default_pre_post_processors


def make_torchpi_pre_post_processors(config: Any, dataset_stats: Any = None) -> tuple[Any, Any]:
    """Create LeRobot's processors for renaming, batching and moving to the device, without normalization.

    `dataset_stats` are not used, because the policy normalizes itself: LeRobot's quantiles are means or envelopes of
    the episodes' quantiles, and it has none of actions relative to the state.
    """
    return make_default_pre_post_processors(config)
