"""The page's drawings of values, as SVG written by hand, so that they follow the page's colours and need no script."""

import base64
import io
import itertools
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from torchpi.trace.record import Stats
from torchpi.trace.result import Modulation, Segment, Trace

NOISE_RGB, ACTION_RGB = (150, 157, 168), (224, 98, 34)  # both readable on light and dark ground
HEAT_RGB = {"scale": (47, 116, 220), "shift": (26, 150, 133), "gate": (224, 98, 34)}


def data_uri(image: np.ndarray) -> str:
    """An image, uint8 [h, w, 3 or 4], as a PNG inside the page."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- the attention mask ----

_MASK_SIZE, _MASK_MIN_SEGMENT = 520.0, 46.0


def mask_figure(trace: Trace) -> str:
    """The joint mask of the first sample, exactly, on axes that give small groups room.

    Rectangles are runs of True in runs of equal rows, coloured by the query's group.
    """
    axis = _Axis(trace.segments)
    left, top = 152, 104
    size = axis.end
    parts = [
        f'<svg viewBox="0 0 {left + size + 46:.0f} {top + size + 34:.0f}" role="img" '
        f'aria-label="attention mask of {trace.sequence_length} tokens">'
    ]
    parts.append(
        '<defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<g class="hatch"><path d="M0 0V7"/></g></pattern></defs>'
    )
    for first, end in _true_runs(~trace.mask.diagonal()):
        at, length = axis.at(first), axis.at(end) - axis.at(first)
        parts.append(
            f'<rect fill="url(#hatch)" x="{left + at:.2f}" y="{top}" width="{length:.2f}" height="{size:.1f}"/>'
            f'<rect fill="url(#hatch)" x="{left}" y="{top + at:.2f}" width="{size:.1f}" height="{length:.2f}"/>'
        )
    for query in trace.segments:
        for key in trace.segments:
            kind = "prefix" if query.group == 0 else "suffix"
            for y0, y1, x0, x1 in _runs(trace.mask[query.start : query.stop, key.start : key.stop]):
                x, y = axis.at(key.start + x0), axis.at(query.start + y0)
                width, height = axis.at(key.start + x1) - x, axis.at(query.start + y1) - y
                parts.append(
                    f'<rect class="{kind}" x="{left + x:.2f}" y="{top + y:.2f}" width="{width:.2f}" '
                    f'height="{height:.2f}" style="fill:var(--c);opacity:{0.9 if key.group else 0.62}"/>'
                )
    for segment in trace.segments:
        start, stop = axis.at(segment.start), axis.at(segment.stop)
        middle, label = (start + stop) / 2, escape(_short(segment.label))
        count = segment.stop - segment.start
        parts.append(
            f'<text class="label" x="{left - 10}" y="{top + middle - 2:.1f}" text-anchor="end">{label}</text>'
            f'<text class="axis" x="{left - 10}" y="{top + middle + 13:.1f}" text-anchor="end">{count}</text>'
            f'<g transform="translate({left + middle:.1f} {top - 10}) rotate(-35)">'
            f'<text class="label">{label} <tspan class="axis">{count}</tspan></text></g>'
            f'<path class="grid" d="M{left + start:.1f} {top}v{size:.1f}M{left} {top + start:.1f}h{size:.1f}"/>'
        )
    parts.append(f'<rect x="{left}" y="{top}" width="{size:.1f}" height="{size:.1f}" fill="none" class="grid"/>')
    caption = "columns: keys · rows: queries · coloured: may attend"
    parts.append(f'<text class="axis" x="{left}" y="{top + size + 24:.1f}">{caption}</text></svg>')
    return "".join(parts)


class _Axis:
    """Token index to position: linear inside a segment; segments as long as they have tokens, but of a least length."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        total = segments[-1].stop
        lengths = [max(_MASK_MIN_SEGMENT, _MASK_SIZE * (s.stop - s.start) / total) for s in segments]
        self._tokens = [0, *(segment.stop for segment in segments)]
        self._positions = np.concatenate([[0.0], np.cumsum(lengths)])
        self.end = float(self._positions[-1])

    def at(self, token: int) -> float:
        return float(np.interp(token, self._tokens, self._positions))


