"""Normalization statistics, exact, over all frames; and how well other statistics cover a dataset."""

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

_BLOCK_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Distribution:
    """Distribution of state or actions, with one float64 entry per dimension."""

    names: tuple[str, ...]
    stats: NormStats
    """Statistics used for normalization. As in openpi, std is the population's (ddof=0)."""
    min: np.ndarray
    max: np.ndarray

    def to_dict(self) -> dict[str, list[Any]]:
        values = {**vars(self.stats), "min": self.min, "max": self.max}
        return {"names": list(self.names), **{name: array.tolist() for name, array in values.items()}}


def compute_norm_stats(dataset: LeRobotDataset, embodiment: Embodiment, *, action_horizon: int) -> dict[str, NormStats]:
    """Compute the statistics of "state" and "actions" in the model's units, as `Embodiment.to_model` produces them.

    Every frame contributes its state, and the actions of the chunk that starts at it; delta actions are relative to
    that state. Actions past the end of the episode are not counted.

    Raises:
        ValueError: state or action has another length than the embodiment's, or contains NaN or infinity.

    Warns: about dimensions that never change.
    """
    distribution_of = distributions(dataset, embodiment, action_horizon=action_horizon)
    for key, distribution in distribution_of.items():
        if constant := [distribution.names[i] for i in constant_dims(distribution.stats, "z_score")]:
            warnings.warn(
                f"In {dataset.path}, the {key} {', '.join(constant)} never change: any deviation from the only value "
                "seen is divided by 1e-6 by the normalization.",
                UserWarning,
                stacklevel=2,
            )
    return {key: distribution.stats for key, distribution in distribution_of.items()}


def distributions(dataset: LeRobotDataset, embodiment: Embodiment, *, action_horizon: int) -> dict[str, Distribution]:
    """Like `compute_norm_stats`, but with the smallest and largest values, and without the warning."""
    values = ModelValues.of(dataset, embodiment, action_horizon=action_horizon)
    result = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # NumPy releases the GIL while sorting
        for key, names in values.names.items():
            columns = list(threads.map(functools.partial(_column_stats, values, key), range(len(names))))
            mean, std, q01, q99, smallest, largest = np.array(columns).reshape(-1, 6).T
            result[key] = Distribution(names, NormStats(mean, std, q01, q99), smallest, largest)
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class ModelValues:
    """State and actions of a dataset in the model's units, before delta actions are made relative to the state."""

    names: Mapping[str, tuple[str, ...]]
    """Names of the dimensions, by key: "state" and "actions"."""
    state: Float[np.ndarray, "F s"]
    actions: Float[np.ndarray, "F a"]
    is_delta: tuple[bool, ...]
    """True for delta actions, per dimension."""
    remaining: Int[np.ndarray, " F"]
    """Number of frames from each frame to the end of its episode, the frame included."""
    num_chunks: Int[np.ndarray, " F"]
    """Number of chunks that contain each frame's action; they start at most horizon - 1 frames before it."""
    horizon: int

    @classmethod
    def of(cls, dataset: LeRobotDataset, embodiment: Embodiment, *, action_horizon: int) -> "ModelValues":
        names = {lerobot.STATE: dataset.state_names, lerobot.ACTION: dataset.action_names}
        order = in_robot_order(embodiment, dataset.columns, names, dataset.path)
        state, actions = (dataset.columns[key][:, dims] for key, dims in order.items())  # [F, s], [F, a]
        state_names = embodiment.state_names[: state.shape[1]]
        require_finite(state, f"{lerobot.STATE} of {dataset.path}", state_names)
        require_finite(actions, f"{lerobot.ACTION} of {dataset.path}", embodiment.action_names)
        if embodiment.hook is not None:
            hook = HOOKS[embodiment.hook]
            state = np.stack([hook.state_to_model(row) for row in state]) if embodiment.state else state
            actions = hook.actions_to_model(actions)  # converts units, one action at a time
        lengths = dataset.episode_lengths
        remaining = np.concatenate([np.arange(length, 0, -1) for length in lengths])
        elapsed = np.repeat(lengths, lengths) - remaining + 1
        return cls(
            {"state": state_names, "actions": embodiment.action_names},
            state,
            actions,
            embodiment.action_mask,
            remaining,
            np.minimum(elapsed, action_horizon),
            action_horizon,
        )

    def column(self, key: str, i: int) -> tuple[np.ndarray, np.ndarray]:
        """All values [n] of a dimension of "state" or "actions", and how often [n] each one occurs."""
        if key == "state":
            return self.state[:, i], np.ones(len(self.state), np.int64)
        if not self.is_delta[i]:
            return self.actions[:, i], self.num_chunks
        # The actions of all chunks, relative to the state at the start of the chunk; one array per step of the chunk.
        actions, state = np.ascontiguousarray(self.actions[:, i]), np.ascontiguousarray(self.state[:, i])
        differences = [
            (actions[step:] - state[: len(state) - step])[self.remaining[: len(state) - step] > step]
            for step in range(min(self.horizon, int(self.remaining.max())))
        ]
        values = np.concatenate(differences)
        return values, np.broadcast_to(1, values.shape)


def _column_stats(values: ModelValues, key: str, i: int) -> tuple[float, ...]:
    """Mean, std, q01, q99, min and max of a dimension of "state" or "actions"."""
    column, counts = values.column(key, i)
    return _plain_stats(column) if key == "actions" and values.is_delta[i] else _weighted_stats(column, counts)


