"""Normalization of state and actions by a dataset's statistics, and its inverse."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from torchpi.atomic import replace_text
from torchpi.errors import MissingFileError, TransformError, counted
from torchpi.schema import read_json

KINDS = ("z_score", "quantile", "identity")
EPS_RULES = ("openpi", "lerobot")

DEVIATIONS = 2.326
"""From a normal distribution's mean to its q01 and q99."""
MAX_STATISTIC = 1e12
"""Largest magnitude of a statistic; no robot's numbers are as large, and actions that it scales stay within float32."""
_ROUNDING = 1e-6  # relative; what varies less than this is constant
_EPS = 1e-6  # openpi's, added to the deviation or the range in both directions
_LEROBOT_EPS = np.float32(1e-8)
_TOLERANCE = 2e-5  # of a dimension's range, in statistics that are rewritten for another rule


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of one quantity (state or actions), one value per dimension, float64; none of a state without any.

    Raises:
        ValueError: not one-dimensional, of unequal lengths, NaN, infinite or beyond 1e12, a negative deviation, q99
            below q01, or one quantile without the other.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    """The quantiles of 1 % and 99 %."""
    q99: np.ndarray | None = None

    def __post_init__(self) -> None:
        given = {name: _statistic(name, value) for name, value in vars(self).items() if value is not None}
        for name, array in given.items():
            object.__setattr__(self, name, array)
        if (self.q01 is None) != (self.q99 is None):
            raise TransformError("Statistics have only one of q01 and q99; give both or none.")
        lengths = {name: len(array) for name, array in given.items()}
        if len(set(lengths.values())) != 1:
            raise TransformError(
                f"Statistics have unequal lengths {lengths}; expected one value per dimension in each."
            )
        _require_none("std is negative", self.std < 0)
        if self.q01 is not None and self.q99 is not None:
            _require_none("q99 is less than q01", self.q99 < self.q01)

    @property
    def dim(self) -> int:
        return len(self.mean)

    def training_range(self, kind: str = "quantile") -> tuple[np.ndarray, np.ndarray]:
        """The range that holds 98 % of the training data, [d] and [d].

        q01 to q99, or mean ± 2.326 std, as a normal distribution has them: where there are no quantiles, and for a
        z-score where q01 = q99, because it divides by std. Infinite for "identity", which needs no statistics.
        """
        if kind == "identity":
            return np.full(self.dim, -np.inf), np.full(self.dim, np.inf)
        low, high = self.mean - DEVIATIONS * self.std, self.mean + DEVIATIONS * self.std
        if self.q01 is None or self.q99 is None:
            return low, high
        by_deviation = (self.q01 == self.q99) & (kind == "z_score")
        return np.where(by_deviation, low, self.q01), np.where(by_deviation, high, self.q99)


@dataclasses.dataclass(frozen=True)
class Normalization:
    """The normalization of a quantity.

    Raises:
        ValueError: an unknown kind or eps rule.
    """

    kind: str
    """"z_score": (x - mean) / std; "quantile": q01 becomes -1 and q99 becomes 1; "identity": x."""
    eps_rule: str = "openpi"
    """"openpi": 1e-6 is added to std or q99 - q01, in both directions, in float64. "lerobot": 1e-8 is added to std on
    the way to the model only, and stands for a range of 0, in float32."""

    def __post_init__(self) -> None:
        require_known("normalization kind", self.kind, KINDS)
        require_known("eps rule of a normalization", self.eps_rule, EPS_RULES)


