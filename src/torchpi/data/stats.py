"""The statistics that a policy normalizes with, exact, from all frames of a data set."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from torchpi.data import format as lerobot
from torchpi.data.observations import check_dims
from torchpi.robots import HOOKS, Embodiment
from torchpi.transforms.normalize import NormStats, require_finite


@runtime_checkable
class Frames(Protocol):
    """What is needed of a data set; a `LeRobotDataset` is one."""

    path: Path
    """For messages."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """ "observation.state" [F, s] and "action" [F, a] of all frames, episode by episode."""
        ...

    @property
    def episode_lengths(self) -> tuple[int, ...]:
        """Frames of each episode."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Distribution:
    """How the values of a quantity are distributed: one entry per dimension, float64."""

    names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    """Of the population, as openpi's."""
    q01: np.ndarray
    q99: np.ndarray
    min: np.ndarray
    max: np.ndarray

    def norm_stats(self) -> NormStats:
        """What normalization needs of it."""
        return NormStats(self.mean, self.std, self.q01, self.q99)


def compute_norm_stats(dataset: Frames, embodiment: Embodiment, *, action_horizon: int) -> dict[str, NormStats]:
    """Statistics of "state" and "actions" in the model's terms, as `Embodiment.to_model` makes them.

    Of every frame its state, and the actions of the chunk that begins at it, relative to its state where they are
    deltas; entries past the end of the episode don't count.

    Args:
        action_horizon: H, the chunk's length.

    Raises:
        ValueError: state or action of another length than the embodiment's; NaN or infinity in them.

    Warns: about dimensions that never change.
    """
    found = distributions(dataset, embodiment, action_horizon=action_horizon)
    for what, values in found.items():
        if constant := [values.names[i] for i in np.flatnonzero(values.min == values.max)]:
            warnings.warn(
                f"In {dataset.path}, the {what} {', '.join(constant)} never change: whatever differs from the only "
                "value seen is divided by 1e-6 when it is normalized.",
                UserWarning,
                stacklevel=2,
            )
    return {what: values.norm_stats() for what, values in found.items()}


def distributions(dataset: Frames, embodiment: Embodiment, *, action_horizon: int) -> dict[str, Distribution]:
    """As `compute_norm_stats`, with the smallest and largest value, and without a warning."""
    state, actions = dataset.columns[lerobot.STATE], dataset.columns[lerobot.ACTION]  # [F, s], [F, a]
    check_dims(embodiment, state=state.shape[1], action=actions.shape[1])
    state_names = embodiment.state_names[: state.shape[1]]
    action_names = tuple(action.name for action in embodiment.actions)
    require_finite(state, f"{lerobot.STATE} of {dataset.path}", state_names)
    require_finite(actions, f"{lerobot.ACTION} of {dataset.path}", action_names)
    if embodiment.hook is not None:
        hook = HOOKS[embodiment.hook]
        state = np.stack([hook.state_to_model(row) for row in state])
        actions = hook.actions_to_model(actions)  # a conversion of units: each action by itself
    left = _frames_left(dataset.episode_lengths)  # [F]
    columns = [
        _of_deltas(actions[:, i], state[:, i], left, action_horizon)
        if is_delta
        else _of_repeated(actions[:, i], _occurrences(left, dataset.episode_lengths, action_horizon))
        for i, is_delta in enumerate(embodiment.action_mask)
    ]
    ones = np.ones(len(state), np.int64)
    return {
        "state": Distribution(state_names, *np.array([_of_repeated(column, ones) for column in state.T]).T),
        "actions": Distribution(action_names, *np.array(columns).T),
    }


