"""Errors of predicted chunks against the recorded ones, and the errors of two baselines."""

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
    """Empty if not stated."""
    low: float
    """1 % quantile of the dataset's actions."""
    high: float
    """99 % quantile of the dataset's actions."""
    mean: float
    """Mean of the dataset's actions, the baseline "mean_action"."""
    hold: str | None
    """Hold command, the baseline "hold": "state NAME" or "no motion"; None if unknown."""
    range: float
    """high - low, by which errors are scaled; NaN if the dimension is constant."""


@dataclasses.dataclass(frozen=True, eq=False)
class StepErrors:
    """Mean absolute and root-mean-square errors of one predictor per step of the horizon, in the robot's units.

    NaN at steps without recorded actions.
    """

    mae: Float64[np.ndarray, "H a"]
    rmse: Float64[np.ndarray, "H a"]


@dataclasses.dataclass(frozen=True)
class Overall:
    """Errors over all steps and the dimensions in which they are defined, each scaled by the dimension's range."""

    mae_scaled: float
    rmse_scaled: float
    dimensions: int
    """Number of these dimensions."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkErrors:
    """Errors of a policy and of the baselines on the same frames.

    In the methods below, `of` is the predictor: "policy", "hold" or "mean_action".
    """

    dimensions: tuple[Dimension, ...]
    counts: Int[np.ndarray, " H"]
    """Number of recorded actions per step; smaller at later steps, because episodes end."""
    per_step: Mapping[str, StepErrors]
    """Errors per step of each predictor."""

    @property
    def ranges(self) -> Float64[np.ndarray, " a"]:
        """Range of each dimension; NaN if it is constant."""
        return np.array([dimension.range for dimension in self.dimensions])

    def mae(self, of: str = POLICY) -> Float64[np.ndarray, " a"]:
        """Mean absolute error over all steps, in the robot's units."""
        return self._over_steps(self.per_step[of].mae)

    def rmse(self, of: str = POLICY) -> Float64[np.ndarray, " a"]:
        """Root-mean-square error over all steps, in the robot's units."""
        return np.sqrt(self._over_steps(self.per_step[of].rmse ** 2))

    def _over_steps(self, errors: Float64[np.ndarray, "H a"]) -> Float64[np.ndarray, " a"]:
        recorded = self.counts > 0
        return np.average(errors[recorded], axis=0, weights=self.counts[recorded])

    def scaled_per_step(self, of: str = POLICY) -> Float64[np.ndarray, " H"]:
        """Mean absolute error per step, scaled by the ranges and averaged over the dimensions with a range."""
        defined = np.isfinite(self.mae(of) / self.ranges)
        return _mean((self.per_step[of].mae / self.ranges)[:, defined])

    def overall(self, of: str = POLICY, *, like: str = POLICY) -> Overall:
        """Overall errors, to compare policies on the same data.

        Args:
            like: average only over dimensions in which this predictor is defined, too.
        """
        defined = np.isfinite(self.mae(of) / self.ranges) & np.isfinite(self.mae(like))
        mae, rmse = (self.mae(of) / self.ranges)[defined], (self.rmse(of) / self.ranges)[defined]
        return Overall(float(_mean(mae)), math.sqrt(float(_mean(rmse**2))), int(defined.sum()))

    def is_worse_than(self, baseline: str) -> Bool[np.ndarray, " a"]:
        """True for the dimensions in which the policy's mean absolute error is above the baseline's."""
        return self.mae() > self.mae(baseline)  # False where one is NaN

    def to_dict(self) -> dict[str, Any]:
        """JSON document with "dimensions", "horizon" and "overall", see docs/evaluation.md; null where undefined."""
        mae, rmse = ({of: errors(of) for of in self.per_step} for errors in (self.mae, self.rmse))

        def dimension_errors(of: str, i: int) -> dict[str, float]:
            unscaled = {"mae": mae[of][i], "rmse": rmse[of][i]}
            return unscaled | {f"{name}_scaled": error / self.dimensions[i].range for name, error in unscaled.items()}

        def step_errors(of: str, i: int) -> dict[str, Any]:
            errors, scaled = self.per_step[of], self.scaled_per_step(of)[i]
            return {"mae_scaled": scaled, "mae": errors.mae[i].tolist(), "rmse": errors.rmse[i].tolist()}

        dimensions, horizon = [], []
        for i, dimension in enumerate(self.dimensions):
            baselines: dict[str, Any] = {HOLD: None, MEAN_ACTION: {"action": dimension.mean}}
            baselines[MEAN_ACTION] |= dimension_errors(MEAN_ACTION, i)
            if dimension.hold is not None:
                baselines[HOLD] = {"action": dimension.hold, **dimension_errors(HOLD, i)}
            worse = [of for of in BASELINES if self.is_worse_than(of)[i]]
            row = {"name": dimension.name, "unit": dimension.unit, "range": [dimension.low, dimension.high]}
            dimensions.append(row | dimension_errors(POLICY, i) | {"baselines": baselines, "worse_than": worse})
        for i, count in enumerate(self.counts):
            baselines = {of: step_errors(of, i) for of in BASELINES}
            horizon.append({"step": i, "actions": int(count), **step_errors(POLICY, i), "baselines": baselines})
        overall, overall_baselines = vars(self.overall()), dict[str, dict[str, float]]()
        for of in BASELINES:
            policy = self.overall(like=of)  # on the baseline's dimensions
            policy_errors = {"policy_mae_scaled": policy.mae_scaled, "policy_rmse_scaled": policy.rmse_scaled}
            overall_baselines[of] = vars(self.overall(of)) | policy_errors
        document = {"dimensions": dimensions, "horizon": horizon, "overall": overall | {"baselines": overall_baselines}}
        return without_nan(document)


def chunk_errors(policy: Policy, dataset: LeRobotDataset, frames: Sequence[int], **options: Any) -> ChunkErrors:
    """Errors of a policy at frames of a dataset of its robot; see `predict_chunks` for options and errors."""
    return errors_of(predict_chunks(policy, dataset, frames, **options), dataset.columns[lerobot.ACTION])


def errors_of(chunks: Chunks, all_recorded: Float[np.ndarray, "N a"]) -> ChunkErrors:
    """Errors of predicted chunks, averaged over frames and noise samples.

    Args:
        all_recorded: the actions of all frames of the dataset, `LeRobotDataset.columns["action"]`, for the ranges and
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
        hold_text = None if hold is None else hold.text
        statistics = float(low[i]), float(high[i]), float(mean[i])
        dimensions.append(Dimension(action.name, action.unit, *statistics, hold=hold_text, range=float(ranges[i])))
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
    is_recorded = ~chunks.is_pad  # [F, H]

    def mean(values: np.ndarray) -> Float[np.ndarray, "H a"]:
        recorded = np.where(is_recorded[..., None], values.mean(axis=1), 0.0)  # [F, H, a]
        with np.errstate(invalid="ignore"):  # 0 / 0 at a step that no episode reaches
            return recorded.sum(axis=0) / is_recorded.sum(axis=0)[:, None]

    return StepErrors(mean(np.abs(error)), np.sqrt(mean(error**2)))


def _mean(values: np.ndarray) -> Any:
    """Mean over the last axis; NaN if it is empty."""
    return values.mean(axis=-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)
