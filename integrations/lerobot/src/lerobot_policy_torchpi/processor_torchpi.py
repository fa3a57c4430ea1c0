"""The processors around the policy `torchpi`, which leave all numbers alone."""

from typing import Any

from lerobot.processor import make_default_pre_post_processors


def make_torchpi_pre_post_processors(config: Any, dataset_stats: Any = None) -> tuple[Any, Any]:
    """LeRobot's renaming, batching and moving to the device, and identities in the place of its normalization.

    `dataset_stats` are not read: the policy normalizes itself. LeRobot's quantiles are means or envelopes of those of
    episodes, and it has none of actions relative to the state.
    """
    return make_default_pre_post_processors(config)