def normalize(x: np.ndarray, stats: NormStats, rule: Normalization, *, what: str = "x") -> Float[np.ndarray, "... d"]:
    """Normalize the last axis, in the precision of the rule. Longer statistics are cut.

    Args:
        x: [..., d], in robot or model units.
        what: the quantity's name, for the messages.

    Raises:
        ValueError: the statistics are shorter than d, or have no quantiles and the rule asks for them.
    """
    if rule.kind == "identity":
        return x
    d = x.shape[-1]
    if stats.dim < d:
        raise TransformError(
            f"Cannot normalize {what}: it has {counted(d, 'dimension')}, but its statistics only {stats.dim}. "
            "Send what they were computed from, or load the statistics of this robot (norm_stats=, asset_id=)."
        )
    if rule.eps_rule == "lerobot":
        x = x.astype(np.float32)
        if rule.kind == "z_score":
            return (x - _float32(stats.mean, d)) / (_float32(stats.std, d) + _LEROBOT_EPS)
        low, span = _lerobot_range(stats, d, what)
        return 2 * (x - low) / span - 1
    if rule.kind == "z_score":
        return (x - stats.mean[:d]) / (stats.std[:d] + _EPS)
    q01, q99 = _quantiles(stats, what)
    return (x - q01[:d]) / (q99[:d] - q01[:d] + _EPS) * 2.0 - 1.0


def unnormalize(x: np.ndarray, stats: NormStats, rule: Normalization, *, what: str = "x") -> Float[np.ndarray, "... d"]:
    """The inverse of `normalize`.

    Dimensions beyond the statistics (padding) are defined as in openpi: unchanged for quantiles, mean 0 and std 1 for
    the z-score.

    Raises:
        ValueError: no quantiles, and the rule asks for them.
    """
    if rule.kind == "identity":
        return x
    d, known = x.shape[-1], min(x.shape[-1], stats.dim)
    if rule.eps_rule == "lerobot":
        result = x.astype(np.float32)
        if rule.kind == "z_score":
            result[..., :known] = result[..., :known] * _float32(stats.std, known) + _float32(stats.mean, known)
        else:
            low, span = _lerobot_range(stats, known, what)
            result[..., :known] = (result[..., :known] + 1) * span / 2 + low
        return result
    if rule.kind == "z_score":
        mean, std = np.zeros(d), np.ones(d)
        mean[:known], std[:known] = stats.mean[:known], stats.std[:known]
        return x * (std + _EPS) + mean
    q01, q99 = _quantiles(stats, what)
    out = x.astype(np.float64)
    out[..., :known] = (x[..., :known] + 1.0) / 2.0 * (q99[:known] - q01[:known] + _EPS) + q01[:known]
    return out


def openpi_rules(pi05: bool) -> dict[str, Normalization]:
    """openpi's normalization of state and actions, which follows the variant."""
    return dict.fromkeys(("state", "actions"), Normalization("quantile" if pi05 else "z_score", "openpi"))


def rewrite_stats(
    stats: NormStats, rule: Normalization, target: Normalization, *, what: str, names: Sequence[str]
) -> tuple[NormStats, list[str]]:
    """Statistics with which the rule `target` gives the numbers of `rule`: of the "state" on the way to the model, of
    "actions" on the way back. And of the dimensions in `names` those that (nearly) don't vary, where whatever differs
    from their constant is scaled otherwise, because a rule can't divide by less than its eps.

    Raises:
        ValueError: another dimension would be off by more than 2e-5 of its range.
    """
    if rule == target or rule.kind == target.kind == "identity":
        return stats, []
    value, at, scale = _line(stats, rule, what)
    eps = _EPS if target.eps_rule == "openpi" else 0.0
    if target.kind == "z_score":
        eps = eps or (float(_LEROBOT_EPS) if what == "state" else 0.0)
        std = np.maximum(scale - eps, 0)
        new = dataclasses.replace(stats, mean=value - at * (std + eps), std=std)
    else:
        span = np.maximum(2 * scale - eps, 0)
        q01 = value - (at + 1) * (span + eps) / 2
        new = dataclasses.replace(stats, q01=q01, q99=q01 + span)
    there, at_there, scale_there = _line(new, target, what)
    shift = abs((there - at_there * scale_there) - (value - at * scale))
    off = np.maximum(shift, abs(scale_there - scale)) > 2 * _TOLERANCE * scale
    constant = set(constant_dims(stats, rule.kind, what=what))
    different = {i: name for i, (name, is_off) in enumerate(zip(names, off, strict=False)) if is_off}
    if wrong := [name for i, name in different.items() if i not in constant]:
        raise TransformError(
            f"Normalization by {rule.kind} can't be said as {target.kind} with {target.eps_rule}'s eps for {what} "
            f"{', '.join(wrong)}: the range there is too narrow, the numbers would change by more than "
            f"{_TOLERANCE:g} of it. Give the dimension a larger unit, or leave it out."
        )
    return new, list(different.values())


