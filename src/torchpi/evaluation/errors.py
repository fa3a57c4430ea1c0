"""How far predicted chunks are from recorded ones, beside what a policy that knows nothing would reach."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from torchpi.data import LeRobotDataset
from torchpi.data import format as lerobot
from torchpi.evaluation.baselines import held_actions
from torchpi.evaluation.chunks import Chunks, predict_chunks
from torchpi.policy import Policy
from torchpi.robots.holding import holds

POLICY, HOLD, MEAN_ACTION = "policy", "hold", "mean_action"
BASELINES = (HOLD, MEAN_ACTION)


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One dimension of the robot's actions, and what is known of it from the data set."""

    name: str
    unit: str
    """Empty: not stated."""
    low: float
    """The 1 % quantile of the data set's actions."""
    high: float
    """The 99 % quantile."""
    mean: float
    """Of the data set's actions: the baseline "mean_action"."""
    hold: str | None
    """What the baseline "hold" is: "state NAME", "no motion", or None: the embodiment doesn't tell."""

    @property
    def range(self) -> float:
        """From low to high, by which errors are divided to average over dimensions; NaN where there is none."""
        width = self.high - self.low
        return width if width > 1e-6 * max(abs(self.low), abs(self.high)) else math.nan


@dataclasses.dataclass(frozen=True, eq=False)
class StepErrors:
    """Errors of one predictor per step of the horizon, in the robot's units; NaN where there is nothing to say."""

    mae: Float64[np.ndarray, "H a"]
    """Mean absolute error."""
    rmse: Float64[np.ndarray, "H a"]
    """Root of the mean squared error."""


@dataclasses.dataclass(frozen=True)
class Overall:
    """Errors over all steps and several dimensions, each divided by the dimension's range."""

    mae_scaled: float
    rmse_scaled: float
    dimensions: int
    """How many dimensions there are in it: those with a range, and a baseline where that is asked for."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkErrors:
    """The errors of a policy and of the baselines on the same frames."""

    dimensions: tuple[Dimension, ...]
    counts: Int[np.ndarray, " H"]
    """Recorded actions per step; fewer at the later ones, because episodes end."""
    per_step: Mapping[str, StepErrors]
    """Of "policy", "hold" and "mean_action"."""

    @property
    def ranges(self) -> Float64[np.ndarray, " a"]:
        """Of the dimensions."""
        return np.array([dimension.range for dimension in self.dimensions])

    def mae(self, of: str = POLICY) -> Float64[np.ndarray, " a"]:
        """Mean absolute error over all steps, in the robot's units."""
        return _weighted(self.per_step[of].mae, self.counts)

    def rmse(self, of: str = POLICY) -> Float64[np.ndarray, " a"]:
        """Root of the mean squared error over all steps, in the robot's units."""
        return np.sqrt(_weighted(self.per_step[of].rmse ** 2, self.counts))

    def scaled_per_step(self, of: str = POLICY) -> Float64[np.ndarray, " H"]:
        """Mean absolute error, divided by the ranges and averaged over the dimensions that have one."""
        known = np.isfinite(self.mae(of) / self.ranges)
        return _mean((self.per_step[of].mae / self.ranges)[:, known])

    def overall(self, of: str = POLICY, *, like: str = POLICY) -> Overall:
        """One number for everything, to compare policies on the same data.

        Args:
            of: whose errors.
            like: on the dimensions for which this one says something.
        """
        known = np.isfinite(self.mae(of) / self.ranges) & np.isfinite(self.mae(like))
        mae, rmse = (self.mae(of) / self.ranges)[known], (self.rmse(of) / self.ranges)[known]
        return Overall(float(_mean(mae)), math.sqrt(float(_mean(rmse**2))), int(known.sum()))

    def is_worse_than(self, baseline: str) -> Bool[np.ndarray, " a"]:
        """In which dimensions the policy's mean absolute error is above the baseline's."""
        return self.mae() > self.mae(baseline)  # False beside NaN

    def to_dict(self) -> dict[str, Any]:
        """For JSON: "dimensions", "horizon" and "overall", see docs/evaluation.md; null for what is unknown."""
        return {
            "dimensions": [self._dimension(i) for i in range(len(self.dimensions))],
            "horizon": [self._step(step) for step in range(len(self.counts))],
            "overall": self._overall(),
        }

    def _dimension(self, i: int) -> dict[str, Any]:
        dimension = self.dimensions[i]
        numbers = {of: self._numbers(of, i) for of in (POLICY, *BASELINES)}
        is_what = {HOLD: dimension.hold, MEAN_ACTION: dimension.mean}
        return {
            "name": dimension.name,
            "unit": dimension.unit,
            "range": [dimension.low, dimension.high],
            **numbers[POLICY],
            "baselines": {
                of: None if is_what[of] is None else {"action": is_what[of], **numbers[of]} for of in BASELINES
            },
            "worse_than": [of for of in BASELINES if self.is_worse_than(of)[i]],
        }

    def _numbers(self, of: str, i: int) -> dict[str, float | None]:
        mae, rmse, width = self.mae(of)[i], self.rmse(of)[i], self.ranges[i]
        values = {"mae": mae, "rmse": rmse, "mae_scaled": mae / width, "rmse_scaled": rmse / width}
        return {name: _or_none(value) for name, value in values.items()}

    def _step(self, step: int) -> dict[str, Any]:
        def numbers(of: str) -> dict[str, Any]:
            errors = self.per_step[of]
            return {
                "mae_scaled": _or_none(self.scaled_per_step(of)[step]),
                "mae": [_or_none(value) for value in errors.mae[step]],
                "rmse": [_or_none(value) for value in errors.rmse[step]],
            }

        count = int(self.counts[step])
        return {
            "step": step,
            "actions": count,
            **numbers(POLICY),
            "baselines": {of: numbers(of) for of in BASELINES},
        }

    def _overall(self) -> dict[str, Any]:
        def numbers(overall: Overall) -> dict[str, Any]:
            return {name: _or_none(value) for name, value in dataclasses.asdict(overall).items()}

        def beside(of: str) -> dict[str, Any]:
            policy = self.overall(like=of)
            return numbers(self.overall(of)) | {
                "policy_mae_scaled": _or_none(policy.mae_scaled),
                "policy_rmse_scaled": _or_none(policy.rmse_scaled),
            }

        return {**numbers(self.overall()), "baselines": {of: beside(of) for of in BASELINES}}


