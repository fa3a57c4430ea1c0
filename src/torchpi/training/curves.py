"""Plots of a training run over its steps: losses, norms, learning rate, speed, success and chunk errors."""

import dataclasses
import math
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from torchpi.assets import assets
from torchpi.training.run_folder import Line, Series, as_number, read_metrics, series, without_overtaken
from torchpi.ui.palette import CYCLE
from torchpi.ui.plots import draw_figure, label_axes, marker, panel_grid, save_figure, scale_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 400
"""Longer series are drawn as means of neighbours, with their range."""
TABLES: Mapping[str, Any] = tomllib.loads((assets() / "training.toml").read_text(encoding="utf-8"))
"""Panels, labels and captions."""
CHUNK_UNIT = TABLES["panels"][-1]["unit"]
_DIMS, _STEPS = "chunk_error_dims", "chunk_error_steps"
_MAX_DIMS, _MAX_EVALUATIONS = 10, 6


@dataclasses.dataclass(frozen=True)
class Panel:
    """A plot over the steps."""

    title: str
    curves: Mapping[str, str]
    """Labels of the curves, by key of `series`."""
    unit: str
    color: int = 0
    """Index in the colour cycle for a single curve; several curves use the cycle from its start."""
    percent: bool = False
    """True if the values are fractions, to show in percent on an axis from 0."""
    from_zero: bool = False
    """True if the value axis starts at 0, because only large changes matter."""


PANELS = tuple(Panel(**panel) for panel in TABLES["panels"])


def panels(lines: Sequence[Line]) -> list[Panel]:
    """`PANELS`, with the chunk errors of all robots if the run trains on a mixture."""
    names = robots(lines)
    if len(names) == 1:
        return [*PANELS]
    *others, chunk_errors = PANELS
    curves = {f"chunk_error{suffix}": name for suffix, name in names.items()}
    return [*others, dataclasses.replace(chunk_errors, curves=curves)]


def robots(lines: Sequence[Line]) -> dict[str, str]:
    """Names of the robots, by the suffix of their chunk errors' keys; the first robot's suffix is empty."""
    suffixes = {key.removeprefix(_DIMS) for line in lines for key in line if key.startswith(_DIMS)}
    return {suffix: suffix.removeprefix("_") or "first robot" for suffix in sorted({"", *suffixes})}


def dimension_panel(curves: Mapping[str, Series], suffix: str, title: str) -> Panel | None:
    """A panel of a robot's chunk errors for the ten dimensions with the largest final error; None without errors."""
    prefix = f"{_DIMS}{suffix}/"
    ends = {key: np.nan_to_num(values[-1], nan=-1) for key, (_, values) in curves.items() if key.startswith(prefix)}
    largest = sorted(ends, key=lambda key: ends[key], reverse=True)[:_MAX_DIMS]
    labels = {key: key.removeprefix(prefix) for key in ends if key in largest}
    return Panel(title, labels, CHUNK_UNIT, from_zero=True) if labels else None


class Thinned(NamedTuple):
    """A series with at most MAX_POINTS points, each the mean of neighbouring values with their minimum and maximum."""

    steps: Float[np.ndarray, " n"]
    mean: Float[np.ndarray, " n"]
    """NaN if none of the neighbours is finite."""
    low: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]


def thin(steps: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> Thinned:
    """Average a series over at most MAX_POINTS groups of neighbours; values that are not finite count as missing."""
    points = []
    for group in np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS) or 1):
        finite = values[group][np.isfinite(values[group])]
        if len(group):
            summary = (finite.mean(), finite.min(), finite.max()) if len(finite) else (math.nan,) * 3
            points.append((steps[group].mean(), *summary))
    return Thinned(*np.array(points, np.float64).reshape(-1, 4).T)


def is_drawable(curves: Mapping[str, Series], panel: Panel) -> bool:
    """True if any curve of the panel has a finite value."""
    return any(np.isfinite(curves[key][1]).any() for key in panel.curves if key in curves)


def draw_panel(axes: "Axes", curves: Mapping[str, Series], panel: Panel, *, title: str = "") -> None:
    """Draw a panel; its value axis is logarithmic if the values span more than a power of ten."""
    drawn = [np.empty(0)]
    for i, (key, label) in enumerate(panel.curves.items()):
        if key not in curves or not np.isfinite(curves[key][1]).any():
            continue
        points = thin(*curves[key])
        color = CYCLE[panel.color if len(panel.curves) == 1 else i % len(CYCLE)]
        dash = ("-", "--")[i // len(CYCLE)]
        if not np.array_equal(points.low, points.high, equal_nan=True):
            axes.fill_between(points.steps, points.low, points.high, color=color, alpha=0.22, linewidth=0)
        axes.plot(points.steps, points.mean, dash, color=color, marker=marker(len(points.steps)), label=label)
        drawn += [points.low, points.high]
    label_axes(axes, x="step", y=panel.unit, title=title)
    values = np.concatenate(drawn)
    scale_values(axes, values[np.isfinite(values)], percent=panel.percent, from_zero=panel.from_zero or panel.percent)
    if len(panel.curves) > 1 and len(drawn) > 1:
        axes.legend(ncols=2 if len(panel.curves) > 4 else 1)


def chunk_steps(lines: Sequence[Line], suffix: str) -> list[tuple[int, list[Any]]]:
    """The training step of each evaluation, with a robot's errors over the steps of a chunk."""
    evaluations = [(line["step"], line.get(f"{_STEPS}{suffix}")) for line in lines]
    return [(step, errors) for step, errors in evaluations if isinstance(errors, list)]


def draw_chunk_steps(axes: "Axes", evaluations: Sequence[tuple[int, list[Any]]]) -> None:
    """Draw up to six evaluations of `chunk_steps`; later ones have stronger lines."""
    count = min(_MAX_EVALUATIONS, len(evaluations))
    indices = sorted({round(index) for index in np.linspace(0, len(evaluations) - 1, count)})
    for i, index in enumerate(indices):
        step, errors = evaluations[index]
        is_last = i + 1 == len(indices)
        axes.plot(
            np.array([as_number(value) for value in errors], np.float64),
            color=CYCLE[1],
            alpha=(i + 2) / (len(indices) + 1),
            linewidth=2.0 if is_last else 1.2,
            marker=marker(len(errors), 20),
            label=f"after {step} steps",
        )
    label_axes(axes, x="step of the chunk", y=CHUNK_UNIT)
    scale_values(axes, np.empty(0), from_zero=True)
    axes.legend(ncols=2 if len(indices) > 3 else 1)


def plot_curves(metrics: pathlib.Path, out: pathlib.Path) -> None:
    """Plot the panels of a metrics.jsonl that have values into a .png file."""
    lines = without_overtaken(read_metrics(metrics))
    curves = series(lines)
    shown = [panel for panel in panels(lines) if is_drawable(curves, panel)] or [PANELS[0]]

    def draw(figure: "Figure") -> None:
        for axes, panel in zip(panel_grid(figure, len(shown), 2), shown, strict=True):
            draw_panel(axes, curves, panel, title=panel.title)

    save_figure(draw_figure(draw, size=(11, 3 * math.ceil(len(shown) / 2))), out)
