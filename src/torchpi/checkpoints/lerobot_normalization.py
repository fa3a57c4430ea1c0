"""Normalization rules and statistics of a LeRobot policy, read from its processors."""

import dataclasses
import pathlib
import warnings
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from torchpi.errors import CheckpointError, MissingFileError
from torchpi.schema import is_file_name
from torchpi.transforms.normalize import Normalization, NormStats

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ACTION = "observation.state", "action"
_FEATURES = {"state": STATE, "actions": ACTION}
_BOUNDS = {"QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"), "MIN_MAX": ("min", "max")}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a processor."""

    registry_name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    state_file: str | None = None
    artifacts: dict[str, Any] = dataclasses.field(default_factory=dict)


def normalizations(
    root: pathlib.Path, before: Step, after: Step
) -> tuple[dict[str, NormStats], dict[str, Normalization]]:
    """Statistics of "state" and "actions", as far as the folder has them, and their normalization rules."""
    state, actions = _mode_and_stats(root, before, STATE), _mode_and_stats(root, after, ACTION)
    if ACTION in before.config["features"] and _differ(_mode_and_stats(root, before, ACTION), actions):
        raise CheckpointError(
            f"{root}: {PREPROCESSOR} and {POSTPROCESSOR} normalize actions by different rules or statistics: the "
            "policy was trained with the first, and would act with the second. Correct one of them."
        )
    modes = {"state": state[0], "actions": actions[0]}
    stats = {key: value for key, value in (("state", state[1]), ("actions", actions[1])) if value is not None}
    missing = [key for key in modes if key not in stats]
    if missing and any(modes[key] != "IDENTITY" for key in stats):
        (key,) = missing
        warnings.warn(
            f"{root} has no statistics of {key}, which is therefore not normalized, as in LeRobot. If the policy was "
            "trained differently, pass norm_stats= and normalization=.",
            UserWarning,
            stacklevel=2,
        )
        features = (before if key == "state" else after).config["features"]
        modes[key], stats[key] = "IDENTITY", _identity(features[_FEATURES[key]]["shape"][0])
    elif other_bounds := [modes[key] for key in missing if modes[key] in ("QUANTILE10", "MIN_MAX")]:
        warnings.warn(
            f"{root} normalizes by {other_bounds[0]}, and has no statistics: q01 and q99 of the given statistics are "
            "used as its bounds.",
            UserWarning,
            stacklevel=2,
        )
    kinds = {"IDENTITY": "identity", "MEAN_STD": "z_score"}
    return stats, {key: Normalization(kinds.get(mode, "quantile"), "lerobot") for key, mode in modes.items()}


def _mode_and_stats(root: pathlib.Path, step: Step, feature: str) -> tuple[str, NormStats | None]:
    """LeRobot's normalization mode of a feature, and its statistics; None if they are missing."""
    config = step.config
    if config["norm_map"].get("VISUAL", "IDENTITY") != "IDENTITY":
        raise CheckpointError(
            f"{root}: images are normalized by {config['norm_map']['VISUAL']} before the model; only IDENTITY is "
            "supported."
        )
    mode: str = config["norm_map"].get(config["features"][feature]["type"], "IDENTITY")
    selected = config.get("normalize_observation_keys")
    if mode == "IDENTITY" or (feature == STATE and selected is not None and STATE not in selected):
        return "IDENTITY", _identity(config["features"][feature]["shape"][0])
    if mode not in ("MEAN_STD", *_BOUNDS):
        raise CheckpointError(
            f"{root}: normalization {mode} is unknown; known are MEAN_STD, {', '.join(_BOUNDS)}, IDENTITY."
        )
    arrays = _statistics(root, step)
    prefix = f"{feature}."
    stats = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    if not stats:
        return mode, None
    low, high = _BOUNDS.get(mode, ("q01", "q99"))
    if missing := sorted({"mean", "std", *((low, high) if mode in _BOUNDS else ())} - set(stats)):
        raise CheckpointError(f"{root}: the statistics of {feature} have no {', '.join(missing)}, which {mode} needs.")
    # All kinds of bounds use the same formula, so they are stored as q01 and q99.
    return mode, NormStats(mean=stats["mean"], std=stats["std"], q01=stats.get(low), q99=stats.get(high))


def _identity(width: int) -> NormStats:
    return NormStats(np.zeros(width), np.ones(width))


def _differ(a: tuple[str, NormStats | None], b: tuple[str, NormStats | None]) -> bool:
    (a_mode, a_stats), (b_mode, b_stats) = a, b
    if a_mode != b_mode:
        return True
    if a_stats is None or b_stats is None:  # without statistics, LeRobot does not normalize
        return a_stats is not b_stats
    return any(not np.array_equal(value, vars(b_stats)[name]) for name, value in vars(a_stats).items())


def _statistics(root: pathlib.Path, step: Step) -> dict[str, Any]:
    name = step.state_file
    if name is None:
        return {}
    if not is_file_name(name):
        raise CheckpointError(f"{root}: a processor names the file {name!a:.300}; only files next to it are read.")
    file = root / name
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; the policy's statistics are expected there.")
    try:
        # Through PyTorch, because NumPy has no bfloat16.
        return {name: array.to(torch.float64).numpy() for name, array in safetensors.torch.load_file(file).items()}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or corrupt: {error}; get the file again.") from error
