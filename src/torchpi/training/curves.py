"""The curves of a run: losses, norms, learning rate, speed; read from metrics.jsonl, thinned and drawn."""

import dataclasses
import io
import math
import pathlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from torchpi.training.metrics import Line, number, read_metrics, without_overtaken

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]
"""Steps and values."""

_DIMS, _STEPS = "chunk_error_dims", "chunk_error_steps"
MAX_POINTS = 400
"""More of them are drawn as means with the range that they come from."""
LOSS_RGB, HOLDOUT_RGB, OTHER_RGB, GRID_RGB, TEXT_RGB = "#2f66d0", "#cf5a1e", "#0d8577", "#e4e1d9", "#5d6470"
_CYCLE = (LOSS_RGB, HOLDOUT_RGB, OTHER_RGB, "#b7357f", "#8e96a3")
_VARIABLES = {
    LOSS_RGB: "prefix", HOLDOUT_RGB: "suffix", OTHER_RGB: "vision", GRID_RGB: "line", TEXT_RGB: "soft",
    "#b7357f": "time", "#8e96a3": "noise",
}  # fmt: skip
"""Their names in the pages' style sheet, which has others for dark ground."""


# ---- reading ----


def series(lines: Sequence[Mapping[str, Any]], key: str) -> Series:
    """Steps and values of one key, from the lines that have it."""
    points = [(line["step"], value) for line in lines if (value := number(line.get(key))) is not None]
    return np.array([step for step, _ in points], np.int64), np.array([value for _, value in points], np.float64)


@dataclasses.dataclass(frozen=True)
class Thinned:
    """A series with at most MAX_POINTS points: each the mean of neighbours, between their smallest and largest."""

    steps: Float[np.ndarray, " n"]
    mean: Float[np.ndarray, " n"]
    """NaN where none of the neighbours is finite."""
    low: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]


def thin(steps: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> Thinned:
    """The series as it is, or in MAX_POINTS groups of neighbours; what is not finite counts as missing."""
    starts = np.unique(np.linspace(0, len(steps), min(len(steps), MAX_POINTS), endpoint=False).astype(np.int64))
    if not len(starts):
        return Thinned(*(np.empty(0) for _ in range(4)))
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(np.float64), starts)
    counts[counts == 0] = math.nan
    mean = np.add.reduceat(np.where(finite, values, 0), starts) / counts
    low = np.minimum.reduceat(np.where(finite, values, math.inf), starts)
    high = np.maximum.reduceat(np.where(finite, values, -math.inf), starts)
    sizes = np.diff([*starts, len(steps)])
    return Thinned(np.add.reduceat(steps, starts) / sizes, mean, low + 0 * counts, high + 0 * counts)


# ---- drawing ----


@dataclasses.dataclass(frozen=True)
class Panel:
    """A diagram over the steps."""

    title: str
    keys: Mapping[str, tuple[str, str]]
    """Of metrics.jsonl: what the curve is, and its colour."""
    unit: str
    """What the axis of values shows."""
    percent: bool = False
    """The values are shares, and are shown as percent."""
    from_zero: bool = False
    """The axis of values begins at 0, because only large changes matter."""


PANELS = (
    Panel(
        "Flow-matching loss",
        {"loss": ("training", LOSS_RGB), "holdout_loss": ("held-out episodes, averaged weights", HOLDOUT_RGB)},
        "mean squared error of the velocity",
    ),
    Panel("Norm of the gradient", {"grad_norm": ("gradient", LOSS_RGB)}, "global L2 norm before it is cut"),
    Panel("Norm of the weights", {"param_norm": ("weights", OTHER_RGB)}, "global L2 norm"),
    Panel("Learning rate", {"lr": ("learning rate", OTHER_RGB)}, "learning rate", from_zero=True),
    Panel("Speed", {"samples_per_second": ("speed", OTHER_RGB)}, "samples per second", from_zero=True),
    Panel(
        "Waiting for data",
        {"data_wait": ("waiting", HOLDOUT_RGB)},
        "share of the time",
        percent=True,
        from_zero=True,
    ),
    Panel(
        "Success in simulation",
        {"success_rate": ("success", OTHER_RGB)},
        "share of the episodes",
        percent=True,
        from_zero=True,
    ),
    Panel("Error of sampled chunks", {"chunk_error": ("error", HOLDOUT_RGB)}, "mean absolute error / data range"),
)


