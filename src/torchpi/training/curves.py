"""Plots over the steps of a training run: losses, norms, learning rate, speed, success and chunk errors."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from torchpi.training.metrics import Line, number, read_metrics, without_overtaken
from torchpi.ui.palette import CYCLE
from torchpi.ui.plots import draw_figure, label_axes, marker, panel_grid, save_figure, scale_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]
"""Steps and values."""

MAX_POINTS = 400
"""More points are drawn as means with their range."""
CHUNK_UNIT = "error / held-out action range"
_DIMS, _STEPS = "chunk_error_dims", "chunk_error_steps"
_MAX_DIMS, _MAX_EVALUATIONS = 10, 6


@dataclasses.dataclass(frozen=True)
class Panel:
    """A plot over the steps."""

    title: str
    curves: Mapping[str, str]
    """Labels by key of metrics.jsonl; "key/name" is an entry of a mapping."""
    unit: str
    color: str = CYCLE[0]
    """The color of the only curve; several have those of the cycle."""
    percent: bool = False
    """The values are fractions and are shown in percent, from 0."""
    from_zero: bool = False
    """The axis of values begins at 0, because only large changes matter."""

    def series(self, lines: Sequence[Line]) -> dict[str, Series]:
        """Steps and values by key; finite or not."""
        return {key: series(lines, key) for key in self.curves}


PANELS = (
    Panel(
        "Flow-matching loss",
        {"loss": "training", "holdout_loss": "held-out episodes, EMA weights"},
        "mean squared error of the velocity",
    ),
    Panel("Norm of the gradient", {"grad_norm": "gradient"}, "global L2 norm before clipping"),
    Panel("Norm of the weights", {"param_norm": "weights"}, "global L2 norm", CYCLE[2]),
    Panel("Learning rate", {"lr": "learning rate"}, "learning rate", CYCLE[2], from_zero=True),
    Panel("Speed", {"samples_per_second": "speed"}, "samples per second", CYCLE[2], from_zero=True),
    Panel("Waiting for data", {"data_wait": "waiting"}, "fraction of the time", CYCLE[1], percent=True),
    Panel("Success in simulation", {"success_rate": "success"}, "fraction of the episodes", CYCLE[2], percent=True),
    Panel("Error of sampled chunks", {"chunk_error": "error"}, CHUNK_UNIT, CYCLE[1]),
)


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


def dimension_panel(lines: Sequence[Line], ending: str, title: str) -> Panel | None:
    """Chunk errors per dimension of a robot, the ten that are the largest at the end; None: there are none."""
    key = f"{_DIMS}{ending}"
    found = (line[key] for line in reversed(lines) if isinstance(line.get(key), Mapping))
    last: Mapping[str, Any] = next(found, {})
    values = {name: value for name in last if (value := number(last[name])) is not None}
    largest = sorted(values, key=lambda name: np.nan_to_num(values[name], nan=-1), reverse=True)[:_MAX_DIMS]
    curves = {f"{key}/{name}": name for name in values if name in largest}
    return Panel(title, curves, CHUNK_UNIT, from_zero=True) if curves else None


def series(lines: Sequence[Mapping[str, Any]], key: str) -> Series:
    """Steps and values of one key, from the lines that have it."""
    points = [(line["step"], value) for line in lines if (value := _value(line, key)) is not None]
    return np.array([step for step, _ in points], np.int64), np.array([value for _, value in points], np.float64)


def _value(line: Mapping[str, Any], key: str) -> float | None:
    name, _, inner = key.partition("/")
    value = line.get(name)
    if inner:
        value = value.get(inner) if isinstance(value, Mapping) else None
    return number(value)


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


def draw_panel(axes: "Axes", lines: Sequence[Line], panel: Panel, *, title: str = "") -> None:
    """Draw a panel; its axis of values is logarithmic where the values span more than a power of ten."""
    drawn = [np.empty(0)]
    for i, (key, label) in enumerate(panel.curves.items()):
        points = thin(*series(lines, key))
        if not np.isfinite(points.mean).any():
            continue
        color = panel.color if len(panel.curves) == 1 else CYCLE[i % len(CYCLE)]
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


def draw_chunk_steps(axes: "Axes", lines: Sequence[Line], ending: str) -> None:
    """Draw a robot's error over the steps of a chunk at up to six evaluations; the later, the stronger the line."""
    key = f"{_STEPS}{ending}"
    evaluations = [line for line in lines if isinstance(line.get(key), list)]
    count = min(_MAX_EVALUATIONS, len(evaluations))
    chosen = sorted({round(place) for place in np.linspace(0, len(evaluations) - 1, count)})
    for i, place in enumerate(chosen):
        values = np.array([number(value) for value in evaluations[place][key]], np.float64)
        axes.plot(
            values,
            color=CYCLE[1],
            alpha=(i + 2) / (len(chosen) + 1),
            linewidth=1.2 + 0.8 * (i + 1 == len(chosen)),
            marker=marker(len(values), 20),
            label=f"after {evaluations[place]['step']} steps",
        )
    label_axes(axes, x="step of the chunk", y=CHUNK_UNIT)
    scale_values(axes, np.empty(0), from_zero=True)
    if chosen:
        axes.legend(ncols=2 if len(chosen) > 3 else 1)


def is_drawable(lines: Sequence[Line], panel: Panel) -> bool:
    """True if the panel has a finite value."""
    return any(np.isfinite(values).any() for _, values in panel.series(lines).values())


def plot_curves(metrics: pathlib.Path, out: pathlib.Path) -> None:
    """Draw metrics.jsonl into a .png file: the panels that have values."""
    lines = without_overtaken(read_metrics(metrics))
    shown = [panel for panel in panels(lines) if is_drawable(lines, panel)] or [PANELS[0]]

    def draw(figure: "Figure") -> None:
        for axes, panel in zip(panel_grid(figure, len(shown), 2), shown, strict=True):
            draw_panel(axes, lines, panel, title=panel.title)

    save_figure(draw_figure(draw, size=(11, 3 * math.ceil(len(shown) / 2))), out)