def chunk_errors(
    policy: Policy,
    dataset: LeRobotDataset,
    frames: Sequence[int],
    *,
    seed: int = 0,
    num_steps: int = 10,
    batch_size: int = 32,
    draws: int = 1,
) -> ChunkErrors:
    """The errors of a policy at frames of a data set of its robot; the policy stays as it is.

    Args and errors: see `predict_chunks`. `errors_of` does the second half, for chunks that are there already.
    """
    chunks = predict_chunks(policy, dataset, frames, seed=seed, num_steps=num_steps, batch_size=batch_size, draws=draws)
    return errors_of(chunks, dataset.columns[lerobot.ACTION])


def errors_of(chunks: Chunks, all_recorded: Float[np.ndarray, "N a"]) -> ChunkErrors:
    """The errors of predicted chunks, averaged over frames and draws.

    Args:
        all_recorded: the recorded actions of all frames of the data set, its `columns["action"]`, for the ranges and
            the mean action.
    """
    actions = all_recorded.astype(np.float64)
    low, high = np.quantile(actions, (0.01, 0.99), axis=0)
    mean = actions.mean(axis=0)
    robot = chunks.embodiment
    dimensions = tuple(
        Dimension(action.name, action.unit, float(low[i]), float(high[i]), float(mean[i]), hold.text if hold else None)
        for i, (action, hold) in enumerate(zip(robot.actions, holds(robot), strict=True))
    )
    predictions = {
        POLICY: chunks.predicted,  # [F, R, H, a]
        HOLD: held_actions(robot, chunks.state)[:, None, None],
        MEAN_ACTION: mean[None, None, None],
    }
    counts = (~chunks.is_pad).sum(axis=0)
    return ChunkErrors(dimensions, counts, {of: _step_errors(chunks, values) for of, values in predictions.items()})


def _step_errors(chunks: Chunks, predicted: np.ndarray) -> StepErrors:
    """Of predictions that broadcast to [F, R, H, a]."""
    error = predicted.astype(np.float64) - chunks.recorded[:, None]
    is_real = ~chunks.is_pad  # [F, H]

    def mean(values: np.ndarray) -> Float[np.ndarray, "H a"]:
        inside = np.where(is_real[..., None], values.mean(axis=1), 0.0)  # [F, H, a]
        with np.errstate(invalid="ignore"):  # 0 / 0 at a step that no episode reaches
            return inside.sum(axis=0) / is_real.sum(axis=0)[:, None]

    return StepErrors(mean(np.abs(error)), np.sqrt(mean(error**2)))


def _weighted(per_step: np.ndarray, counts: np.ndarray) -> Float64[np.ndarray, " a"]:
    """The mean over steps that have as many values each as the counts say."""
    reached = counts > 0
    return np.average(per_step[reached], axis=0, weights=counts[reached])


def _mean(values: np.ndarray) -> Any:
    """Over the last axis; NaN of nothing."""
    return values.mean(axis=-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


def _or_none(value: Any) -> Any:
    """JSON has no NaN."""
    return None if not math.isfinite(value) else value if isinstance(value, int) else float(value)
