"""Diagram of the forward pass as SVG, in two layouts: wide, and tall for narrow screens.

The drawings are flow_wide.svg and flow_tall.svg of the assets. In them, `{name}` stands for a tensor's shape or a count
of the trace, and a line with data-variant is drawn for that variant only.
"""

from torchpi.assets import assets
from torchpi.inspect.trace import Trace
from torchpi.ui.format import format_shape


def flow_diagram(trace: Trace) -> str:
    """Both layouts as SVG; the page shows the one that fits."""
    config, cameras = trace.inputs.config, trace.inputs.cameras
    values = {"variant": config.variant, "num_cameras": str(len(cameras))}
    for entry in trace.entries:
        name = "/".join("camera" if part in cameras else part for part in entry.name.split("/"))
        # The first of a name: further ones are inference's, of one sample.
        values.setdefault(name, format_shape(entry.shape) if entry.value is None else str(entry.value))
    other = 'data-variant="pi0"' if config.pi05 else 'data-variant="pi05"'
    drawings = ((assets() / f"flow_{layout}.svg").read_text(encoding="utf-8") for layout in ("wide", "tall"))
    lines = (line for drawing in drawings for line in drawing.splitlines() if other not in line)
    return "".join(lines).format_map(values)
