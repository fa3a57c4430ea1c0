"""Figures of a trace: data flow diagram, attention mask, modulation over time, value ranges."""

import math
from typing import TYPE_CHECKING

import numpy as np

from torchpi.assets import assets
from torchpi.inspect.trace import Stats, Trace
from torchpi.ui.format import format_shape
from torchpi.ui.page import fill_lines
from torchpi.ui.palette import COLORS
from torchpi.ui.plots import draw_figure, to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MASK_PIXELS, _MIN_SEGMENT = 520, 46
_PART_COLORS = {"scale": "prefix", "shift": "vision", "gate": "suffix"}


def flow_diagram(trace: Trace) -> str:
    """SVG of the forward pass in two layouts, wide and tall; the page shows the one that fits.

    The templates are assets/flow_wide.svg and flow_tall.svg, where `{name}` is replaced by a tensor's shape or a count
    of the trace.
    """
    config, cameras = trace.inputs.config, trace.inputs.cameras
    values = {"variant": config.variant, "num_cameras": str(len(cameras))}
    for entry in trace.entries:
        name = "/".join("camera" if part in cameras else part for part in entry.name.split("/"))
        # Keep the first entry of a name; later ones are from inference, with one sample.
        values.setdefault(name, format_shape(entry.shape) if entry.value is None else str(entry.value))
    drawings = ((assets() / f"flow_{layout}.svg").read_text(encoding="utf-8") for layout in ("wide", "tall"))
    return "".join(fill_lines(drawing, values, {"pi05" if config.pi05 else "pi0"}) for drawing in drawings)


def mask_figure(trace: Trace) -> str:
    """SVG of the joint attention mask of the first sample; short segments are enlarged."""
    figure = draw_figure(lambda figure: _draw_mask(figure, trace), size=(7.2, 7.2))
    description = f"{trace.inputs.title}: attention mask of {trace.sequence_length} tokens. x: keys. y: queries."
    return to_svg(figure, description)


def _draw_mask(figure: "Figure", trace: Trace) -> None:
    boundaries = np.array([0, *(segment.stop for segment in trace.segments)])  # in tokens
    counts = np.diff(boundaries)
    lengths = np.maximum(_MIN_SEGMENT, _MASK_PIXELS * counts / boundaries[-1]).round().astype(int)
    edges = np.concatenate([[0], np.cumsum(lengths)])  # in pixels
    token = (
        np.interp(np.arange(edges[-1]) + 0.5, edges, boundaries).astype(int).clip(max=boundaries[-1] - 1)
    )  # by pixel
    suffix = (token >= trace.prefix_tokens)[:, None]
    image = np.where(suffix[..., None], _rgb("suffix"), _rgb("prefix")) * np.ones((1, len(token), 1))
    alpha = np.where(trace.mask[np.ix_(token, token)], 0.75, 0.0)
    padding = ~trace.mask.diagonal()[token]
    is_padding = padding[:, None] | padding[None, :]
    alpha[is_padding], image[is_padding] = 0.12, _rgb("faint")
    axes = figure.subplots()
    axes.imshow(np.dstack([image, alpha]), interpolation="nearest")
    middles = (edges[1:] + edges[:-1]) / 2
    labels = [s.label if len(s.label) <= 18 else f"{s.label[:17]}…" for s in trace.segments]
    axes.set_yticks(middles, [f"{label}\n{count}" for label, count in zip(labels, counts, strict=True)])
    x_labels = [f"{label} {count}" for label, count in zip(labels, counts, strict=True)]
    axes.set_xticks(middles, x_labels, rotation=35, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.grid(visible=False)
    for edge in edges:
        axes.axhline(edge - 0.5, color=COLORS["line"], linewidth=0.8)
        axes.axvline(edge - 0.5, color=COLORS["line"], linewidth=0.8)
    axes.set_xlabel("columns: keys · rows: queries · colored: attention allowed")


def _rgb(name: str) -> np.ndarray:
    return np.array([int(COLORS[name][i : i + 2], 16) / 255 for i in (1, 3, 5)])


def modulation_figure(rms: np.ndarray, part: str) -> str:
    """SVG of the root mean square [norms, times] of scale, shift or gate: heat map above, a line per norm below."""
    figure = draw_figure(lambda figure: _draw_modulation(figure, rms, part), size=(3.6, 5.2))
    return to_svg(figure, f"{part} over time. x: time from 1 to 0. y: layer above, root mean square below.")


def _draw_modulation(figure: "Figure", rms: np.ndarray, part: str) -> None:
    heat, lines = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    largest = float(rms.max()) or 1.0
    color = _rgb(_PART_COLORS[part])
    image = np.dstack([np.broadcast_to(color, (*rms.shape, 3)), rms / largest])
    heat.imshow(image, aspect="auto", interpolation="nearest", extent=(1, 0, len(rms) / 2, 0))
    layers = np.arange(len(rms) // 2)[:: max(1, math.ceil(len(rms) // 2 / 9))]
    heat.set_yticks(layers + 0.5, [str(layer) for layer in layers])
    heat.set_ylabel("layer")
    heat.grid(visible=False)
    times = np.linspace(1, 0, rms.shape[1])
    lines.plot(times, rms.T, color=tuple(color), linewidth=0.7, alpha=0.35)
    lines.plot(times, rms.mean(axis=0), color=tuple(color), linewidth=2.4)
    lines.set(xlim=(1, 0), ylim=(0, 1.05 * largest), xticks=[1, 0.5, 0], xlabel="time t", ylabel="rms")


RANGE_LIMIT = 100
"""The axis of `range_bar` ranges from -RANGE_LIMIT to RANGE_LIMIT."""


def range_bar(stats: Stats) -> str:
    """SVG of a value range: thin line from min to max, thick line mean ± std. All tensors share one axis."""
    low, high = _symlog(stats.min), _symlog(stats.max)
    inner_low, inner_high = _symlog(stats.mean - stats.std), _symlog(stats.mean + stats.std)
    return (
        '<svg viewBox="0 0 100 14" width="100" height="14" aria-hidden="true"><path class="grid" d="M50 0v14"/>'
        f'<path d="M{low:.1f} 7H{max(high, low + 1):.1f}" style="stroke:var(--c);stroke-width:2;opacity:.45"/>'
        f'<path d="M{inner_low:.1f} 7H{max(inner_high, inner_low + 1.5):.1f}" style="stroke:var(--c);stroke-width:7"/>'
        "</svg>"
    )


def _symlog(value: float) -> float:
    """Position from 0 to 100 on an axis that is linear near 0 and logarithmic farther out."""
    clipped = max(-RANGE_LIMIT, min(RANGE_LIMIT, value))
    return 50 + math.copysign(48 * math.log1p(10 * abs(clipped)) / math.log1p(10 * RANGE_LIMIT), clipped)
