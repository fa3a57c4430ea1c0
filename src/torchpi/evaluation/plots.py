"""Plots of an evaluation: errors over the horizon, and predicted and recorded chunks."""

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from torchpi.evaluation.chunks import Chunks
from torchpi.evaluation.errors import HOLD, MEAN_ACTION, POLICY, ChunkErrors
from torchpi.ui.palette import COLORS
from torchpi.ui.plots import draw_figure, label_axes, marker, panel_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES: dict[str, dict[str, Any]] = {
    POLICY: {"label": "policy", "color": COLORS["suffix"], "linewidth": 2.0, "zorder": 3},
    HOLD: {"label": "hold: the robot stays where it is", "color": COLORS["prefix"], "linestyle": "--"},
    MEAN_ACTION: {"label": "mean action of the dataset", "color": COLORS["noise"], "linestyle": ":"},
}


def plot_errors(errors: ChunkErrors) -> "Figure":
    """Plot the mean absolute error over the steps of the horizon, of the policy and the baselines.

    The first panel is the mean over the dimensions as a fraction of their ranges, without baselines that are undefined
    in any of the policy's dimensions. The other panels are one dimension each, in its unit.
    """
    count = 1 + len(errors.dimensions)
    columns = min(count, min((4, 5, 6), key=lambda columns: -count % columns))

    def draw(figure: "Figure") -> None:
        overall, *panels = panel_grid(figure, count, columns)
        steps = np.arange(len(errors.counts))
        for of, style in _LINES.items():
            curves = dict(zip(panels, errors.per_step[of].mae.T, strict=True))
            if errors.overall(of).dimensions == errors.overall().dimensions:
                curves[overall] = errors.scaled_per_step(of)
            for panel, values in curves.items():
                # A single value would not show as a line.
                panel.plot(steps, values, marker=marker(int(np.isfinite(values).sum()), limit=1), **style)
        label_axes(overall, x="step of the chunk", y="fraction of the action range", title="all dimensions")
        for panel, dimension in zip(panels, errors.dimensions, strict=True):
            title, unit = (textwrap.shorten(text, 40, placeholder=" …") for text in (dimension.name, dimension.unit))
            label_axes(panel, x="step of the chunk", y=unit, title=title)
        for panel in (overall, *panels):
            panel.set_ylim(bottom=0)
        figure.suptitle("Mean absolute error over the horizon")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3 if columns > 2 else 1)

    return draw_figure(draw, size=(3.2 * columns, 2.2 * -(-count // columns) + 1.0))


def plot_chunks(chunks: Chunks) -> "Figure":
    """Plot predicted and recorded chunks: a column for each of at most four frames, a row per dimension in its unit.

    Each noise sample is a thin line. The recorded line ends with the episode. The background is grey over the actions
    that the embodiment recommends to execute.
    """
    shown, actions = plotted_frames(len(chunks.frames)), chunks.embodiment.actions

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(len(actions), len(shown), squeeze=False, sharex=True, sharey="row")
        for column, number in enumerate(shown):
            for i in range(len(actions)):
                _draw_chunk(panels[i, column], chunks, number, i)
            frame = chunks.frames[number]
            task = textwrap.shorten(frame.task, 40, placeholder=" …")
            panels[0, column].set_title(f"episode {frame.episode}, frame {frame.number}\n{task}")
            panels[-1, column].set_xlabel("step of the chunk")
        for row, action in zip(panels, actions, strict=True):
            label = "\n".join([*textwrap.wrap(action.name, 30), *textwrap.wrap(action.unit, 24)])
            row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))

    row_height = 1.25 if len(actions) <= 16 else 1.0
    return draw_figure(draw, size=(2.0 + 2.9 * len(shown), row_height * len(actions) + 1.6))


def _draw_chunk(panel: Any, chunks: Chunks, number: int, i: int) -> None:
    """Draw dimension i of the chunks at one frame."""
    noise_samples, horizon = chunks.predicted.shape[1:3]
    steps = np.arange(horizon)
    recorded = np.where(chunks.is_pad[number], np.nan, chunks.recorded[number, :, i])
    dot = marker(int(np.isfinite(recorded).sum()), limit=1)
    panel.plot(steps, recorded, color=COLORS["ink"], linewidth=3, marker=dot, label="recorded")
    predicted = panel.plot(
        steps, chunks.predicted[number, :, :, i].T, color=COLORS["suffix"], linewidth=0.9, alpha=0.75, zorder=3
    )
    predicted[0].set_label(f"predicted, {noise_samples} noise sample{'s' if noise_samples > 1 else ''}")
    if (executed := chunks.embodiment.execute_steps) is not None:
        panel.axvspan(
            0, min(executed, horizon) - 1, color=COLORS["line"], alpha=0.5, linewidth=0, zorder=0,
            label="executed before the next chunk",
        )  # fmt: skip
    label_axes(panel, x="")


def plotted_frames(total: int) -> list[int]:
    """Indices of at most four of `total` frames, the middles of equal parts."""
    count = min(4, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