def robots(lines: Sequence[Line]) -> dict[str, str]:
    """The endings of the keys of chunk errors, and whose they are: the first robot's have none."""
    found = dict.fromkeys(key.removeprefix(_DIMS) for line in lines for key in line if key.startswith(_DIMS))
    return {ending: ending.removeprefix("_") or "first robot" for ending in sorted({"", *found})}


def panels(lines: Sequence[Line]) -> list[Panel]:
    """`PANELS`, with the chunk errors of every robot of a mixture of datasets."""
    *others, errors = PANELS
    names = robots(lines)
    if len(names) == 1:
        return [*PANELS]
    keys = {f"chunk_error{ending}": (name, _CYCLE[i % len(_CYCLE)]) for i, (ending, name) in enumerate(names.items())}
    return [*others, dataclasses.replace(errors, keys=keys)]


def panel_series(lines: Sequence[Line]) -> dict[str, Series]:
    """What the panels draw, by key."""
    return {key: series(lines, key) for panel in panels(lines) for key in panel.keys}


def drawable(curves: Mapping[str, Series], panel: Panel) -> bool:
    """Whether there is anything finite for it."""
    return any(np.isfinite(curves[key][1]).any() for key in panel.keys)


def draw_panel(axes: "Axes", curves: Mapping[str, Series], panel: Panel) -> None:
    """Draw a panel; its axis of values is logarithmic where the values span more than a power of ten."""
    drawn = []
    for key, (label, color) in panel.keys.items():
        points = thin(*curves[key])
        if not np.isfinite(points.mean).any():
            continue
        if not np.array_equal(points.low, points.high, equal_nan=True):
            axes.fill_between(points.steps, points.low, points.high, color=color, alpha=0.22, linewidth=0)
        marker = "o" if len(points.steps) <= 40 else None
        axes.plot(points.steps, points.mean, color=color, marker=marker, markersize=3.5, linewidth=1.5, label=label)
        drawn += [points.low, points.high]
    style_axes(axes, x="step", y=panel.unit)
    values = np.concatenate([part[np.isfinite(part)] for part in drawn]) if drawn else np.empty(0)
    set_scale(axes, values, percent=panel.percent, from_zero=panel.from_zero)
    if len(panel.keys) > 1 and drawn:
        axes.legend(frameon=False, fontsize=9, labelcolor=TEXT_RGB)


def style_axes(axes: "Axes", *, x: str, y: str) -> None:
    """Labels, a grid, and no more lines than that."""
    axes.set_xlabel(x, fontsize=9.5, color=TEXT_RGB)
    axes.set_ylabel(y, fontsize=9.5, color=TEXT_RGB)
    axes.grid(color=GRID_RGB, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, labelcolor=TEXT_RGB, length=0, which="both")
    for spine in axes.spines.values():
        spine.set_visible(False)


def set_scale(axes: "Axes", values: Float[np.ndarray, " n"], *, percent: bool = False, from_zero: bool = False) -> None:
    """Numbers without powers in the ticks; logarithmic where positive values span more than a factor of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if from_zero:
        axes.set_ylim(bottom=0)
    elif len(values) and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 200 * values.min() else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}" if percent else f"{value:.10g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(step: float) -> str:
    """20k for 20 000."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(step) >= size:
            return f"{step / size:g}{unit}"
    return f"{step:g}"


