"""Comparison of a dataset with its robot's limits, with statistics of other robots, and with their descriptions."""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data.guesses import OTHER_SCALE, differ_in_unit, is_gripper
from torchpi.data.lerobot import LeRobotDataset
from torchpi.data.stats import Distribution, KeyCoverage, ModelValues, StatsCoverage, distributions, key_coverage
from torchpi.errors import DatasetError, counted, first_of
from torchpi.robots import Embodiment, get_embodiment
from torchpi.robots.presets import RELEASED
from torchpi.transforms.normalize import NormStats
from torchpi.transforms.pipeline import Transforms

_MARGIN = 0.25
"""Fraction of a training range by which values may exceed it and still be taken to have its unit and direction."""
_EXPECTED = 0.98
"""Fraction inside q01 to q99 of the data that these were computed from."""
_EPS = 1e-6  # the normalization's
_NARROW = 0.02
"""Fraction of a training range that every task exceeds; less indicates another unit, such as metres for millimetres."""
_MAX_NORMALIZED_RMS = 20.0
"""The root mean square of normalized values is about 1. Beyond this limit, the loss is hundreds of times too large."""


def coverage_with_reasons(
    entry: StatsCoverage, distribution_of: Mapping[str, Distribution], norm_stats: Mapping[str, NormStats]
) -> StatsCoverage:
    """Add to the coverage of one robot what differs: numbers of dimensions, likely causes, and the dimensions with the
    most values outside the training range."""
    reasons, inside_of = list[str](), list[tuple[float, str]]()
    for key, coverage in (("state", entry.state), ("actions", entry.actions)):
        ours = distribution_of[key]
        if coverage is None:
            reasons += [f"the statistics have no {key}"] if ours.names else []
            continue
        if coverage.dims != coverage.checkpoint_dims:
            reasons.append(
                f"{key} has {counted(coverage.checkpoint_dims, 'dimension')} in the statistics and {coverage.dims} in "
                f"the dataset; only the first {len(coverage.names)} are compared"
            )
        reasons += misfits(key, coverage.names, ours.stats, norm_stats[key])
        reasons += mirrored_grippers(key, coverage.names, ours.stats, norm_stats[key])
        for name, inside in zip(coverage.names, coverage.inside, strict=True):
            inside_of.append((inside, f"{key} {name} {inside:.1%}"))
    farthest = ", ".join(text for inside, text in sorted(inside_of)[:3] if inside < _EXPECTED)
    reasons += [f"farthest outside: {farthest}"] if farthest else []
    return dataclasses.replace(entry, reasons=tuple(reasons))