def hardly_moving(stats: NormStats, names: Sequence[str]) -> list[str]:
    """A message for each dimension that normalization would blow up, because (nearly) all of its values are the same.

    Args:
        stats: of state or actions.
        names: the dimensions.
    """
    messages = []
    q01, q99 = (stats.mean, stats.mean) if stats.q01 is None or stats.q99 is None else (stats.q01, stats.q99)
    for name, mean, std, low, high in zip(names, stats.mean, stats.std, q01, q99, strict=False):
        rounding = 1e-6 * max(abs(low), abs(high))
        if std <= rounding:
            messages.append(
                f"{name} never changes (it is {mean:.6g}): whatever differs from that is divided by 1e-6 when it is "
                "normalized. Leave it out of the robot's state or actions, or record data in which it moves."
            )
        elif stats.q01 is not None and high - low <= rounding:
            messages.append(
                f"{name} is {low:.6g} in 98 % of the frames (q01 = q99): quantile normalization divides whatever "
                "differs by 1e-6. Normalize by z_score, or widen its q01 and q99 in norm_stats.json."
            )
        elif stats.q01 is not None and high - low < 0.01 * std:
            messages.append(
                f"{name} hardly moves: 98 % of its values are within {high - low:.3g}, but its standard deviation is "
                f"{std:.3g}; quantile normalization makes the others larger than {std / (high - low):.0f}. "
                "Normalize by z_score, or widen its q01 and q99 in norm_stats.json."
            )
    return messages


def _frames_left(lengths: Sequence[int]) -> Int[np.ndarray, " F"]:
    """For each frame, how many of its episode begin with it."""
    return np.concatenate([np.arange(length, 0, -1) for length in lengths])


def _occurrences(left: np.ndarray, lengths: Sequence[int], horizon: int) -> Int[np.ndarray, " F"]:
    """In how many chunks each frame's action is: in those that begin at it or at most horizon - 1 before."""
    so_far = np.repeat(lengths, lengths) - left + 1
    return np.minimum(so_far, horizon)


def _of_repeated(values: np.ndarray, counts: np.ndarray) -> tuple[float, ...]:
    """Of values [F] that occur `counts` [F] times each: mean, std, q01, q99, min, max."""
    exact = values.astype(np.float64)
    total = int(counts.sum())
    mean = float(exact @ counts) / total
    std = math.sqrt(((exact - mean) ** 2) @ counts / total)
    order = np.argsort(exact)
    ranked, ends = exact[order], np.cumsum(counts[order])

    def at(rank: int) -> float:
        return float(ranked[np.searchsorted(ends, rank, side="right")])

    q01, q99 = (_quantile(at, total, q) for q in (0.01, 0.99))
    smallest, largest = float(ranked[0]), float(ranked[-1])
    # 0 where nothing varies, not what the rounding of the mean leaves.
    return mean, std if smallest < largest else 0.0, q01, q99, smallest, largest


def _of_deltas(actions: np.ndarray, state: np.ndarray, left: np.ndarray, horizon: int) -> tuple[float, ...]:
    """Of the differences of actions [F] to the state [F] at the beginning of each chunk: as `_of_repeated`."""
    steps = range(min(horizon, int(left.max())))
    exact = np.empty(int(np.minimum(left, horizon).sum()))
    filled = 0
    for step in steps:
        inside = left[: len(left) - step] > step
        part = (actions[step:] - state[: len(state) - step])[inside]
        exact[filled : filled + len(part)] = part
        filled += len(part)
    mean, total = float(exact.mean()), len(exact)
    smallest, largest = float(exact.min()), float(exact.max())
    exact.partition(sorted({rank for q in (0.01, 0.99) for rank in _ranks(total, q)}))
    q01, q99 = (_quantile(lambda rank: float(exact[rank]), total, q) for q in (0.01, 0.99))
    exact -= mean
    std = math.sqrt(float(exact @ exact) / total)
    return mean, std if smallest < largest else 0.0, q01, q99, smallest, largest


def _ranks(total: int, q: float) -> tuple[int, int]:
    below = math.floor(q * (total - 1))
    return below, min(below + 1, total - 1)


def _quantile(at: Callable[[int], float], total: int, q: float) -> float:
    """As np.quantile: linear between the two ranks."""
    below, above = (at(rank) for rank in _ranks(total, q))
    return below + (above - below) * (q * (total - 1) % 1)
