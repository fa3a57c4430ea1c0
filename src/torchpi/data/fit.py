"""A dataset compared with its robot's limits, with the statistics of other robots and with their descriptions."""

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
"""Part of a training range by which values may exceed it and still have its unit and direction."""
_EXPECTED = 0.98
"""Fraction inside q01 to q99 of the data that these were computed from."""
_EPS = 1e-6  # the normalization's
_NARROW = 0.02
"""Part of a training range that is less than any task fills, as in metres and millimetres, or rad and degrees."""
_MOST_NORMALIZED, _ABSURD = 20.0, "normalized, they are"
"""The root mean square of normalized values is about 1; the loss of these is hundreds of times as large."""


def coverage_with_reasons(
    entry: StatsCoverage, found: Mapping[str, Distribution], theirs: Mapping[str, NormStats]
) -> StatsCoverage:
    """The comparison with one robot, with what differs: numbers of dimensions, likely causes, and the dimensions that
    are farthest outside."""
    reasons, outside = [], []
    for what, key in (("state", entry.state), ("actions", entry.actions)):
        if key is None:
            reasons += [f"no statistics of {what} there"] if found[what].names else []
            continue
        if key.dims != key.checkpoint_dims:
            reasons.append(
                f"{what} has {counted(key.checkpoint_dims, 'dimension')} there and {key.dims} here; compared are the "
                f"first {len(key.names)}"
            )
        reasons += misfits(what, key.names, found[what].stats, theirs[what])
        outside += [(inside, f"{what} {name} {inside:.1%}") for name, inside in zip(key.names, key.inside, strict=True)]
    farthest = ", ".join(text for inside, text in sorted(outside)[:3] if inside < _EXPECTED)
    reasons += [f"farthest outside: {farthest}"] if farthest else []
    return dataclasses.replace(entry, reasons=tuple(reasons))