def _weighted_stats(values: np.ndarray, counts: np.ndarray) -> tuple[float, ...]:
    """`_column_stats` of values [F] that occur `counts` [F] times each."""
    exact = values.astype(np.float64)
    total = int(counts.sum())
    mean = float(exact @ counts) / total
    std = math.sqrt(((exact - mean) ** 2) @ counts / total)
    order = np.argsort(exact)
    ranked, ends = exact[order], np.cumsum(counts[order])
    ranks = np.array([0.01, 0.99]) * (total - 1)
    low, high = (ranked[np.searchsorted(ends, rounded(ranks), side="right")] for rounded in (np.floor, np.ceil))
    q01, q99 = (low + (high - low) * (ranks % 1)).tolist()  # interpolated as by np.quantile
    smallest, largest = float(ranked[0]), float(ranked[-1])
    # Exactly 0 for a constant, not the rounding error of the mean.
    return mean, std if smallest < largest else 0.0, q01, q99, smallest, largest


def _plain_stats(values: np.ndarray) -> tuple[float, ...]:
    """`_column_stats` of values [n], which are reordered in place."""
    total = len(values)
    mean = float(values.mean(dtype=np.float64))
    smallest, largest = float(values.min()), float(values.max())
    q01, q99 = np.quantile(values, np.array([0.01, 0.99]), overwrite_input=True).tolist()
    squares = 0.0
    for start in range(0, total, _BLOCK_SIZE):  # float64 in blocks, to avoid a copy of all values
        centred = values[start : start + _BLOCK_SIZE].astype(np.float64) - mean
        squares += float(centred @ centred)
    return mean, math.sqrt(squares / total) if smallest < largest else 0.0, q01, q99, smallest, largest


@dataclasses.dataclass(frozen=True)
class KeyCoverage:
    """State or actions of a dataset compared with a robot's statistics."""

    dims: int
    """Number of dimensions of the dataset."""
    checkpoint_dims: int
    """Number of dimensions of the checkpoint's statistics, without padding."""
    range: str
    """Training range: "q01..q99", or "mean ± 2.326 std" without quantiles."""
    names: tuple[str, ...]
    """Names of the shared dimensions: those that dataset and checkpoint both have."""
    inside: tuple[float, ...]
    """Fraction of the dataset's values inside the range, per shared dimension."""
    overall: float
    """Mean fraction over the shared dimensions."""


@dataclasses.dataclass(frozen=True)
class StatsCoverage:
    """A dataset compared with the statistics of one robot of a checkpoint."""

    name: str
    """Asset id, or the checkpoint's folder if it has one robot."""
    comparable: bool
    """True if state and actions have the checkpoint's numbers of dimensions."""
    overall: float
    """Mean fraction over the shared dimensions of state and actions; 0.98 for the data that q01 and q99 come from."""
    state: KeyCoverage | None
    """None if the checkpoint has no such statistics, or the robot no state."""
    actions: KeyCoverage | None
    reasons: tuple[str, ...] = ()
    """Likely causes of differences, see `torchpi.data.fit`."""

    def __str__(self) -> str:
        return self.name


def stats_coverage(
    dataset: LeRobotDataset,
    embodiment: Embodiment,
    robots: Mapping[str, Mapping[str, NormStats]],
    *,
    action_horizon: int,
) -> list[StatsCoverage]:
    """Compute the fraction of a dataset's values inside each robot's q01 to q99, best match first.

    The values are those of `compute_norm_stats`: in the model's units, actions over whole chunks. Robots with another
    number of dimensions come last; only the first, shared dimensions are compared.
    """
    values = ModelValues.of(dataset, embodiment, action_horizon=action_horizon)
    coverage = [_coverage(values, name, stats) for name, stats in robots.items()]
    return sorted(coverage, key=lambda entry: (not entry.comparable, -entry.overall))


def _coverage(values: ModelValues, name: str, stats: Mapping[str, NormStats]) -> StatsCoverage:
    present = [key for key, names in values.names.items() if names]  # a robot may have no state
    keys = {key: key_coverage(values, key, stats[key]) for key in present if key in stats}
    if not keys:
        raise DatasetError(f"The statistics of {name} have neither state nor actions, but {', '.join(stats)}.")
    comparable = len(keys) == len(present) and all(entry.dims == entry.checkpoint_dims for entry in keys.values())
    overall = float(np.mean([fraction for entry in keys.values() for fraction in entry.inside]))
    return StatsCoverage(name, comparable, overall, keys.get("state"), keys.get("actions"))


def key_coverage(values: ModelValues, key: str, stats: NormStats) -> KeyCoverage:
    dims = len(values.names[key])
    shared = min(dims, stats.dim)
    # Published statistics are padded with zeros to the model's width.
    used = np.flatnonzero((stats.std != 0) | (stats.mean != 0))
    checkpoint_dims = max(shared, int(used[-1]) + 1 if used.size else 0)
    kind = f"mean ± {DEVIATIONS} std" if stats.q01 is None else "q01..q99"
    low, high = stats.training_range()
    inside = []
    for i in range(shared):
        column, counts = values.column(key, i)
        inside.append(int(counts[(column >= low[i]) & (column <= high[i])].sum()) / int(counts.sum()))
    return KeyCoverage(dims, checkpoint_dims, kind, values.names[key][:shared], tuple(inside), float(np.mean(inside)))
