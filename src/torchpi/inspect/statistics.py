"""Checks of a policy's normalization statistics, without an observation."""

import math
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from torchpi.inspect.diagnosis import Finding, finding, state_dim, state_units
from torchpi.policy import Policy
from torchpi.transforms.normalize import narrow_dims

# A robot's values never exceed these. No joint turns twice, so 720 in place of rad is far above its limit; no
# manipulator reaches 10 m, so millimetres are above the limit of m; openings from 0 to 1 never come near 10.
_LIMITS = {"rad": 4 * math.pi, "m": 10.0, "deg": 1440.0, "mm": 10_000.0}
_OPENING_LIMIT = 10.0
# Without a stated unit: more than 27 turns in degrees, 10 m in millimetres, or two turns in counts of a servo.
# Larger values are placeholders, timestamps or corrupted.
_ANY_LIMIT = 10_000.0

# A target beyond the state's range by more than ten times its width has other units (a factor of 57 between degrees and
# rad, of 100 to 1000 between m, cm and mm), or belongs to another robot.
_MAX_WIDTHS_BEYOND_STATE = 10.0

_EPS = 1e-6  # as in normalization


def excess(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> Float[np.ndarray, "... d"]:
    """Distance of x [..., d] from the range low to high [d], relative to the range's width + 1e-6."""
    return np.maximum(np.maximum(low - x, x - high), 0.0) / (high - low + _EPS)


def check_statistics(policy: Policy) -> Iterator[Finding]:
    """Report statistics that do not fit the robot, or with which normalization gives huge values."""
    robot, used = policy.embodiment, state_dim(policy)
    names = {"state": robot.state_names[:used], "actions": robot.action_names}
    units = {"state": state_units(policy), "actions": tuple(action.unit for action in robot.actions)}
    for key in ("state", "actions"):
        stats, rule = policy.transforms.norm_stats[key], policy.transforms.normalization[key]
        about, count = f"statistics of {key}", len(names[key])
        if rule.kind == "identity":
            yield finding("no_statistics", about, key=key)
            continue
        for message in narrow_dims(stats, names[key], rule.kind):
            yield finding("narrow_statistics", about, reason=message)
        low, high = (bound[:count] for bound in stats.training_range(rule.kind))
        for name, unit, extreme in zip(names[key], units[key], np.maximum(abs(low), abs(high)), strict=True):
            limit = _limit(unit)
            if extreme > limit:
                value = f"{extreme:.4g} {unit}" if unit in _LIMITS else f"{extreme:.4g}"
                in_unit = f"in {unit}" if unit else "in any unit"
                yield finding("impossible_value", about, name=name, extreme=value, limit=limit, in_unit=in_unit)
        if (stats.std[count:] > 0).any():
            yield finding("wider_than_the_robot", about, count=count, robot=robot.name, names=", ".join(names[key]))
    if used < len(robot.state_names):
        others, count = ", ".join(robot.state_names[used:]), len(robot.state_names)
        yield finding("narrower_than_the_robot", "statistics of state", used=used, count=count, others=others)
    yield from _check_actions_against_state(policy, names["state"])


def _limit(unit: str) -> float:
    if re.search(r"\b0\b.*\b1\b", unit):  # "opening, 0 to 1", "0 open, 1 closed"
        return _OPENING_LIMIT
    return _LIMITS.get(unit, _ANY_LIMIT)


def _check_actions_against_state(policy: Policy, state_names: tuple[str, ...]) -> Iterator[Finding]:
    """Compare actions with the state of the same index and name, whose targets they are."""
    stats, rules = policy.transforms.norm_stats, policy.transforms.normalization
    state_low, state_high = stats["state"].training_range(rules["state"].kind)
    low, high = stats["actions"].training_range(rules["actions"].kind)
    for i, (action, name) in enumerate(zip(policy.embodiment.actions, state_names, strict=False)):
        width = state_high[i] - state_low[i]
        if action.name != name or not _EPS < width < np.inf or not np.isfinite(high[i]):
            continue
        is_delta = action.kind == "delta"
        expected_low, expected_high = (0.0, 0.0) if is_delta else (state_low[i], state_high[i])
        if max(expected_low - low[i], high[i] - expected_high) > _MAX_WIDTHS_BEYOND_STATE * width:
            ranges = {"low": low[i], "high": high[i], "state_low": state_low[i], "state_high": state_high[i]}
            relative = ", relative to the state" if is_delta else ""
            yield finding("other_units", "statistics of actions", name=name, relative=relative, **ranges)