def _line(stats: NormStats, rule: Normalization, what: str) -> tuple[np.ndarray, float, np.ndarray]:
    """The straight line that a rule is, in float64: a value, the number that it becomes, and the values per number."""
    if rule.kind == "identity":
        return np.zeros(stats.dim), 0.0, np.ones(stats.dim)
    is_lerobot, d = rule.eps_rule == "lerobot", stats.dim
    if rule.kind == "z_score" and is_lerobot:
        std = _float32(stats.std, d) + (_LEROBOT_EPS if what == "state" else np.float32(0))
        return _float32(stats.mean, d).astype(np.float64), 0.0, std.astype(np.float64)
    if rule.kind == "z_score":
        return stats.mean, 0.0, stats.std + _EPS
    if is_lerobot:
        low, span = _lerobot_range(stats, d, what)
        return low.astype(np.float64), -1.0, span.astype(np.float64) / 2
    q01, q99 = _quantiles(stats, what)
    return q01, -1.0, (q99 - q01 + _EPS) / 2


def constant_dims(stats: NormStats, kind: str, *, what: str = "x") -> list[int]:
    """The dimensions that never vary in the statistics, but for rounding: there, only the eps divides."""
    if kind == "identity":
        return []
    if kind == "z_score":
        return np.flatnonzero(stats.std <= _ROUNDING * abs(stats.mean)).tolist()
    q01, q99 = _quantiles(stats, what)
    return np.flatnonzero(q99 - q01 <= _ROUNDING * np.maximum(abs(q01), abs(q99))).tolist()


def narrow_dims(stats: NormStats, names: Sequence[str], kind: str = "quantile") -> list[str]:
    """A message for each named dimension that a kind of normalization would blow up, because (nearly) all of its values
    are the same."""
    messages = {
        i: f"{names[i]} never changes (it is {stats.mean[i]:.6g}): whatever differs from that is divided by 1e-6 when "
        "it is normalized. Leave it out of the robot's state or actions, or record data in which it moves."
        for i in constant_dims(stats, "z_score")
        if i < len(names) and kind != "identity"
    }
    if kind != "quantile" or stats.q01 is None or stats.q99 is None:
        return list(messages.values())
    advice = "Normalize by z_score, or widen its q01 and q99 in norm_stats.json."
    constant = constant_dims(stats, "quantile")
    for i, (name, std, low, high) in enumerate(zip(names, stats.std, stats.q01, stats.q99, strict=False)):
        if i in messages:
            continue
        if i in constant:
            messages[i] = (
                f"{name} is {low:.6g} in 98 % of the frames (q01 = q99): quantile normalization divides whatever "
                f"differs by 1e-6. {advice}"
            )
        elif high - low < 0.01 * std:
            messages[i] = (
                f"{name} hardly moves: 98 % of its values are within {high - low:.3g} ({low:.4g} to {high:.4g}), but "
                f"its standard deviation is {std:.3g}; quantile normalization makes the others larger than "
                f"{std / (high - low):.0f}. {advice}"
            )
    return [messages[i] for i in sorted(messages)]