def draw_dimension_errors(axes: "Axes", lines: Sequence[Line], ending: str) -> None:
    """The errors of sampled chunks over the training, a curve per dimension of the action.

    Of many dimensions, the ten whose error is the largest at the end.

    Args:
        ending: the robot's, of `robots`.
    """
    key = f"{_DIMS}{ending}"
    evaluations = [line for line in lines if isinstance(line.get(key), Mapping)]
    last = {name: _sortable(value) for name, value in evaluations[-1][key].items()}
    names = sorted(sorted(last, key=lambda name: last[name], reverse=True)[:10], key=list(last).index)
    for i, name in enumerate(names):
        color, dash = _CYCLE[i % len(_CYCLE)], ("-", "--")[i // len(_CYCLE)]
        rows = [{"step": line["step"], "error": line[key].get(name)} for line in evaluations]
        points = thin(*series(rows, "error"))
        marker = "o" if len(points.steps) <= 40 else None
        axes.plot(points.steps, points.mean, dash, color=color, marker=marker, markersize=3, linewidth=1.4, label=name)
    style_axes(axes, x="step", y="mean absolute error / data range")
    set_scale(axes, np.empty(0), from_zero=True)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=TEXT_RGB, ncols=2 if len(names) > 4 else 1)


def _sortable(value: Any) -> float:
    """The value, and -1 for what is no finite number."""
    found = number(value)
    return -1.0 if found is None or not math.isfinite(found) else found


def draw_chunk_steps(axes: "Axes", lines: Sequence[Line], ending: str) -> None:
    """The error over the steps of a chunk, at up to six evaluations; the later, the stronger the line.

    Args:
        ending: the robot's, of `robots`.
    """
    key = f"{_STEPS}{ending}"
    evaluations = [line for line in lines if isinstance(line.get(key), list)]
    chosen = sorted({round(place) for place in np.linspace(0, len(evaluations) - 1, min(6, len(evaluations)))})
    for i, place in enumerate(chosen):
        values = np.array([number(value) for value in evaluations[place][key]], np.float64)
        axes.plot(
            np.arange(len(values)),
            values,
            color=HOLDOUT_RGB,
            alpha=(i + 2) / (len(chosen) + 1),
            linewidth=1.2 + 0.8 * (i + 1 == len(chosen)),
            marker="o" if len(values) <= 20 else None,
            markersize=3,
            label=f"after {evaluations[place]['step']} steps",
        )
    style_axes(axes, x="step of the chunk", y="mean absolute error / data range")
    set_scale(axes, np.empty(0), from_zero=True)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=TEXT_RGB, ncols=2 if len(chosen) > 3 else 1)


def as_svg(draw: Callable[["Axes"], None], description: str) -> str:
    """A drawing as an SVG element for a page with the common style sheet, whose colours and font it takes.

    Args:
        draw: fills the axes that it is called with.
        description: for those who don't see it: what the axes are, and what is drawn.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    # Text stays text; ids have to be the same in every run, and others in every figure of a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure = Figure(figsize=(5.4, 2.7), layout="constrained")
        draw(figure.add_subplot())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawing = buffer.getvalue()
    box = re.search(r'viewBox="([^"]*)"', drawing)
    assert box is not None
    prefix = f"p{zlib.crc32(description.encode()):08x}-"
    body = drawing[drawing.index(">", box.end()) + 1 :]
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}", body)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(description)}">{body}'


def plot_curves(metrics: pathlib.Path, out: pathlib.Path) -> None:
    """Draw metrics.jsonl into a .png file: the panels that there are values for."""
    from matplotlib.figure import Figure

    lines = without_overtaken(read_metrics(metrics))
    curves = panel_series(lines)
    drawn = [panel for panel in panels(lines) if drawable(curves, panel)] or [PANELS[0]]
    rows = math.ceil(len(drawn) / 2)
    figure = Figure(figsize=(11, 3 * rows), layout="constrained")
    places = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, panel in zip(places, drawn, strict=False):
        draw_panel(axes, curves, panel)
        axes.set_title(panel.title, fontsize=11, loc="left")
    for axes in places[len(drawn) :]:
        axes.set_axis_off()
    figure.savefig(out, dpi=110)