def _runs(block: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Rectangles of True: first and last row, first and last column, where equal rows follow each other."""
    found = []
    row_starts = [0, *(np.flatnonzero((block[1:] != block[:-1]).any(axis=1)) + 1), len(block)]
    for y0, y1 in itertools.pairwise(row_starts):
        found += [(int(y0), int(y1), x0, x1) for x0, x1 in _true_runs(block[y0])]
    return found


def _true_runs(row: np.ndarray) -> list[tuple[int, int]]:
    """First and last index + 1 of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _short(label: str) -> str:
    return label if len(label) <= 18 else f"{label[:17]}…"


# ---- the chunk on its way ----


def chunk_figures(chunk: np.ndarray, names: Sequence[str], *, num_executed: int | None = None) -> str:
    """One figure per action dimension: the chunk before the first and behind every Euler step, [steps + 1, H, A].

    Args:
        num_executed: so many actions are shown as those that a robot executes.
    """
    figures = []
    last_step = chunk.shape[1] - 1
    ground = "" if num_executed is None else _executed_ground(num_executed - 1, last_step)
    for dim, name in enumerate(names):
        way = chunk[:, :, dim]
        low, high = _padded_range(way)
        lines = [_polyline(state, low, high, *_along(i, len(way))) for i, state in enumerate(way)]
        zero = f'<path class="grid" d="M28 {_y(0.0, low, high):.1f}H232"/>' if low < 0 < high else ""
        axis = "".join(
            f'<text class="axis" x="24" y="{_y(value, low, high) + 4:.1f}" text-anchor="end">{value:.2g}</text>'
            for value in (float(way.min()), float(way.max()))
        )
        last = f"{way[-1].min():.2f} … {way[-1].max():.2f}"
        figures.append(
            f"<figure><figcaption>{escape(name)}<small>{last}</small></figcaption>"
            f'<svg viewBox="-6 0 242 118" role="img" aria-label="{escape(name)}">{ground}{zero}{axis}{"".join(lines)}'
            f'<text class="axis" x="28" y="116">0</text>'
            f'<text class="axis" x="232" y="116" text-anchor="end">{last_step}</text></svg></figure>'
        )
    return f'<div class="multiples">{"".join(figures)}</div>'


def _executed_ground(last: int, last_step: int) -> str:
    """Behind the actions up to `last`."""
    x = 28 + 204 * last / max(last_step, 1)
    return (
        f'<rect class="executed" x="28" y="4" width="{x - 28:.1f}" height="98"/>'
        f'<text class="axis" x="{x:.1f}" y="116" text-anchor="middle">{last}</text>'
    )


def noise_to_action_css() -> str:
    """The colours of `chunk_figures`, as a CSS gradient."""
    return f"linear-gradient(90deg, rgb{NOISE_RGB}, rgb{ACTION_RGB})"


def _along(i: int, count: int) -> tuple[str, float, float]:
    """Colour, width and opacity of state i between noise and actions."""
    part = i / max(count - 1, 1)
    rgb = [round(a + (b - a) * part) for a, b in zip(NOISE_RGB, ACTION_RGB, strict=True)]
    return f"rgb({rgb[0]},{rgb[1]},{rgb[2]})", 2.6 if i == count - 1 else 1.1, 1.0 if i in (0, count - 1) else 0.7


def _polyline(values: np.ndarray, low: float, high: float, colour: str, width: float, opacity: float) -> str:
    step = 204 / max(len(values) - 1, 1)
    points = " ".join(f"{28 + step * i:.1f},{_y(float(value), low, high):.1f}" for i, value in enumerate(values))
    style = f"fill:none;stroke:{colour};stroke-width:{width};stroke-opacity:{opacity};stroke-linejoin:round"
    return f'<polyline points="{points}" style="{style}"/>'


def _y(value: float, low: float, high: float) -> float:
    return 100 - 94 * (value - low) / (high - low)


def _padded_range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


# ---- scale, shift and gate over time ----


def heat_figure(modulation: Modulation, part: str) -> str:
    """Root mean square of one part of every norm's modulation over time: a heat map, below it a line per norm."""
    rms = modulation.rms[part]
    if part == "gate":
        rms = rms[:-1]  # the final norm's gate acts on nothing
    strongest = float(rms.max()) or 1.0
    pixels = np.zeros((*rms.shape, 4), np.uint8)
    pixels[..., :3] = HEAT_RGB[part]
    pixels[..., 3] = np.round(255 * rms / strongest)
    left, width, height, below = 44, 300, 300, 110
    bottom = 8 + height + 34 + below
    cells = (
        f'<image x="{left}" y="8" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="{data_uri(pixels)}"/>'
        f'<rect class="grid" fill="none" x="{left}" y="8" width="{width}" height="{height}"/>'
    )
    num_layers = len(modulation.norms) // 2
    row = height / len(rms)
    every = max(1, math.ceil(num_layers / 9))
    layers = "".join(
        f'<text class="axis" x="{left - 8}" y="{8 + row * (2 * i + 1) + 4:.1f}" text-anchor="end">{i}</text>'
        for i in range(0, num_layers, every)
    )
    colour = f"rgb{HEAT_RGB[part]}"
    lines = "".join(_time_line(values, strongest, left, width, bottom, below, colour, 1.0, 0.35) for values in rms)
    mean = _time_line(rms.mean(axis=0), strongest, left, width, bottom, below, colour, 3.0, 1.0)
    times = "".join(
        f'<text class="axis" x="{left + width * (1 - t):.0f}" y="{bottom + 18}" text-anchor="{anchor}">t = {t:g}</text>'
        for t, anchor in ((1.0, "start"), (0.5, "middle"), (0.0, "end"))
    )
    scale = (
        f'<path class="grid" d="M{left} {bottom}h{width}M{left} {bottom - below}h{width}"/>'
        f'<text class="axis" x="{left - 8}" y="{bottom + 4}" text-anchor="end">0</text>'
        f'<text class="axis" x="{left - 8}" y="{bottom - below + 4}" text-anchor="end">{strongest:.2g}</text>'
    )
    turned = f'transform="translate(11 {8 + height / 2}) rotate(-90)" text-anchor="middle"'
    label = f'<text class="axis" {turned}>layer</text>'
    return (
        f'<svg viewBox="0 0 {left + width + 8} {bottom + 24}" role="img" aria-label="{part} over time">'
        f"{cells}{layers}{label}{scale}{lines}{mean}{times}</svg>"
    )


def _time_line(
    values: np.ndarray,
    strongest: float,
    left: int,
    width: int,
    bottom: int,
    height: int,
    colour: str,
    stroke: float,
    opacity: float,
) -> str:
    step = width / max(len(values) - 1, 1)
    points = " ".join(
        f"{left + step * i:.1f},{bottom - height * float(value) / strongest:.1f}" for i, value in enumerate(values)
    )
    style = f"fill:none;stroke:{colour};stroke-width:{stroke};stroke-opacity:{opacity}"
    return f'<polyline points="{points}" style="{style}"/>'


# ---- ranges ----

RANGE_LIMIT = 100  # of the axis of `range_bar`


def range_bar(stats: Stats) -> str:
    """From min to max as a thin line, one deviation around the mean as a thick one; the same axis for every tensor."""
    low, high = _symlog(stats.min), _symlog(stats.max)
    inner_low, inner_high = _symlog(stats.mean - stats.std), _symlog(stats.mean + stats.std)
    return (
        '<svg viewBox="0 0 100 14" width="100" height="14" aria-hidden="true"><path class="grid" d="M50 0v14"/>'
        f'<path d="M{low:.1f} 7H{max(high, low + 1):.1f}" style="stroke:var(--c);stroke-width:2;opacity:.45"/>'
        f'<path d="M{inner_low:.1f} 7H{max(inner_high, inner_low + 1.5):.1f}" style="stroke:var(--c);stroke-width:7"/>'
        "</svg>"
    )


def _symlog(value: float) -> float:
    """Position on an axis of 100, linear around 0 and logarithmic outside, up to ±RANGE_LIMIT."""
    clipped = max(-RANGE_LIMIT, min(RANGE_LIMIT, value))
    return 50 + math.copysign(48 * math.log1p(10 * abs(clipped)) / math.log1p(10 * RANGE_LIMIT), clipped)
