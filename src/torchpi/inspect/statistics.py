"""Checks of a policy's statistics, without any observation."""

import math
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from torchpi.inspect.diagnosis import Finding, finding, state_dim, state_units
from torchpi.policy import Policy
from torchpi.transforms.normalize import narrow_dims

# Values beyond these cannot be a robot's in that unit. No arm's joint turns twice, and 720 written where rad are meant
# is far above; no manipulator reaches 10 m, and millimetres are above; openings from 0 to 1 never come near 10.
_LIMITS = {"rad": 4 * math.pi, "m": 10.0, "deg": 1440.0, "mm": 10_000.0}
_OPENING_LIMIT = 10.0
# For no stated unit: above the degrees of 27 turns, the millimetres of 10 m and a servo's counts of two turns;
# larger is a placeholder, a time stamp or a broken record.
_ANY_LIMIT = 10_000.0

# A target that is further from where the robot has ever been than ten times the way that it has ever gone is in other
# units (a factor of 57 between degrees and rad, of 100 to 1000 between m, cm and mm), or another robot's.
_MAX_WIDTHS_BEYOND_STATE = 10.0

_EPS = 1e-6  # the normalization's


def excess(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> Float[np.ndarray, "... d"]:
    """Distance of x [..., d] from the range low to high [d], in its widths (+ 1e-6, as in normalization)."""
    return np.maximum(np.maximum(low - x, x - high), 0.0) / (high - low + _EPS)


def check_statistics(policy: Policy) -> Iterator[Finding]:
    """Name statistics that do not fit the robot, or that normalization makes huge."""
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
        low, high = (end[:count] for end in stats.training_range(rule.kind))
        for name, unit, extreme in zip(names[key], units[key], np.maximum(abs(low), abs(high)), strict=True):
            if extreme > (limit := _limit(unit)):
                reached = f"{extreme:.4g}{f' {unit}' if unit in _LIMITS else ''}"
                in_unit = f"in {unit}" if unit else "in any unit"
                yield finding("impossible_value", about, name=name, extreme=reached, limit=limit, in_unit=in_unit)
        if (stats.std[count:] > 0).any():
            yield finding("wider_than_the_robot", about, count=count, robot=robot.name, names=", ".join(names[key]))
    if used < len(robot.state_names):
        others = {"used": used, "count": len(robot.state_names), "others": ", ".join(robot.state_names[used:])}
        yield finding("narrower_than_the_robot", "statistics of state", **others)
    yield from _check_actions_against_state(policy, names["state"])


def _limit(unit: str) -> float:
    if re.search(r"\b0\b.*\b1\b", unit):  # "opening, 0 to 1", "0 open, 1 closed"
        return _OPENING_LIMIT
    return _LIMITS.get(unit, _ANY_LIMIT)


def _check_actions_against_state(policy: Policy, state_names: tuple[str, ...]) -> Iterator[Finding]:
    """Compare actions with the state of the same index, if both have the same name: they are its targets."""
    stats, rules, dim = policy.transforms.norm_stats, policy.transforms.normalization, len(state_names)
    state_low, state_high = (end[:dim] for end in stats["state"].training_range(rules["state"].kind))
    actions = policy.embodiment.actions
    low, high = stats["actions"].training_range(rules["actions"].kind)
    for i, (action, name) in enumerate(zip(actions, state_names, strict=False)):
        width = state_high[i] - state_low[i]
        if action.name != name or not _EPS < width < np.inf or not np.isfinite(high[i]):
            continue
        nearest, farthest = (0.0, 0.0) if action.kind == "delta" else (state_low[i], state_high[i])
        if max(nearest - low[i], high[i] - farthest) > _MAX_WIDTHS_BEYOND_STATE * width:
            ends = {"low": low[i], "high": high[i], "state_low": state_low[i], "state_high": state_high[i]}
            relative = ", relative to the state" if action.kind == "delta" else ""
            yield finding("other_units", "statistics of actions", name=name, relative=relative, **ends)
