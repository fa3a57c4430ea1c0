"""The unit of recorded actions, judged by the limits that the robot's description states."""

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data.lerobot import LeRobotDataset
from torchpi.errors import DatasetError
from torchpi.robots import Embodiment


def check_units(dataset: LeRobotDataset, embodiment: Embodiment) -> None:
    """Raise a ValueError if most values of an action are far outside of its limits, as those in another unit are."""
    for i, action in enumerate(embodiment.actions):
        if action.low is None or action.high is None:
            continue
        values = dataset.columns[lerobot.ACTION][:, i]
        margin = (action.high - action.low) / 4
        if np.mean((values < action.low - margin) | (values > action.high + margin)) > 0.5:
            low, high = float(values.min()), float(values.max())
            in_degrees = action.unit == "rad" and np.radians(max(-low, high)) < 2 * np.pi
            raise DatasetError(
                f"{dataset.path}: the action {action.name} goes from {low:.4g} to {high:.4g}, but embodiment "
                f"'{embodiment.name}' takes {action.low:g} to {action.high:g} ({action.unit or 'no unit stated'})"
                f"{'; the values look like degrees' if in_degrees else ''}. Choose the embodiment in the set's unit, "
                "or state unit and limits in a file of your own."
            )
