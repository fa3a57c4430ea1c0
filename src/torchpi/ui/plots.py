"""Plots in one style, saved as PNG or embedded in a page as SVG."""

import base64
import io
import math
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from torchpi.atomic import atomic_file
from torchpi.ui.page import figure as page_figure
from torchpi.ui.palette import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "none",
    "axes.labelcolor": COLORS["soft"],
    "axes.labelsize": 9,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "font.size": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": COLORS["soft"],
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",  # text stays text
    "text.color": COLORS["ink"],
}
_NOISE_RGB, _ACTIONS_RGB = (150, 157, 168), (224, 98, 34)  # readable on light and dark backgrounds


# ---- drawing ----


def draw_figure(draw: Callable[["Figure"], Any], *, size: tuple[float | int, float | int]) -> "Figure":
    """Draw a figure in the common style.

    Args:
        draw: draws into the figure.
        size: width and height in inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
    return figure


def panel_grid(figure: "Figure", count: int, columns: int) -> list["Axes"]:
    """Axes in rows that fill the figure; a shorter last row has wider axes."""
    rows = [range(i, min(i + columns, count)) for i in range(0, count, columns)]
    width = math.lcm(*map(len, rows))
    return list(figure.subplot_mosaic([np.repeat(row, width // len(row)).tolist() for row in rows]).values())


def label_axes(axes: "Axes", *, x: str, y: str = "", title: str = "") -> None:
    """Label the axes and draw a grid; x ticks are whole numbers, such as `20k`."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(color=COLORS["line"], linewidth=0.8)
    axes.tick_params(which="both", length=0, labelsize=8.5, labelcolor=COLORS["soft"])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def scale_values(
    axes: "Axes", values: Float[np.ndarray, " n"], *, percent: bool = False, from_zero: bool = False
) -> None:
    """Format y ticks without exponents; the axis is logarithmic if positive values span more than a factor of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if from_zero:
        axes.set_ylim(bottom=0)
    elif len(values) and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 200 * values.min() else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}" if percent else f"{value:.10g}"))


def marker(count: int, limit: int = 40) -> str | None:
    """Marker of a line with `count` points; none if there are more than `limit`."""
    return "o" if count <= limit else None


# ---- saving ----


def save_figure(figure: "Figure", path: pathlib.Path, *, dpi: int = 110) -> None:
    """Save a figure as PNG."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def to_svg(figure: "Figure", description: str) -> str:
    """SVG element that takes the colors and the font of the page.

    Args:
        description: alternative text: axes and content. It must be unique on the page.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE | {"svg.hashsalt": description}):  # the same IDs in every run
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    view_box = re.search(r'viewBox="([^"]*)"', svg)
    assert view_box is not None
    prefix = f"p{zlib.crc32(description.encode()):08x}-"  # IDs must differ from those of the page's other figures
    body = svg[svg.index(">", view_box.end()) + 1 :]
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}", body)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", body)
    for name, color in COLORS.items():
        body = body.replace(color, f"var(--{name})")
    return f'<svg viewBox="{view_box[1]}" role="img" aria-label="{escape(description)}">{body}'


def data_uri(image: np.ndarray) -> str:
    """Data URL with the PNG of an image, uint8 [h, w, 3 or 4]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- denoising ----


def denoising_figures(chunks: np.ndarray, names: Sequence[str], *, executed: int | None = None) -> str:
    """HTML with a plot per action dimension of the chunk while denoising.

    Args:
        chunks: [steps + 1, H, A], before the first Euler step and after each.
        executed: number of actions that the robot executes, drawn on colored background.
    """
    ramp = f"linear-gradient(90deg, rgb{_NOISE_RGB}, rgb{_ACTIONS_RGB})"
    figures = []
    for i, name in enumerate(names):
        final = chunks[-1, :, i]
        figure = draw_figure(partial(_draw_denoising, chunks=chunks[:, :, i], executed=executed), size=(2.8, 1.45))
        description = f"{name} while denoising. x: action of the chunk. y: value. One curve per Euler step."
        note = f"{final.min():.2f} … {final.max():.2f}"
        figures.append(page_figure(name, note, to_svg(figure, description)))
    return (
        f'<p class="ramp">noise, t = 1 <i style="background:{ramp}"></i> actions, t = 0</p>'
        f'<div class="multiples">{"".join(figures)}</div>'
    )


def _draw_denoising(figure: "Figure", chunks: np.ndarray, executed: int | None) -> None:
    axes, last = figure.subplots(), len(chunks) - 1
    for i, chunk in enumerate(chunks):
        fraction = i / max(last, 1)
        rgb = [(a + (b - a) * fraction) / 255 for a, b in zip(_NOISE_RGB, _ACTIONS_RGB, strict=True)]
        axes.plot(chunk, color=rgb, linewidth=2 if i == last else 0.9, alpha=1 if i in (0, last) else 0.7)
    if executed is not None:
        axes.axvspan(0, min(executed, chunks.shape[1]) - 1, color=COLORS["suffix"], alpha=0.1, linewidth=0)
    label_axes(axes, x="")
    axes.set_xlim(0, max(chunks.shape[1] - 1, 1))
    low, high = float(chunks.min()), float(chunks.max())
    axes.set_yticks([low, high] if math.isfinite(high - low) else [], [f"{low:.2g}", f"{high:.2g}"])
