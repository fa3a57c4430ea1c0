"""The statistics that a policy normalizes with, exact, from all frames; and the part of a dataset that others cover."""

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from torchpi.data import format as lerobot
from torchpi.data.lerobot import LeRobotDataset
from torchpi.data.observations import in_robot_order
from torchpi.errors import DatasetError
from torchpi.robots import HOOKS, Embodiment
from torchpi.transforms.normalize import DEVIATIONS, NormStats, constant_dims, require_finite

_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Distribution:
    """The distribution of a quantity: one entry per dimension, float64."""

    names: tuple[str, ...]
    stats: NormStats
    """The part that normalization needs; std of the population, as openpi's."""
    min: np.ndarray
    max: np.ndarray

    def to_dict(self) -> dict[str, list[Any]]:
        columns = {**vars(self.stats), "min": self.min, "max": self.max}
        return {"names": list(self.names), **{name: values.tolist() for name, values in columns.items()}}


def compute_norm_stats(dataset: LeRobotDataset, embodiment: Embodiment, *, action_horizon: int) -> dict[str, NormStats]:
    """Statistics of "state" and "actions" in the model's terms, as `Embodiment.to_model` makes them.

    Of every frame its state, and the actions of the chunk that begins at it, relative to its state where they are
    deltas; entries past the end of the episode don't count.

    Raises:
        ValueError: state or action of another length than the embodiment's; NaN or infinity in them.

    Warns: about dimensions that never change.
    """
    found = distributions(dataset, embodiment, action_horizon=action_horizon)
    for what, values in found.items():
        if constant := [values.names[i] for i in constant_dims(values.stats, "z_score")]:
            warnings.warn(
                f"In {dataset.path}, the {what} {', '.join(constant)} never change: whatever differs from the only "
                "value seen is divided by 1e-6 when it is normalized.",
                UserWarning,
                stacklevel=2,
            )
    return {what: values.stats for what, values in found.items()}


def distributions(dataset: LeRobotDataset, embodiment: Embodiment, *, action_horizon: int) -> dict[str, Distribution]:
    """The statistics of `compute_norm_stats` with the smallest and largest value, without a warning."""
    values = ModelValues.of(dataset, embodiment, action_horizon=action_horizon)
    found = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # NumPy sorts without holding up other threads
        for what, names in values.names.items():
            columns = list(threads.map(functools.partial(_of_column, values, what), range(len(names))))
            mean, std, q01, q99, smallest, largest = np.array(columns).reshape(-1, 6).T
            found[what] = Distribution(names, NormStats(mean, std, q01, q99), smallest, largest)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class ModelValues:
    """The numbers of a dataset in the model's terms, before differences are taken."""

    names: Mapping[str, tuple[str, ...]]
    """Names of the dimensions of "state" and "actions"."""
    state: Float[np.ndarray, "F s"]
    actions: Float[np.ndarray, "F a"]
    is_delta: tuple[bool, ...]
    """Per dimension of the actions."""
    left: Int[np.ndarray, " F"]
    """For each frame, the number of frames of its episode that begin with it."""
    in_chunks: Int[np.ndarray, " F"]
    """The number of chunks with each frame's action: those that begin at it or at most horizon - 1 before."""
    horizon: int

    @classmethod
    def of(cls, dataset: LeRobotDataset, embodiment: Embodiment, *, action_horizon: int) -> "ModelValues":
        names = {lerobot.STATE: dataset.state_names, lerobot.ACTION: dataset.action_names}
        order = in_robot_order(embodiment, dataset.columns, names, dataset.path)
        state, actions = (dataset.columns[key][:, places] for key, places in order.items())  # [F, s], [F, a]
        state_names = embodiment.state_names[: state.shape[1]]
        require_finite(state, f"{lerobot.STATE} of {dataset.path}", state_names)
        require_finite(actions, f"{lerobot.ACTION} of {dataset.path}", embodiment.action_names)
        if embodiment.hook is not None:
            hook = HOOKS[embodiment.hook]
            state = np.stack([hook.state_to_model(row) for row in state]) if embodiment.state else state
            actions = hook.actions_to_model(actions)  # a conversion of units: each action by itself
        lengths = dataset.episode_lengths
        left = np.concatenate([np.arange(length, 0, -1) for length in lengths])
        so_far = np.repeat(lengths, lengths) - left + 1
        return cls(
            {"state": state_names, "actions": embodiment.action_names},
            state,
            actions,
            embodiment.action_mask,
            left,
            np.minimum(so_far, action_horizon),
            action_horizon,
        )

    def column(self, what: str, i: int) -> tuple[np.ndarray, np.ndarray]:
        """All values [n] of a dimension of "state" or "actions", and the number of times [n] that each occurs."""
        if what == "state":
            return self.state[:, i], np.ones(len(self.state), np.int64)
        if not self.is_delta[i]:
            return self.actions[:, i], self.in_chunks
        # Of all chunks, less the state at the chunk's beginning; by place in the chunk.
        actions, state = np.ascontiguousarray(self.actions[:, i]), np.ascontiguousarray(self.state[:, i])
        differences = [
            (actions[step:] - state[: len(state) - step])[self.left[: len(state) - step] > step]
            for step in range(min(self.horizon, int(self.left.max())))
        ]
        values = np.concatenate(differences)
        return values, np.broadcast_to(1, values.shape)