def misfits(key: str, names: Sequence[str], ours: NormStats, theirs: NormStats) -> list[str]:
    """Likely causes of values of a dataset (`ours`) outside the statistics of a checkpoint (`theirs`). Only the first
    dimensions, whose names are given, are compared."""
    dims = slice(len(names))
    low, high = (end[dims] for end in ours.training_range())
    their_low, their_high = (end[dims] for end in theirs.training_range())
    margin = _MARGIN * (their_high - their_low)
    reach, their_reach = np.maximum(abs(low), abs(high)), np.maximum(abs(their_low), abs(their_high))

    def fits(lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
        return (lowest >= their_low - margin) & (highest <= their_high + margin)

    outside = ~fits(low, high)
    degrees = outside & fits(np.radians(low), np.radians(high)) & (their_reach < 2 * np.pi) & (reach > 2 * np.pi)
    grippers = np.array(list(map(is_gripper, names)), bool)
    # Small values are inside, too: they indicate the unit only if the values of all joints are too small.
    joints, ratio = ~grippers & (their_reach > 2 * np.pi), their_reach / np.maximum(reach, 1e-9)
    radians = joints & (joints.any() and ratio[joints].min() > OTHER_SCALE and np.median(ratio[joints]) < 200)
    percent = outside & grippers & fits(low / 100, high / 100) & (their_reach < 2) & (reach > 10)
    causes = {
        "looks like degrees, but the statistics are in radians": degrees,
        "looks like radians, but the statistics are in degrees": radians,
        "looks like 0 to 100, but the statistics are 0 to 1": percent,
        "seems to turn the other way: inside with the opposite sign": outside & fits(-high, -low),
    }
    reasons = []
    for text, affected in causes.items():
        if affected.any():
            reasons.append(f"{key} {first_of(list(itertools.compress(names, affected)), 3)}: {text}")
    for text, shift in (("the arms swapped", len(names) // 2), ("the last one first", 1), ("the first one last", -1)):
        num_outside = np.count_nonzero(~fits(np.roll(low, shift), np.roll(high, shift)))
        if outside.sum() > 1 and num_outside <= outside.sum() / 4:
            reasons.append(f"{key}: seems to have another order of dimensions; it fits with {text}")
            break
    return reasons


def mirrored_grippers(key: str, names: Sequence[str], ours: NormStats, theirs: NormStats) -> list[str]:
    """Grippers inside their training range with a mean near the other end. Other tasks can be the cause; an inverted
    gripper opens instead of closing, and nothing else in the statistics shows it."""
    (low, high), (their_low, their_high) = ours.training_range(), theirs.training_range()
    reasons = []
    for i, name in enumerate(names):
        width, mean, their_mean = their_high[i] - their_low[i], ours.mean[i], theirs.mean[i]
        is_inside = low[i] >= their_low[i] - _MARGIN * width and high[i] <= their_high[i] + _MARGIN * width
        is_used = high[i] - low[i] > width / 2  # a gripper that rests at one end is of a task that does not grasp
        from_mirrored = abs(their_low[i] + their_high[i] - their_mean - mean)
        if is_gripper(name) and is_inside and is_used and abs(mean - their_mean) > max(0.3 * width, 3 * from_mirrored):
            reasons.append(
                f"{key} {name}: the mean is {mean:.3g}, in the statistics {their_mean:.3g}, within {their_low[i]:.3g} "
                f"to {their_high[i]:.3g}: inverted, or other tasks?"
            )
    return reasons


@dataclasses.dataclass(frozen=True)
class ReleasedFit:
    """A robot's description compared with the robot of released statistics."""

    name: str
    """Asset id of the statistics."""
    robot: str
    """Embodiment of the statistics."""
    checkpoints: tuple[str, ...]
    num_different: int
    """Number of dimensions of state and actions without a counterpart of the same unit and command."""
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        differing = counted(self.num_different, "dimension differs", "dimensions differ")
        return f"{self.name} ({self.robot}) in {', '.join(self.checkpoints)}; {differing}"


def released_fits(robot: Embodiment) -> list[ReleasedFit]:
    """Compare a robot with those of the released statistics, most similar first."""
    fits = []
    for name, released in RELEASED["statistics"].items():
        other = get_embodiment(released["robot"])
        num_different, reasons, differences = 0, [], collections.defaultdict(list)
        for key, ours, theirs in zip(("state", "actions"), _meanings(robot), _meanings(other), strict=True):
            if extra := len(ours) - len(theirs):
                reasons.append(f"{key} has {counted(len(ours), 'dimension')}, released with {len(theirs)}")
                num_different += abs(extra)
            for (dim, meaning), their_meaning in zip(ours.items(), theirs.values(), strict=False):
                if meaning != their_meaning:
                    num_different += 1
                    differences[f'"{meaning}", released with "{their_meaning}"'].append(dim)
        reasons += [f"{first_of(list(dict.fromkeys(dims)), 3)}: {text}" for text, dims in differences.items()]
        if robot.control_hz != other.control_hz:
            reasons.append(f"{robot.control_hz or 'not stated'} Hz, released with {other.control_hz}")
        fits.append(ReleasedFit(name, other.name, tuple(released["checkpoints"]), num_different, tuple(reasons)))
    return sorted(fits, key=lambda fit: (fit.num_different, len(fit.reasons)))


def _meanings(robot: Embodiment) -> tuple[dict[str, str], dict[str, str]]:
    """Units of the state's dimensions; units of the actions, with the command unless it is a position."""
    actions = {a.name: a.unit if a.command == "position" else f"{a.command}: {a.unit}" for a in robot.actions}
    return dict(zip(robot.state_names, robot.state_units, strict=True)), actions


def unit_problems(dataset: LeRobotDataset, embodiment: Embodiment) -> list[str]:
    """Messages about delta actions in another unit than their state, and about actions most of whose values are far
    outside their limits, which indicates another unit."""
    other_unit, out_of_limits, may_be_degrees = list[str](), list[str](), False
    for i, action in enumerate(embodiment.actions):
        values, state = dataset.columns[lerobot.ACTION][:, i], dataset.columns[lerobot.STATE][:, i : i + 1]
        low, high = float(values.min()), float(values.max())
        found = f"{action.name} goes from {low:.4g} to {high:.4g}"
        if embodiment.action_mask[i] and differ_in_unit(values, state[:, 0]):
            other_unit.append(f"{found}, its state from {state.min():.4g} to {state.max():.4g}")
        if action.low is None or action.high is None:
            continue
        margin = (action.high - action.low) / 4
        if np.mean((values < action.low - margin) | (values > action.high + margin)) > 0.5:
            may_be_degrees |= bool(action.unit == "rad" and np.radians(max(-low, high)) < 2 * np.pi)
            unit = action.unit or "no unit stated"
            out_of_limits.append(f"{found}, '{embodiment.name}' takes {action.low:g} to {action.high:g} ({unit})")
    problems = []
    if other_unit:
        problems.append(
            f"The actions of {dataset.path} and the state that they are relative to seem to have different units, and "
            f"the policy would learn their difference: {first_of(other_unit, 3, '; ')}. Convert one of them in the "
            f"dataset, or make the action absolute in embodiment '{embodiment.name}'."
        )
    if out_of_limits:
        hint = "; the values look like degrees" if may_be_degrees else ""
        problems.append(
            f"The actions of {dataset.path} are not in the unit of embodiment '{embodiment.name}': "
            f"{first_of(out_of_limits, 3, '; ')}{hint}. Choose an embodiment in the dataset's unit, or state unit and "
            "limits in an embodiment file of your own."
        )
    return problems


def stats_problems(dataset: LeRobotDataset, embodiment: Embodiment, transforms: Transforms) -> list[str]:
    """Messages about the state and the actions of a dataset that don't fit the statistics of a policy.

    Raises:
        ValueError: they are so far off that nothing can be trained or evaluated.
    """
    values = ModelValues.of(dataset, embodiment, action_horizon=dataset.action_horizon)
    distribution_of = distributions(dataset, embodiment, action_horizon=dataset.action_horizon)
    problems, fatal = list[str](), list[str]()
    for key, rule in transforms.normalization.items():
        theirs = transforms.norm_stats[key]
        if rule.kind == "z_score":  # divides by std, whatever the quantiles are
            theirs = NormStats(theirs.mean, theirs.std)
        if rule.kind == "identity" or not values.names[key]:
            continue
        coverage, ours = key_coverage(values, key, theirs), distribution_of[key].stats
        text, is_fatal = _misfit(key, coverage, ours, theirs)
        if text:
            problems.append(f"{dataset.path} doesn't fit the statistics that normalize it: {text}.")
            fatal += problems[-1:] if is_fatal else []
        for text in mirrored_grippers(key, coverage.names, ours, theirs):
            problems.append(f"{dataset.path}, compared with the statistics that normalize it: {text}")
    if fatal:
        raise DatasetError(
            f"{' '.join(fatal)} Nothing can be trained or evaluated with them: use the statistics of the dataset "
            "(torchpi stats --out writes them for --norm-stats), or check embodiment and units."
        )
    return problems


def require_normalizable_actions(dataset: LeRobotDataset, embodiment: Embodiment, transforms: Transforms) -> None:
    """Check the statistics of a dataset that its own actions are normalized with.

    Raises:
        ValueError: a dimension is nearly always the same, so that quantile normalization blows up its other values.
    """
    if transforms.normalization["actions"].kind != "quantile":
        return
    stats = transforms.norm_stats["actions"]
    low, high = stats.training_range()
    normalized_rms = np.hypot(stats.mean - (low + high) / 2, stats.std) / ((high - low) / 2 + _EPS)
    names = embodiment.action_names
    blown_up = [
        f"{names[i]} is {low[i]:.4g} to {high[i]:.4g} in 98% of the frames, with a standard deviation of "
        f"{stats.std[i]:.3g} over all frames (the root mean square of its normalized values is {normalized_rms[i]:.3g} "
        "instead of about 1)"
        for i in np.flatnonzero(normalized_rms[: len(names)] > _MAX_NORMALIZED_RMS)
    ]
    if blown_up:
        raise DatasetError(
            f"The actions of {dataset.path} can't be trained with quantile normalization: "
            f"{first_of(blown_up, 3, '; ')}. Write the statistics with torchpi stats --out norm_stats.json, widen q01 "
            "and q99 of these dimensions in the file, and train with --norm-stats norm_stats.json."
        )


def _misfit(key: str, coverage: KeyCoverage, ours: NormStats, theirs: NormStats) -> tuple[str, bool]:
    """The fraction of values outside other statistics (unless nearly all are inside), the worst dimensions and likely
    causes; empty if they fit. True if the normalized values are too large for any training."""
    dims = slice(len(coverage.names))
    low, high = (end[dims] for end in ours.training_range())
    their_low, their_high = (end[dims] for end in theirs.training_range())
    outside, half = 1 - np.array(coverage.inside), (their_high - their_low) / 2 + _EPS
    normalized_rms = np.hypot(ours.mean[dims] - (their_low + their_high) / 2, ours.std[dims]) / half
    causes = misfits(key, coverage.names, ours, theirs)
    if not causes and np.median((high - low) / half) < 2 * _NARROW:
        causes = [f"the {key} fill less than {_NARROW:.0%} of most ranges"]
    if outside.max() >= 0.5 or outside.mean() >= 0.2 or (causes and outside.mean() > 1 - _EXPECTED):
        worst = ", ".join(
            f"{coverage.names[i]} {outside[i]:.0%} ({low[i]:.4g} to {high[i]:.4g}, statistics {their_low[i]:.4g} to "
            f"{their_high[i]:.4g})"
            for i in np.argsort(-outside, kind="stable")[:3]
            if outside[i] > 1 - _EXPECTED
        )
        fraction = f"{outside.mean():.1%} of the {key} are outside {coverage.range}, where 2% are expected"
        causes.insert(0, f"{fraction}, most of {worst}")
    is_fatal = bool(((outside > 0.5) & (normalized_rms > _MAX_NORMALIZED_RMS)).any())
    if is_fatal:
        causes.append(f"the root mean square of normalized values is {normalized_rms.max():.3g} instead of about 1")
    return "; ".join(causes), is_fatal
