"""Errors of predicted chunks against the recorded ones, next to those of two baselines."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from torchpi.data import LeRobotDataset
from torchpi.data import format as lerobot
from torchpi.evaluation.chunks import Chunks, predict_chunks
from torchpi.policy import Policy
from torchpi.robots.commands import hold_commands
from torchpi.transforms import NormStats, constant_dims
from torchpi.ui.format import without_nan

POLICY, HOLD, MEAN_ACTION = "policy", "hold", "mean_action"
BASELINES = (HOLD, MEAN_ACTION)


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One dimension of the robot's actions, with its statistics in the dataset."""

    name: str
    unit: str
    """Empty: not stated."""
    low: float
    """The 1 % quantile of the dataset's actions."""
    high: float
    """The 99 % quantile."""
    mean: float
    """The baseline "mean_action"."""
    hold: str | None
    """The baseline "hold": "state NAME", "no motion", or None: the embodiment doesn't say."""
    range: float
    """Distance from low to high, by which errors are scaled; NaN where the dimension is constant."""


@dataclasses.dataclass(frozen=True, eq=False)
class StepErrors:
    """Errors of one predictor per step of the horizon, in the robot's units; NaN where nothing was recorded."""

    mae: Float64[np.ndarray, "H a"]
    """Mean absolute error."""
    rmse: Float64[np.ndarray, "H a"]
    """Root of the mean squared error."""


@dataclasses.dataclass(frozen=True)
class Overall:
    """Errors over all steps and several dimensions, each scaled by the dimension's range."""

    mae_scaled: float
    rmse_scaled: float
    dimensions: int
    """Number of the dimensions: those that have a range and, where that is asked for, a baseline."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkErrors:
    """The errors of a policy and of the baselines on the same frames."""

    dimensions: tuple[Dimension, ...]
    counts: Int[np.ndarray, " H"]
    """Recorded actions per step; fewer at the later ones, because episodes end."""
    per_step: Mapping[str, StepErrors]
    """Errors by step, under "policy", "hold" and "mean_action"."""

    @property
    def ranges(self) -> Float64[np.ndarray, " a"]:
        """Ranges of the dimensions; NaN where one is constant."""
        return np.array([dimension.range for dimension in self.dimensions])

    def mae(self, of: str = POLICY) -> Float64[np.ndarray, " a"]:
        """Mean absolute error over all steps, in the robot's units."""
        return self._over_steps(self.per_step[of].mae)

    def rmse(self, of: str = POLICY) -> Float64[np.ndarray, " a"]:
        """Root of the mean squared error over all steps, in the robot's units."""
        return np.sqrt(self._over_steps(self.per_step[of].rmse ** 2))

    def _over_steps(self, errors: Float64[np.ndarray, "H a"]) -> Float64[np.ndarray, " a"]:
        reached = self.counts > 0
        return np.average(errors[reached], axis=0, weights=self.counts[reached])

    def scaled_per_step(self, of: str = POLICY) -> Float64[np.ndarray, " H"]:
        """Mean absolute error, scaled by the ranges and averaged over the dimensions that have one."""
        known = np.isfinite(self.mae(of) / self.ranges)
        return _mean((self.per_step[of].mae / self.ranges)[:, known])

    def overall(self, of: str = POLICY, *, like: str = POLICY) -> Overall:
        """One number for everything, to compare policies on the same data.

        Args:
            of: the predictor.
            like: use the dimensions in which this predictor is defined, too.
        """
        known = np.isfinite(self.mae(of) / self.ranges) & np.isfinite(self.mae(like))
        mae, rmse = (self.mae(of) / self.ranges)[known], (self.rmse(of) / self.ranges)[known]
        return Overall(float(_mean(mae)), math.sqrt(float(_mean(rmse**2))), int(known.sum()))

    def is_worse_than(self, baseline: str) -> Bool[np.ndarray, " a"]:
        """The dimensions in which the policy's mean absolute error is above the baseline's."""
        return self.mae() > self.mae(baseline)  # False where one is NaN

    def to_dict(self) -> dict[str, Any]:
        """JSON document with "dimensions", "horizon" and "overall", see docs/evaluation.md; null where undefined."""
        totals = {of: (self.mae(of), self.rmse(of)) for of in self.per_step}

        def of_dimension(of: str, i: int) -> dict[str, float]:
            mae, rmse = (errors[i] for errors in totals[of])
            width = self.dimensions[i].range
            return {"mae": mae, "rmse": rmse, "mae_scaled": mae / width, "rmse_scaled": rmse / width}

        def of_step(of: str, i: int) -> dict[str, Any]:
            steps = self.per_step[of]
            scaled = self.scaled_per_step(of)[i]
            return {"mae_scaled": scaled, "mae": steps.mae[i].tolist(), "rmse": steps.rmse[i].tolist()}

        def of_baseline(of: str) -> dict[str, float]:
            policy = self.overall(like=of)  # on the same dimensions
            same = {"policy_mae_scaled": policy.mae_scaled, "policy_rmse_scaled": policy.rmse_scaled}
            return vars(self.overall(of)) | same

        dimensions, horizon = [], []
        for i, dimension in enumerate(self.dimensions):
            actions = {HOLD: dimension.hold, MEAN_ACTION: dimension.mean}
            baselines = {
                of: None if action is None else {"action": action, **of_dimension(of, i)}
                for of, action in actions.items()
            }
            worse = [of for of in BASELINES if self.is_worse_than(of)[i]]
            row = {"name": dimension.name, "unit": dimension.unit, "range": [dimension.low, dimension.high]}
            dimensions.append(row | of_dimension(POLICY, i) | {"baselines": baselines, "worse_than": worse})
        for i, count in enumerate(self.counts):
            baselines = {of: of_step(of, i) for of in BASELINES}
            horizon.append({"step": i, "actions": int(count), **of_step(POLICY, i), "baselines": baselines})
        overall = vars(self.overall()) | {"baselines": {of: of_baseline(of) for of in BASELINES}}
        return without_nan({"dimensions": dimensions, "horizon": horizon, "overall": overall})


