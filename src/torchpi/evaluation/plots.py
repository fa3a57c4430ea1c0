"""Pictures of an evaluation: errors over the horizon, and predicted beside recorded chunks."""

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from torchpi.evaluation.chunks import Chunks
from torchpi.evaluation.errors import HOLD, MEAN_ACTION, POLICY, ChunkErrors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ORANGE, _EXECUTED = "#d9581c", "#eef1f5"
_RECORDED: dict[str, Any] = {"color": "#202020", "linewidth": 3.2}
_PREDICTED: dict[str, Any] = {"color": _ORANGE, "linewidth": 0.9, "alpha": 0.75, "zorder": 3}  # above the recorded line
_LINES: dict[str, dict[str, Any]] = {
    POLICY: {"label": "policy", "color": _ORANGE, "linewidth": 2.0, "zorder": 3},
    HOLD: {"label": "hold: the robot stays where it is", "color": "#2f6fd0", "linewidth": 1.4, "linestyle": "--"},
    MEAN_ACTION: {"label": "mean action of the data set", "color": "#7a8290", "linewidth": 1.4, "linestyle": ":"},
}


def plot_errors(errors: ChunkErrors) -> "Figure":
    """Mean absolute error over the steps of the horizon, of the policy and the baselines.

    The first panel is the mean over the dimensions, in parts of their range; then one panel per dimension, in its unit.
    A baseline is in the first panel only where it covers all of the policy's dimensions there.
    """
    from matplotlib.figure import Figure

    num_panels = 1 + len(errors.dimensions)
    columns = _columns(num_panels)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(3.1 * columns, 2.1 * rows + 1.0), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    steps = np.arange(len(errors.counts))
    for of, style in _LINES.items():
        if errors.overall(of).dimensions == errors.overall().dimensions:
            _line(panels[0], steps, errors.scaled_per_step(of), style)
        for i in range(len(errors.dimensions)):
            _line(panels[1 + i], steps, errors.per_step[of].mae[:, i], style)
    _title(panels[0], "all dimensions", "parts of the range, 1 % to 99 %", bold=True)
    for i, dimension in enumerate(errors.dimensions):
        _title(panels[1 + i], dimension.name, dimension.unit)
    for i, panel in enumerate(panels):
        panel.set_ylim(bottom=0)
        _tidy(panel)
        if i >= num_panels:
            panel.set_visible(False)
        elif i + columns >= num_panels:  # nothing below it
            panel.set_xlabel("step of the chunk", fontsize=8)
            panel.tick_params(labelbottom=True)
    figure.suptitle("Mean absolute error over the horizon", fontsize=12)
    handles = [_handle(style) for style in _LINES.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, columns), fontsize=9, frameon=False)
    return figure


def plot_chunks(chunks: Chunks, *, max_frames: int = 4) -> "Figure":
    """Predicted beside recorded chunks: a column per frame, a row per dimension, in the robot's units.

    Each draw is a thin line. The recorded line ends where the episode does. The ground is grey as far as the embodiment
    recommends to execute a chunk.

    Args:
        max_frames: of more frames so many are shown, evenly spaced.
    """
    from matplotlib.figure import Figure

    shown = evenly_spaced(len(chunks.frames), max_frames)
    actions, num_frames = chunks.embodiment.actions, len(shown)
    _, draws, horizon, _ = chunks.predicted.shape
    row_height = 1.25 if len(actions) <= 16 else 1.0
    figure = Figure(figsize=(2.0 + 2.9 * num_frames, row_height * len(actions) + 1.6), layout="constrained")
    panels = figure.subplots(len(actions), num_frames, squeeze=False, sharex=True, sharey="row")
    recorded = np.where(chunks.is_pad[..., None], np.nan, chunks.recorded)  # [F, H, a]
    executed = chunks.embodiment.execute_steps
    steps = np.arange(horizon)
    for i, action in enumerate(actions):
        for column, number in enumerate(shown):
            panel, frame = panels[i, column], chunks.frames[number]
            if executed is not None:
                panel.axvspan(0, min(executed, horizon) - 1, color=_EXECUTED, zorder=0)
            _line(panel, steps, recorded[number, :, i], _RECORDED)
            panel.plot(steps, chunks.predicted[number, :, :, i].T, **_PREDICTED)
            _tidy(panel)
            if i == 0:
                place = f"episode {frame.episode}, frame {frame.number}"
                _title(panel, place, textwrap.shorten(frame.task, 44, placeholder=" …"))
        label = "\n".join([*textwrap.wrap(action.name, 30), *textwrap.wrap(action.unit, 24)])
        panels[i, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("step of the chunk", fontsize=8)
    handles = [
        _handle({"label": "recorded", **_RECORDED}),
        _handle({"label": f"predicted, {draws} draw{'s' if draws > 1 else ''} of noise", **_PREDICTED}),
    ]
    if executed is not None:
        handles.append(_handle({"label": "executed before the next chunk", "color": _EXECUTED, "linewidth": 8}))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def evenly_spaced(total: int, count: int) -> list[int]:
    """Of `total` things the numbers of at most `count`, each from the middle of one of as many equal parts."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _columns(num_panels: int) -> int:
    """The number of columns that leaves the fewest places empty, the larger one of equals."""
    return max((3, 4) if num_panels <= 12 else (4, 5, 6), key=lambda columns: (-(-num_panels % columns), columns))


def _line(panel: Any, steps: np.ndarray, values: np.ndarray, style: dict[str, Any]) -> None:
    """A line; a marker as well where a single value would not show."""
    panel.plot(steps, values, marker="o" if np.isfinite(values).sum() == 1 else None, markersize=4, **style)


def _handle(style: dict[str, Any]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def _title(panel: Any, name: str, below: str, *, bold: bool = False) -> None:
    """A name, and a smaller line below it."""
    panel.set_title(name, fontsize=9, pad=15 if below else 5, fontweight="bold" if bold else "normal")
    panel.text(
        0.5, 1.03, textwrap.shorten(below, 44, placeholder=" …"), transform=panel.transAxes, ha="center", va="bottom",
        fontsize=7, color="#5a6270",
    )  # fmt: skip


def _tidy(panel: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.grid(alpha=0.25, linewidth=0.6)
    panel.tick_params(labelsize=7, length=2)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(4))
    panel.spines[["top", "right"]].set_visible(False)
