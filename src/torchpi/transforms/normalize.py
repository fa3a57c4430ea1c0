"""Normalization of state and actions by dataset statistics, and its inverse."""

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
"""Distance of q01 and q99 from the mean of a normal distribution, in standard deviations."""
MAX_STATISTIC = 1e12
"""Largest accepted magnitude of a statistic: larger than any robot's values, and scaled actions still fit float32."""
_ROUNDING = 1e-6  # relative variation up to which a dimension counts as constant
_EPS = 1e-6  # openpi's eps, added to the deviation or the range in both directions
_LEROBOT_EPS = np.float32(1e-8)
_TOLERANCE = 2e-5  # error allowed by `rewrite_stats`, as a fraction of a dimension's range


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of state or actions: float64 [d] each, empty for a robot without a state.

    Raises:
        ValueError: not one-dimensional, unequal lengths, NaN, infinite or beyond 1e12, a negative deviation, q99 below
            q01, or only one of the quantiles.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    """1 % quantile."""
    q99: np.ndarray | None = None
    """99 % quantile."""

    def __post_init__(self) -> None:
        arrays = {name: _statistic(name, value) for name, value in vars(self).items() if value is not None}
        for name, array in arrays.items():
            object.__setattr__(self, name, array)
        if (self.q01 is None) != (self.q99 is None):
            raise TransformError("Statistics have only one of q01 and q99; give both or none.")
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise TransformError(
                f"Statistics have unequal lengths {lengths}; expected one value per dimension in each."
            )
        _reject_dims("std is negative", self.std < 0)
        if self.q01 is not None and self.q99 is not None:
            _reject_dims("q99 is less than q01", self.q99 < self.q01)

    @property
    def dim(self) -> int:
        return len(self.mean)

    def training_range(self, kind: str = "quantile") -> tuple[np.ndarray, np.ndarray]:
        """Range of 98 % of the training data, as lower and upper bound, [d] each.

        It is q01 to q99. Without quantiles, and for "z_score" (which divides by std) if q01 = q99, it is mean ± 2.326
        std, the quantiles of a normal distribution. For "identity", which needs no statistics, it is infinite.
        """
        if kind == "identity":
            return np.full(self.dim, -np.inf), np.full(self.dim, np.inf)
        low, high = self.mean - DEVIATIONS * self.std, self.mean + DEVIATIONS * self.std
        if self.q01 is None or self.q99 is None:
            return low, high
        use_std = (self.q01 == self.q99) & (kind == "z_score")
        return np.where(use_std, low, self.q01), np.where(use_std, high, self.q99)


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Normalization rule of state or actions.

    Raises:
        ValueError: unknown kind or eps rule.
    """

    kind: str
    """"z_score": (x - mean) / std; "quantile": maps q01 to -1 and q99 to 1; "identity": x."""
    eps_rule: str = "openpi"
    """"openpi": adds 1e-6 to std or q99 - q01, in both directions, in float64. "lerobot": adds 1e-8 to std when
    normalizing only, and replaces a range of 0 by 1e-8, in float32."""

    def __post_init__(self) -> None:
        require_known("normalization kind", self.kind, KINDS)
        require_known("eps rule of a normalization", self.eps_rule, EPS_RULES)


def normalize(x: np.ndarray, stats: NormStats, rule: Normalization, *, what: str = "x") -> Float[np.ndarray, "... d"]:
    """Normalize the last axis, in the precision of the rule. Statistics longer than d are cut.

    Args:
        x: [..., d], in robot or model units.
        what: name of the quantity, for messages.

    Raises:
        ValueError: the statistics are shorter than d, or lack the quantiles that the rule needs.
    """
    if rule.kind == "identity":
        return x
    d = x.shape[-1]
    if stats.dim < d:
        raise TransformError(
            f"Cannot normalize {what}: it has {counted(d, 'dimension')}, but its statistics only {stats.dim}. "
            "Send the data that they were computed from, or load this robot's statistics (norm_stats=, asset_id=)."
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
    """Invert `normalize`.

    Dimensions beyond the statistics (padding) are treated as in openpi: "quantile" leaves them unchanged, "z_score"
    assumes mean 0 and std 1.

    Raises:
        ValueError: the statistics lack the quantiles that the rule needs.
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
    """openpi's normalization of state and actions for a variant."""
    return dict.fromkeys(("state", "actions"), Normalization("quantile" if pi05 else "z_score", "openpi"))


def rewrite_stats(
    stats: NormStats, rule: Normalization, target: Normalization, *, what: str, names: Sequence[str]
) -> tuple[NormStats, list[str]]:
    """Rewrite statistics so that the rule `target` gives the same results as `rule`.

    Args:
        what: "state" (same results when normalizing) or "actions" (same results when unnormalizing).
        names: names of the dimensions.

    Returns:
        The new statistics, and the names of (nearly) constant dimensions in which deviations from the constant are
        scaled differently, because a rule can't divide by less than its eps.

    Raises:
        ValueError: another dimension would be off by more than 2e-5 of its range.
    """
    if rule == target or rule.kind == target.kind == "identity":
        return stats, []
    value, normalized, scale = _affine(stats, rule, what)
    eps = _EPS if target.eps_rule == "openpi" else 0.0
    if target.kind == "z_score":
        eps = eps or (float(_LEROBOT_EPS) if what == "state" else 0.0)
        std = np.maximum(scale - eps, 0)
        new = dataclasses.replace(stats, mean=value - normalized * (std + eps), std=std)
    else:
        span = np.maximum(2 * scale - eps, 0)
        q01 = value - (normalized + 1) * (span + eps) / 2
        new = dataclasses.replace(stats, q01=q01, q99=q01 + span)
    new_value, new_normalized, new_scale = _affine(new, target, what)
    shift = abs((new_value - new_normalized * new_scale) - (value - normalized * scale))
    is_different = np.maximum(shift, abs(new_scale - scale)) > 2 * _TOLERANCE * scale
    different = [i for i in np.flatnonzero(is_different).tolist() if i < len(names)]
    constant = constant_dims(stats, rule.kind, what=what)
    if not_constant := [names[i] for i in different if i not in constant]:
        raise TransformError(
            f"Normalization by {rule.kind} can't be expressed as {target.kind} with {target.eps_rule}'s eps for {what} "
            f"{', '.join(not_constant)}: the range there is too narrow, the numbers would change by more than "
            f"{_TOLERANCE:g} of it. Give the dimension a larger unit, or leave it out."
        )
    return new, [names[i] for i in different]