def misfits(what: str, names: Sequence[str], ours: NormStats, theirs: NormStats) -> list[str]:
    """Likely causes of values outside of other statistics, or at the other end of them, in the first dimensions, whose
    names are given; ours are of the dataset, theirs of a checkpoint."""
    dims = slice(len(names))
    (low, high), (least, most) = ours.training_range(), theirs.training_range()
    low, high, least, most = low[dims], high[dims], least[dims], most[dims]
    margin = _MARGIN * (most - least)
    reach, their_reach = np.maximum(abs(low), abs(high)), np.maximum(abs(least), abs(most))

    def fits(lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
        return (lowest >= least - margin) & (highest <= most + margin)

    outside = ~fits(low, high)
    degrees = outside & fits(np.radians(low), np.radians(high)) & (their_reach < 2 * np.pi) & (reach > 2 * np.pi)
    grippers = np.array(list(map(is_gripper, names)), bool)
    # Small values are inside, too: they tell the unit only if those of all joints are too small.
    joints, ratio = ~grippers & (their_reach > 2 * np.pi), their_reach / np.maximum(reach, 1e-9)
    radians = joints & (joints.any() and ratio[joints].min() > OTHER_SCALE and np.median(ratio[joints]) < 200)
    percent = outside & grippers & fits(low / 100, high / 100) & (their_reach < 2) & (reach > 10)
    # Within its range, only the end at which a gripper rests tells its direction.
    mean, their_mean = ours.mean[dims], theirs.mean[dims]
    is_mirrored = abs(least + most - mean - their_mean) < abs(mean - their_mean) / 3
    at_other_end = ~outside & is_mirrored & (abs(mean - their_mean) > 0.3 * (most - least))
    causes = {
        "looks like degrees, there are radians": degrees,
        "looks like radians, there are degrees": radians,
        "looks like 0 to 100, there it is 0 to 1": percent,
        "seems to turn the other way: inside with the opposite sign": outside & fits(-high, -low),
        "seems inverted: rests at the other end of its range": at_other_end & grippers,
    }
    found = [
        f"{what} {first_of(list(itertools.compress(names, dims_of)), 3)}: {text}"
        for text, dims_of in causes.items()
        if dims_of.any()
    ]
    for text, shift in (("the arms swapped", len(names) // 2), ("the last one first", 1), ("the first one last", -1)):
        num_outside = np.count_nonzero(~fits(np.roll(low, shift), np.roll(high, shift)))
        if outside.sum() > 1 and num_outside <= outside.sum() / 4:
            found.append(f"{what}: seems to have another order of dimensions; it fits with {text}")
            break
    return found


@dataclasses.dataclass(frozen=True)
class ReleasedFit:
    """A robot's description compared with that of released statistics: their asset id and the embodiment of it."""

    name: str
    robot: str
    checkpoints: tuple[str, ...]
    num_different: int
    """Dimensions of state and actions without a counterpart of the same unit and command there, or here."""
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        differing = counted(self.num_different, "dimension differs", "dimensions differ")
        return f"{self.name} ({self.robot}) in {', '.join(self.checkpoints)}; {differing}"


def released_fits(robot: Embodiment) -> list[ReleasedFit]:
    """Compare a robot with those of the released statistics, the most similar first."""
    fits = []
    for name, released in RELEASED["statistics"].items():
        other = get_embodiment(released["robot"])
        num_different, reasons, differences = 0, [], collections.defaultdict(list)
        for what, ours, theirs in zip(("state", "actions"), _meanings(robot), _meanings(other), strict=True):
            if extra := len(ours) - len(theirs):
                reasons.append(f"{what} has {counted(len(theirs), 'dimension')} there and {len(ours)} here")
            different = [
                (*dim, there) for dim, there in zip(ours.items(), theirs.values(), strict=False) if dim[1] != there
            ]
            num_different += abs(extra) + len(different)
            for dim, here, there in different:
                differences[f'"{here}" here, "{there}" there'].append(dim)
        reasons += [f"{first_of(list(dict.fromkeys(dims)), 3)}: {text}" for text, dims in differences.items()]
        if robot.control_hz != other.control_hz:
            reasons.append(f"{robot.control_hz or 'not stated'} Hz here, {other.control_hz} there")
        fits.append(ReleasedFit(name, other.name, tuple(released["checkpoints"]), num_different, tuple(reasons)))
    return sorted(fits, key=lambda fit: (fit.num_different, len(fit.reasons)))


def _meanings(robot: Embodiment) -> tuple[dict[str, str], dict[str, str]]:
    """Unit of each dimension of the state; unit of each action, with the command unless it is a position."""
    actions = {a.name: a.unit if a.command == "position" else f"{a.command}: {a.unit}" for a in robot.actions}
    return dict(zip(robot.state_names, robot.state_units, strict=True)), actions


def unit_problems(dataset: LeRobotDataset, embodiment: Embodiment) -> list[str]:
    """A sentence on the actions most of whose values are far outside of their limits, as those in another unit are, and
    one on those that are relative to a state in another unit."""
    apart, beyond, in_degrees = list[str](), list[str](), False
    for i, action in enumerate(embodiment.actions):
        values, state = dataset.columns[lerobot.ACTION][:, i], dataset.columns[lerobot.STATE][:, i : i + 1]
        low, high = float(values.min()), float(values.max())
        found = f"{action.name} goes from {low:.4g} to {high:.4g}"
        if embodiment.action_mask[i] and differ_in_unit(values, state[:, 0]):
            apart.append(f"{found}, its state from {state.min():.4g} to {state.max():.4g}")
        if action.low is None or action.high is None:
            continue
        margin = (action.high - action.low) / 4
        if np.mean((values < action.low - margin) | (values > action.high + margin)) > 0.5:
            in_degrees |= bool(action.unit == "rad" and np.radians(max(-low, high)) < 2 * np.pi)
            unit = action.unit or "no unit stated"
            beyond.append(f"{found}, '{embodiment.name}' takes {action.low:g} to {action.high:g} ({unit})")
    problems, of = [], f"actions of {dataset.path}"
    if apart:
        problems.append(
            f"The {of} and the state that they are relative to seem to have different units, and the policy would "
            f"learn their difference: {first_of(apart, 3, '; ')}. Convert one of them in the dataset, or make the "
            f"action absolute in embodiment '{embodiment.name}'."
        )
    if beyond:
        looks = "; the values look like degrees" if in_degrees else ""
        problems.append(
            f"The {of} are not in the unit of embodiment '{embodiment.name}': {first_of(beyond, 3, '; ')}{looks}. "
            "Choose the embodiment in the set's unit, or state unit and limits in a file of your own."
        )
    return problems


def stats_problems(dataset: LeRobotDataset, embodiment: Embodiment, transforms: Transforms) -> list[str]:
    """A sentence on the state and one on the actions of a dataset, where the statistics of a policy don't fit them.

    Raises:
        ValueError: they are so far off that nothing can be trained or judged.
    """
    values = ModelValues.of(dataset, embodiment, action_horizon=dataset.action_horizon)
    found, problems = distributions(dataset, embodiment, action_horizon=dataset.action_horizon), list[str]()
    for what, rule in transforms.normalization.items():
        theirs = transforms.norm_stats[what]
        if rule.kind == "z_score":  # which divides by std, whatever the quantiles are
            theirs = NormStats(theirs.mean, theirs.std)
        if rule.kind != "identity" and values.names[what]:
            problems.append(_misfit(what, key_coverage(values, what, theirs), found[what].stats, theirs))
    problems = [f"{dataset.path} doesn't fit the statistics that normalize it: {text}." for text in problems if text]
    if absurd := [text for text in problems if _ABSURD in text]:
        raise DatasetError(
            f"{' '.join(absurd)} Nothing can be trained or judged so: take the statistics of the dataset (torchpi "
            "stats --out writes them for --norm-stats), or check embodiment and units."
        )
    return problems


def _misfit(what: str, key: KeyCoverage, ours: NormStats, theirs: NormStats) -> str:
    """Share of the values outside of other statistics, the worst dimensions and likely causes; "": they fit."""
    dims = slice(len(key.names))
    (low, high), (least, most) = ([end[dims] for end in stats.training_range()] for stats in (ours, theirs))
    outside, half = 1 - np.array(key.inside), (most - least) / 2 + _EPS
    normalized = np.hypot(ours.mean[dims] - (least + most) / 2, ours.std[dims]) / half  # root of the mean square
    causes = misfits(what, key.names, ours, theirs)
    if not causes and np.median((high - low) / half) < 2 * _NARROW:
        causes = [f"the {what} fill less than {_NARROW:.0%} of most ranges"]
    if not causes and outside.max() < 0.5 and outside.mean() < 0.2:
        return ""
    worst = ", ".join(
        f"{key.names[i]} {outside[i]:.0%} ({low[i]:.4g} to {high[i]:.4g}, there {least[i]:.4g} to {most[i]:.4g})"
        for i in np.argsort(-outside, kind="stable")[:3]
    )
    is_absurd = ((outside > 0.5) & (normalized > _MOST_NORMALIZED)).any()
    causes += [f"{_ABSURD} {normalized.max():.3g} in place of about 1"] if is_absurd else []
    share = f"{outside.mean():.1%} of the {what} are outside of {key.range}, where 2% are expected"
    return "; ".join((f"{share}, most of {worst}", *causes))