def load_norm_stats(path: str | Path) -> dict[str, NormStats]:
    """Read openpi's norm_stats.json: {"norm_stats": {"state": {"mean": [...], "std": [...], "q01": ..., "q99": ...}}}.

    Args:
        path: the file, or a folder that has a norm_stats.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't JSON of this layout, or `NormStats` rejects its values; the message names file and key.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "norm_stats.json"
    if not file.is_file():
        raise MissingFileError(
            f"No normalization statistics at {file}; expected a file or folder with norm_stats.json."
        )
    content = read_json(file, error=TransformError)
    if not isinstance(content, dict) or not isinstance(content.get("norm_stats"), dict):
        raise TransformError(
            f'{file} has no object "norm_stats"; expected {{"norm_stats": {{"state": …, "actions": …}}}}.'
        )
    stats = {}
    for key, values in content["norm_stats"].items():
        if not isinstance(values, dict) or values.get("mean") is None or values.get("std") is None:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise TransformError(
                f'{file}: "{key}" has {found}; expected an object with mean and std (and q01 and q99).'
            )
        try:
            given = {name: values[name] for name in ("mean", "std", "q01", "q99") if values.get(name) is not None}
            stats[key] = NormStats(**{name: _statistic(name, value) for name, value in given.items()})
        except ValueError as error:
            raise TransformError(f'{file}: "{key}": {error}') from error
    return stats


def save_norm_stats(path: str | Path, stats: Mapping[str, NormStats]) -> None:
    """Write openpi's `norm_stats.json`; every float64 is read back as it was.

    Args:
        path: the file, or an existing folder to put norm_stats.json into.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "norm_stats.json"
    content = {
        key: {name: None if value is None else value.tolist() for name, value in vars(entry).items()}
        for key, entry in stats.items()
    }
    replace_text(file, json.dumps({"norm_stats": content}, indent=2) + "\n")


def require_known(what: str, value: str, known: Sequence[str]) -> None:
    """Raise an error about a setting that has none of its values."""
    if value not in known:
        raise TransformError(f"Unknown {what} {value!r}; expected one of {', '.join(known)}.")


def require_finite(x: np.ndarray, what: str, names: Sequence[str] = ()) -> None:
    """Raise a ValueError that names the dimensions of the last axis in which there is a NaN or an infinity."""
    bad = np.flatnonzero(~np.isfinite(x).all(axis=tuple(range(x.ndim - 1))))
    if bad.size:
        dims = ", ".join(f"{i} ({names[i]})" if i < len(names) else str(i) for i in bad.tolist())
        raise TransformError(
            f"NaN or infinity in {what}, dimension {dims}; expected finite numbers. Check where it comes from."
        )


def _statistic(name: str, value: Any) -> np.ndarray:
    try:
        array = np.array(value, dtype=np.float64)  # a copy: nobody changes it from outside
    except (TypeError, ValueError) as error:
        raise TransformError(f"Statistics: {name} is not a list of numbers: {error}") from error
    if array.ndim != 1:
        raise TransformError(
            f"Statistics: {name} has shape {list(array.shape)}; expected one value per dimension, [d]."
        )
    _require_none(f"{name} is NaN or infinite", ~np.isfinite(array))
    _require_none(f"{name} is beyond {MAX_STATISTIC:g}, as no robot's numbers are,", abs(array) > MAX_STATISTIC)
    array.flags.writeable = False
    return array


def _require_none(what: str, bad: np.ndarray) -> None:
    if bad.any():
        raise TransformError(
            f"Statistics: {what} in dimension {np.flatnonzero(bad).tolist()}. Compute them again from the data."
        )


def _quantiles(stats: NormStats, what: str) -> tuple[np.ndarray, np.ndarray]:
    if stats.q01 is None or stats.q99 is None:
        raise TransformError(
            f"Cannot normalize {what} by quantiles: its statistics have no q01 and q99. "
            "Compute the statistics again, or choose normalization='z_score' if the policy was trained with it."
        )
    return stats.q01, stats.q99


def _float32(statistic: np.ndarray, dim: int) -> np.ndarray:
    return statistic[:dim].astype(np.float32)


def _lerobot_range(stats: NormStats, dim: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    low, high = (_float32(quantile, dim) for quantile in _quantiles(stats, what))
    return low, np.where(high == low, _LEROBOT_EPS, high - low)