def _affine(stats: NormStats, rule: Normalization, what: str) -> tuple[np.ndarray, float, np.ndarray]:
    """A rule as an affine map in float64: x = value + (y − normalized) · scale for the normalized number y.

    Returns:
        value, normalized, scale.
    """
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
    """List the dimensions that are constant in the statistics up to rounding, so that only the eps is divided by."""
    if kind == "identity":
        return []
    if kind == "z_score":
        return np.flatnonzero(stats.std <= _ROUNDING * abs(stats.mean)).tolist()
    q01, q99 = _quantiles(stats, what)
    return np.flatnonzero(q99 - q01 <= _ROUNDING * np.maximum(abs(q01), abs(q99))).tolist()


def narrow_dims(stats: NormStats, names: Sequence[str], kind: str = "quantile") -> list[str]:
    """Warn about each named dimension that normalization would blow up, because (nearly) all of its values are the
    same."""
    if kind == "identity":
        return []
    by_quantiles = kind == "quantile" and stats.q01 is not None and stats.q99 is not None
    constant = constant_dims(stats, "z_score")
    constant_quantiles = constant_dims(stats, "quantile") if by_quantiles else []
    advice = "Normalize by z_score, or widen its q01 and q99 in norm_stats.json."
    messages = []
    columns = zip(names, stats.mean, stats.std, *stats.training_range(kind), strict=False)
    for i, (name, mean, std, low, high) in enumerate(columns):
        if i in constant:
            messages.append(
                f"{name} never changes (it is {mean:.6g}): any deviation from that is divided by 1e-6 when it is "
                "normalized. Leave it out of the robot's state or actions, or record data in which it moves."
            )
        elif i in constant_quantiles:
            messages.append(
                f"{name} is {low:.6g} in 98 % of the frames (q01 = q99): quantile normalization divides any deviation "
                f"by 1e-6. {advice}"
            )
        elif by_quantiles and high - low < 0.01 * std:
            messages.append(
                f"{name} hardly moves: 98 % of its values are within {high - low:.3g} ({low:.4g} to {high:.4g}), but "
                f"its standard deviation is {std:.3g}; quantile normalization makes the others larger than "
                f"{std / (high - low):.0f}. {advice}"
            )
    return messages


def load_norm_stats(path: str | Path) -> dict[str, NormStats]:
    """Read openpi's norm_stats.json: {"norm_stats": {"state": {"mean": [...], "std": [...], "q01": ..., "q99": ...}}}.

    Args:
        path: the file, or a folder with a norm_stats.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON of this layout, or `NormStats` rejects the values; the message names file and key.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "norm_stats.json"
    if not file.is_file():
        raise MissingFileError(
            f"No normalization statistics at {file}; expected a file or folder with norm_stats.json. A policy folder "
            "without it is incomplete: copy or download the policy again."
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
            present = [name for name in ("mean", "std", "q01", "q99") if values.get(name) is not None]
            stats[key] = NormStats(**{name: _statistic(name, values[name]) for name in present})
        except ValueError as error:
            raise TransformError(f'{file}: "{key}": {error}') from error
    return stats


def save_norm_stats(path: str | Path, stats: Mapping[str, NormStats]) -> None:
    """Write openpi's norm_stats.json; float64 values survive the round trip exactly.

    Args:
        path: the file, or an existing folder for norm_stats.json.
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
    """Raise a TransformError unless a setting has one of its known values."""
    if value not in known:
        raise TransformError(f"Unknown {what} {value!r}; expected one of {', '.join(known)}.")


def require_finite(x: np.ndarray, what: str, names: Sequence[str] = ()) -> None:
    """Raise a TransformError that names the dimensions (of the last axis) with NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(x).all(axis=tuple(range(x.ndim - 1))))
    if bad.size:
        dims = ", ".join(f"{i} ({names[i]})" if i < len(names) else str(i) for i in bad.tolist())
        raise TransformError(
            f"NaN or infinity in {what}, dimension {dims}; expected finite numbers. Check the source of the data."
        )


def _statistic(name: str, value: Any) -> np.ndarray:
    try:
        array = np.array(value, dtype=np.float64)  # a copy, so that the caller cannot change it
    except (TypeError, ValueError) as error:
        raise TransformError(f"Statistics: {name} is not a list of numbers: {error}") from error
    if array.ndim != 1:
        raise TransformError(
            f"Statistics: {name} has shape {list(array.shape)}; expected one value per dimension, [d]."
        )
    _reject_dims(f"{name} is NaN or infinite", ~np.isfinite(array))
    _reject_dims(f"{name} exceeds {MAX_STATISTIC:g}, more than any robot's values,", abs(array) > MAX_STATISTIC)
    array.flags.writeable = False
    return array


def _reject_dims(problem: str, is_bad: np.ndarray) -> None:
    if is_bad.any():
        raise TransformError(
            f"Statistics: {problem} in dimension {np.flatnonzero(is_bad).tolist()}. Compute them again from the data."
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
