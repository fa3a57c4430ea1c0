"""Normalization of a LeRobot policy: the modes and statistics that its processors have, in torchpi's terms."""

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
    """A step of a processor."""

    registry_name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    state_file: str | None = None
    artifacts: dict[str, Any] = dataclasses.field(default_factory=dict)


def normalizations(
    root: pathlib.Path, before: Step, after: Step
) -> tuple[dict[str, NormStats], dict[str, Normalization]]:
    """Statistics of "state" and "actions", without those that the folder lacks, and the rule of each."""
    found = {"state": _found(root, before, STATE), "actions": _found(root, after, ACTION)}
    if ACTION in before.config["features"] and _differ(_found(root, before, ACTION), found["actions"]):
        raise CheckpointError(
            f"{root}: actions are normalized otherwise, or by other statistics, in {PREPROCESSOR} than in "
            f"{POSTPROCESSOR}: the policy was trained with one, and would act with the other. Correct one of them."
        )
    modes = {key: mode for key, (mode, _) in found.items()}
    stats = {key: numbers for key, (_, numbers) in found.items() if numbers is not None}
    absent = [key for key in modes if key not in stats]
    warning = ""
    if absent and any(modes[key] != "IDENTITY" for key in stats):
        warning = (
            f"has no statistics of {absent[0]}, which is not normalized therefore, as in LeRobot. If the policy was "
            "trained otherwise, pass norm_stats= and normalization=."
        )
        width = (before if absent == ["state"] else after).config["features"][_FEATURES[absent[0]]]["shape"][0]
        modes[absent[0]], stats[absent[0]] = "IDENTITY", _identity(width)
    elif unlike := [modes[key] for key in absent if modes[key] in ("QUANTILE10", "MIN_MAX")]:
        warning = (
            f"normalizes by {unlike[0]}, and has no statistics: its bounds are q01 and q99 of those that are given."
        )
    if warning:
        warnings.warn(f"{root} {warning}", UserWarning, stacklevel=2)
    kinds = {"IDENTITY": "identity", "MEAN_STD": "z_score"}
    return stats, {key: Normalization(kinds.get(mode, "quantile"), "lerobot") for key, mode in modes.items()}


def _found(root: pathlib.Path, step: Step, feature: str) -> tuple[str, NormStats | None]:
    """The mode of a feature in LeRobot's word, and its statistics; None: there are none, and the mode needs some."""
    config = step.config
    if config["norm_map"].get("VISUAL", "IDENTITY") != "IDENTITY":
        raise CheckpointError(
            f"{root}: images are normalized by {config['norm_map']['VISUAL']} before the model; only IDENTITY is read."
        )
    mode: str = config["norm_map"].get(config["features"][feature]["type"], "IDENTITY")
    selected = config.get("normalize_observation_keys")
    if mode == "IDENTITY" or (feature == STATE and selected is not None and STATE not in selected):
        return "IDENTITY", _identity(config["features"][feature]["shape"][0])
    if mode not in ("MEAN_STD", *_BOUNDS):
        raise CheckpointError(
            f"{root}: normalization {mode} is not known here; known are MEAN_STD, {', '.join(_BOUNDS)}, IDENTITY."
        )
    arrays = _statistics(root, step)
    found = {name.removeprefix(f"{feature}."): a for name, a in arrays.items() if name.startswith(f"{feature}.")}
    if not found:
        return mode, None
    low, high = _BOUNDS.get(mode, ("q01", "q99"))
    if missing := sorted({"mean", "std", *((low, high) if mode in _BOUNDS else ())} - set(found)):
        raise CheckpointError(f"{root}: the statistics of {feature} have no {', '.join(missing)}, which {mode} needs.")
    # The three kinds of bounds are one formula; whichever a policy has are its q01 and q99 here.
    return mode, NormStats(mean=found["mean"], std=found["std"], q01=found.get(low), q99=found.get(high))


def _identity(width: int) -> NormStats:
    return NormStats(np.zeros(width), np.ones(width))


def _differ(one: tuple[str, NormStats | None], other: tuple[str, NormStats | None]) -> bool:
    (mode, stats), (other_mode, others) = one, other
    if mode != other_mode or stats is None or others is None:
        return mode != other_mode or stats is not others  # without statistics, LeRobot leaves numbers as they are
    return any(not np.array_equal(value, vars(others)[name]) for name, value in vars(stats).items())


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
        # By way of PyTorch, because NumPy does not know bfloat16.
        return {name: array.to(torch.float64).numpy() for name, array in safetensors.torch.load_file(file).items()}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or corrupt: {error}; get the file again.") from error
