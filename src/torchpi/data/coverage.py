"""The part of a dataset that the statistics of a checkpoint cover: which of its robots is this one?"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from torchpi.data.lerobot import LeRobotDataset
from torchpi.data.stats import ModelValues
from torchpi.errors import DatasetError
from torchpi.robots import Embodiment
from torchpi.transforms.normalize import DEVIATIONS, NormStats


@dataclasses.dataclass(frozen=True)
class KeyCoverage:
    """State or actions of a dataset, compared with a robot's statistics of them."""

    dims: int
    """Of the dataset."""
    checkpoint_dims: int
    """Of the statistics, without padding."""
    range: str
    """The training range: "q01..q99", or "mean ± 2.326 std" where there are no quantiles."""
    names: tuple[str, ...]
    """Of the dimensions that both have."""
    inside: tuple[float, ...]
    """Fraction of the dataset's values inside the range, for each of these."""
    overall: float
    """Fraction over these dimensions."""


@dataclasses.dataclass(frozen=True)
class StatsCoverage:
    """A dataset compared with the statistics of one robot."""

    name: str
    """The asset id; of a checkpoint with one robot, its folder."""
    comparable: bool
    """True if state and actions have the same number of dimensions."""
    overall: float
    """Fraction over all dimensions of state and actions that both have. A perfect match has 0.98."""
    state: KeyCoverage | None
    """None: the checkpoint has no statistics of it."""
    actions: KeyCoverage | None


def stats_coverage(
    dataset: LeRobotDataset,
    embodiment: Embodiment,
    robots: Mapping[str, Mapping[str, NormStats]],
    *,
    action_horizon: int,
) -> list[StatsCoverage]:
    """Compute the fraction of a dataset's values inside each robot's q01 to q99, the best first.

    The values are those that `compute_norm_stats` describes: in the model's terms, actions over whole chunks. Robots
    with another number of dimensions come last, compared in the dimensions that both have, the first ones.

    Args:
        robots: statistics of "state" and "actions" by the robot's name.
        action_horizon: H, the chunk's length.
    """
    values = ModelValues.of(dataset, embodiment, action_horizon=action_horizon)
    coverage = [_coverage(values, name, stats) for name, stats in robots.items()]
    return sorted(coverage, key=lambda entry: (not entry.comparable, -entry.overall))


def _coverage(values: ModelValues, name: str, stats: Mapping[str, NormStats]) -> StatsCoverage:
    keys = {what: _key_coverage(values, what, stats[what]) for what in values.names if what in stats}
    if not keys:
        raise DatasetError(f"The statistics of {name} have neither state nor actions, but {', '.join(stats)}.")
    comparable = len(keys) == 2 and all(key.dims == key.checkpoint_dims for key in keys.values())
    overall = float(np.mean([fraction for key in keys.values() for fraction in key.inside]))
    return StatsCoverage(name, comparable, overall, keys.get("state"), keys.get("actions"))


def _key_coverage(values: ModelValues, what: str, stats: NormStats) -> KeyCoverage:
    dims = len(values.names[what])
    common = min(dims, stats.dim)
    # Published statistics are padded with zeros to the model's width.
    beyond = np.flatnonzero((stats.std != 0) | (stats.mean != 0))
    checkpoint_dims = max(common, int(beyond[-1]) + 1 if beyond.size else 0)
    kind = f"mean ± {DEVIATIONS} std" if stats.q01 is None else "q01..q99"
    low, high = stats.training_range()
    inside = tuple(_fraction_inside(values, what, i, low[i], high[i]) for i in range(common))
    return KeyCoverage(dims, checkpoint_dims, kind, values.names[what][:common], inside, float(np.mean(inside)))


def _fraction_inside(values: ModelValues, what: str, i: int, low: float, high: float) -> float:
    total = inside = 0
    for part, counts in values.parts(what, i):
        total += int(counts.sum())
        inside += int(counts[(part >= low) & (part <= high)].sum())
    return inside / total