def _of_column(values: ModelValues, what: str, i: int) -> tuple[float, ...]:
    """Mean, std, q01, q99, min and max of a dimension of "state" or "actions"."""
    column, counts = values.column(what, i)
    return _of_all(column) if what == "actions" and values.is_delta[i] else _of_repeated(column, counts)


def _of_repeated(values: np.ndarray, counts: np.ndarray) -> tuple[float, ...]:
    """The numbers of `_of_column`, of values [F] that occur `counts` [F] times each."""
    exact = values.astype(np.float64)
    total = int(counts.sum())
    mean = float(exact @ counts) / total
    std = math.sqrt(((exact - mean) ** 2) @ counts / total)
    order = np.argsort(exact)
    ranked, ends = exact[order], np.cumsum(counts[order])
    ranks = np.array([0.01, 0.99]) * (total - 1)
    low, high = (ranked[np.searchsorted(ends, edge(ranks), side="right")] for edge in (np.floor, np.ceil))
    q01, q99 = (low + (high - low) * (ranks % 1)).tolist()  # as np.quantile has them
    smallest, largest = float(ranked[0]), float(ranked[-1])
    # 0 where nothing varies, not what the rounding of the mean leaves.
    return mean, std if smallest < largest else 0.0, q01, q99, smallest, largest


def _of_all(values: np.ndarray) -> tuple[float, ...]:
    """The numbers of `_of_column`, of values [n], which are reordered."""
    total = len(values)
    mean = float(values.mean(dtype=np.float64))
    smallest, largest = float(values.min()), float(values.max())
    q01, q99 = np.quantile(values, np.array([0.01, 0.99]), overwrite_input=True).tolist()
    squares = 0.0
    for start in range(0, total, _BLOCK):  # in float64, without a copy of all
        centred = values[start : start + _BLOCK].astype(np.float64) - mean
        squares += float(centred @ centred)
    return mean, math.sqrt(squares / total) if smallest < largest else 0.0, q01, q99, smallest, largest


@dataclasses.dataclass(frozen=True)
class KeyCoverage:
    """State or actions of a dataset, compared with a robot's statistics of them."""

    dims: int
    """Dimensions of the dataset."""
    checkpoint_dims: int
    """Dimensions of the checkpoint's statistics, without padding."""
    range: str
    """The training range: "q01..q99", or "mean ± 2.326 std" where there are no quantiles."""
    names: tuple[str, ...]
    """Names of the dimensions that both have."""
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
    """None: the checkpoint has no statistics of it, or the robot has no state."""
    actions: KeyCoverage | None
    reasons: tuple[str, ...] = ()
    """Differences, see `torchpi.data.fit`."""

    def __str__(self) -> str:
        return self.name


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
    """
    values = ModelValues.of(dataset, embodiment, action_horizon=action_horizon)
    coverage = [_coverage(values, name, stats) for name, stats in robots.items()]
    return sorted(coverage, key=lambda entry: (not entry.comparable, -entry.overall))


def _coverage(values: ModelValues, name: str, stats: Mapping[str, NormStats]) -> StatsCoverage:
    present = [what for what, names in values.names.items() if names]  # a robot may have no state
    keys = {what: key_coverage(values, what, stats[what]) for what in present if what in stats}
    if not keys:
        raise DatasetError(f"The statistics of {name} have neither state nor actions, but {', '.join(stats)}.")
    comparable = len(keys) == len(present) and all(key.dims == key.checkpoint_dims for key in keys.values())
    overall = float(np.mean([fraction for key in keys.values() for fraction in key.inside]))
    return StatsCoverage(name, comparable, overall, keys.get("state"), keys.get("actions"))


def key_coverage(values: ModelValues, what: str, stats: NormStats) -> KeyCoverage:
    dims = len(values.names[what])
    common = min(dims, stats.dim)
    # Published statistics are padded with zeros to the model's width.
    beyond = np.flatnonzero((stats.std != 0) | (stats.mean != 0))
    checkpoint_dims = max(common, int(beyond[-1]) + 1 if beyond.size else 0)
    kind = f"mean ± {DEVIATIONS} std" if stats.q01 is None else "q01..q99"
    low, high = stats.training_range()
    inside = []
    for i in range(common):
        column, counts = values.column(what, i)
        inside.append(int(counts[(column >= low[i]) & (column <= high[i])].sum()) / int(counts.sum()))
    return KeyCoverage(dims, checkpoint_dims, kind, values.names[what][:common], tuple(inside), float(np.mean(inside)))