def chunk_errors(policy: Policy, dataset: LeRobotDataset, frames: Sequence[int], **options: Any) -> ChunkErrors:
    """Errors of a policy at frames of a dataset of its robot; the policy stays as it is.

    Arguments, options and errors: see `predict_chunks`.
    """
    return errors_of(predict_chunks(policy, dataset, frames, **options), dataset.columns[lerobot.ACTION])


def errors_of(chunks: Chunks, all_recorded: Float[np.ndarray, "N a"]) -> ChunkErrors:
    """Errors of predicted chunks, averaged over frames and noise samples.

    Args:
        all_recorded: the recorded actions of all frames of the dataset, its `columns["action"]`, for the ranges and
            the mean action.
    """
    actions, robot = all_recorded.astype(np.float64), chunks.embodiment
    low, high = np.quantile(actions, (0.01, 0.99), axis=0)
    mean, ranges = actions.mean(axis=0), high - low
    ranges[constant_dims(NormStats(mean, actions.std(axis=0), low, high), "quantile")] = math.nan
    holds, hold_actions = hold_commands(robot), np.full((len(chunks.state), robot.action_size), np.nan)
    dimensions = []
    for i, (action, hold) in enumerate(zip(robot.actions, holds, strict=True)):
        if hold is not None:
            hold_actions[:, i] = 0.0 if hold.index is None else chunks.state[:, hold.index]
        numbers = float(low[i]), float(high[i]), float(mean[i]), None if hold is None else hold.text, float(ranges[i])
        dimensions.append(Dimension(action.name, action.unit, *numbers))
    predictions = {
        POLICY: chunks.predicted,  # [F, R, H, a]
        HOLD: hold_actions[:, None, None],
        MEAN_ACTION: mean[None, None, None],
    }
    per_step = {of: _step_errors(chunks, values) for of, values in predictions.items()}
    return ChunkErrors(tuple(dimensions), (~chunks.is_pad).sum(axis=0), per_step)


def _step_errors(chunks: Chunks, predicted: np.ndarray) -> StepErrors:
    """Errors of predictions that broadcast to [F, R, H, a]."""
    error = predicted.astype(np.float64) - chunks.recorded[:, None]
    is_real = ~chunks.is_pad  # [F, H]

    def mean(values: np.ndarray) -> Float[np.ndarray, "H a"]:
        inside = np.where(is_real[..., None], values.mean(axis=1), 0.0)  # [F, H, a]
        with np.errstate(invalid="ignore"):  # 0 / 0 at a step that no episode reaches
            return inside.sum(axis=0) / is_real.sum(axis=0)[:, None]

    return StepErrors(mean(np.abs(error)), np.sqrt(mean(error**2)))


def _mean(values: np.ndarray) -> Any:
    """Mean over the last axis; NaN of nothing."""
    return values.mean(axis=-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)
