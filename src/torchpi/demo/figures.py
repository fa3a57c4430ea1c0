"""The demo page's own drawings, as SVG written by hand."""

import math
from collections.abc import Mapping, Sequence
from html import escape

_KINDS = ("plain", "suffix", "prefix")  # colours of the curves, in their order


def loss_figure(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Curves over a training run's steps, with a logarithmic axis of values.

    Args:
        curves: by name, steps and positive values.
    """
    steps = [step for points in curves.values() for step, _ in points]
    logs = [math.log(value) for points in curves.values() for _, value in points]
    end, low, span = max(*steps, 1), min(logs), max(max(logs) - min(logs), 1e-6)
    left, top, width, height = 46, 10, 520, 170

    def place(step: int, value: float) -> str:
        return f"{left + width * step / end:.1f},{top + height * (1 - (math.log(value) - low) / span):.1f}"

    lines, legend = [], []
    for i, (kind, (name, points)) in enumerate(zip(_KINDS, curves.items(), strict=False)):
        path = " ".join(place(step, value) for step, value in points)
        lines.append(f'<polyline class="{kind}" points="{path}" style="fill:none;stroke:var(--c);stroke-width:2"/>')
        legend.append(
            f'<text class="label strong {kind}" x="{left + width}" y="{top + 14 + 18 * i}" text-anchor="end">'
            f"{escape(name)}: {points[-1][1]:.3g} at the end</text>"
        )
    axis = "".join(
        f'<text class="axis" x="{left - 8}" y="{y + 4}" text-anchor="end">{math.exp(value):.2g}</text>'
        f'<path class="grid" d="M{left} {y}h{width}"/>'
        for y, value in ((top, low + span), (top + height, low))
    )
    return (
        f'<svg viewBox="0 0 {left + width + 8} {top + height + 26}" role="img" aria-label="training curves">{axis}'
        f'{"".join(lines)}{"".join(legend)}<text class="axis" x="{left}" y="{top + height + 18}">step 0</text>'
        f'<text class="axis" x="{left + width}" y="{top + height + 18}" text-anchor="end">{end}</text></svg>'
    )
