"""Plots over the steps of a training run: losses, norms, learning rate, speed, success and chunk errors."""

import dataclasses
import math
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from torchpi.assets import assets
from torchpi.training.run_folder import Line, Series, number, read_metrics, series, without_overtaken
from torchpi.ui.palette import CYCLE
from torchpi.ui.plots import draw_figure, label_axes, marker, panel_grid, save_figure, scale_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 400
"""More points are drawn as means with their range."""
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
    """Labels by key of `series`."""
    unit: str
    color: int = 0
    """In the cycle, of the only curve; several have those of the cycle."""
    percent: bool = False
    """The values are fractions and are shown in percent, from 0."""
    from_zero: bool = False
    """The axis of values begins at 0, because only large changes matter."""


PANELS = tuple(Panel(**panel) for panel in TABLES["panels"])


def panels(lines: Sequence[Line]) -> list[Panel]:
    """`PANELS`, with the chunk errors of every robot of a mixture of datasets."""
    *others, errors = PANELS
    names = robots(lines)
    if len(names) == 1:
        return [*PANELS]
    curves = {f"chunk_error{ending}": name for ending, name in names.items()}
    return [*others, dataclasses.replace(errors, curves=curves)]


def robots(lines: Sequence[Line]) -> dict[str, str]:
    """Names of the robots by the endings of their keys of chunk errors: the first robot's have none."""
    found = {key.removeprefix(_DIMS) for line in lines for key in line if key.startswith(_DIMS)}
    return {ending: ending.removeprefix("_") or "first robot" for ending in sorted({"", *found})}


def dimension_panel(curves: Mapping[str, Series], ending: str, title: str) -> Panel | None:
    """Chunk errors per dimension of a robot, the ten that are the largest at the end; None: there are none."""
    key = f"{_DIMS}{ending}/"
    ends = {name: np.nan_to_num(values[-1], nan=-1) for name, (_, values) in curves.items() if name.startswith(key)}
    largest = sorted(ends, key=lambda name: ends[name], reverse=True)[:_MAX_DIMS]
    labels = {name: name.removeprefix(key) for name in ends if name in largest}
    return Panel(title, labels, CHUNK_UNIT, from_zero=True) if labels else None


class Thinned(NamedTuple):
    """A series with at most MAX_POINTS points: each the mean of neighbours, between their smallest and largest."""

    steps: Float[np.ndarray, " n"]
    mean: Float[np.ndarray, " n"]
    """NaN where none of the neighbours is finite."""
    low: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]


def thin(steps: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> Thinned:
    """The series as it is, or in MAX_POINTS groups of neighbours; what is not finite counts as missing."""
    points = []
    for group in np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS) or 1):
        finite = values[group][np.isfinite(values[group])]
        numbers = (finite.mean(), finite.min(), finite.max()) if len(finite) else (math.nan,) * 3
        points += [(steps[group].mean(), *numbers)] if len(group) else []
    return Thinned(*np.array(points, np.float64).reshape(-1, 4).T)


def is_drawable(curves: Mapping[str, Series], panel: Panel) -> bool:
    """True if the panel has a finite value."""
    return any(np.isfinite(curves[key][1]).any() for key in panel.curves if key in curves)


def draw_panel(axes: "Axes", curves: Mapping[str, Series], panel: Panel, *, title: str = "") -> None:
    """Draw a panel; its axis of values is logarithmic where the values span more than a power of ten."""
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


def chunk_steps(lines: Sequence[Line], ending: str) -> list[tuple[int, list[Any]]]:
    """A robot's errors over the steps of a chunk, after the step of each evaluation."""
    found = [(line["step"], line.get(f"{_STEPS}{ending}")) for line in lines]
    return [(step, errors) for step, errors in found if isinstance(errors, list)]


def draw_chunk_steps(axes: "Axes", evaluations: Sequence[tuple[int, list[Any]]]) -> None:
    """Draw up to six evaluations of `chunk_steps`; the later, the stronger the line."""
    count = min(_MAX_EVALUATIONS, len(evaluations))
    chosen = sorted({round(place) for place in np.linspace(0, len(evaluations) - 1, count)})
    for i, place in enumerate(chosen):
        step, errors = evaluations[place]
        axes.plot(
            np.array([number(value) for value in errors], np.float64),
            color=CYCLE[1],
            alpha=(i + 2) / (len(chosen) + 1),
            linewidth=1.2 + 0.8 * (i + 1 == len(chosen)),
            marker=marker(len(errors), 20),
            label=f"after {step} steps",
        )
    label_axes(axes, x="step of the chunk", y=CHUNK_UNIT)
    scale_values(axes, np.empty(0), from_zero=True)
    axes.legend(ncols=2 if len(chosen) > 3 else 1)


def plot_curves(metrics: pathlib.Path, out: pathlib.Path) -> None:
    """Draw metrics.jsonl into a .png file: the panels that have values."""
    lines = without_overtaken(read_metrics(metrics))
    curves = series(lines)
    shown = [panel for panel in panels(lines) if is_drawable(curves, panel)] or [PANELS[0]]

    def draw(figure: "Figure") -> None:
        for axes, panel in zip(panel_grid(figure, len(shown), 2), shown, strict=True):
            draw_panel(axes, curves, panel, title=panel.title)

    save_figure(draw_figure(draw, size=(11, 3 * math.ceil(len(shown) / 2))), out)
