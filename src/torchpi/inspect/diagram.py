"""Diagram of the forward pass as SVG, in two layouts: wide, and tall for narrow screens."""

import dataclasses
import re
from html import escape

from torchpi.inspect.trace import Trace
from torchpi.ui.format import format_shape


@dataclasses.dataclass(frozen=True)
class Node:
    """A box with a title, a line below it, and the shape of its output (or one more line)."""

    kind: str
    """A name of the palette."""
    title: str
    line: str
    shape: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Positions of everything."""

    css_class: str
    size: tuple[int, int]
    boxes: dict[str, tuple[int, int, int, int]]
    """Per node: x, y, width, height."""
    arrows: tuple[tuple[str, str], ...]
    """Kind and path of each."""
    pi05_arrows: tuple[tuple[str, str], ...]
    """From the time to the expert's norms."""
    pi0_arrows: tuple[tuple[str, str], ...]
    """From time and state to the suffix's tokens."""
    labels: tuple[tuple[str, int, int, str, str], ...]
    """Class, x, y, anchor and text of each; "{steps}": the number of Euler steps."""


_WIDE = Layout(
    "wide",
    (1170, 520),
    {
        "images": (0, 10, 190, 84),
        "prompt": (0, 118, 190, 84),
        "siglip": (236, 10, 190, 84),
        "embedder": (236, 118, 190, 84),
        "prefix": (474, 64, 190, 84),
        "backbone": (714, 54, 220, 104),
        "cache": (714, 204, 220, 78),
        "expert": (714, 328, 220, 104),
        "x_t": (0, 292, 190, 84),
        "time": (0, 410, 190, 74),
        "embed": (236, 292, 190, 84),
        "time_mlp": (236, 410, 190, 74),
        "suffix": (474, 292, 190, 84),
        "state": (474, 190, 190, 74),
        "v_t": (978, 338, 162, 84),
        "actions": (978, 204, 162, 78),
        "target": (978, 10, 162, 64),
        "loss": (978, 102, 162, 64),
    },
    (
        ("vision", "M190 52 H228"),
        ("vision", "M190 160 H228"),
        ("prefix", "M426 52 H450 V92 H466"),
        ("prefix", "M426 160 H450 V120 H466"),
        ("prefix", "M664 106 H706"),
        ("cache", "M824 158 V196"),
        ("cache", "M824 282 V320"),
        ("suffix", "M190 334 H228"),
        ("time", "M190 447 H228"),
        ("suffix", "M426 334 H466"),
        ("suffix", "M664 334 H690 V362 H706"),
        ("suffix", "M934 380 H970"),
        ("suffix", "M1059 422 V508 H-16 V334 H-8"),
        ("suffix", "M1059 338 V290"),
        ("noise", "M1059 74 V94"),
        ("noise", "M1140 380 H1162 V134 H1148"),
    ),
    (("time", "M426 447 H824 V440"),),
    (("time", "M426 447 H569 V384"), ("vision", "M569 264 V284")),
    (
        ("label strong suffix", 620, 500, "middle", "{steps} Euler steps   x ← x + dt · v_t"),
        ("label", 1069, 318, "start", "at t = 0"),
        ("label", 1067, 92, "start", "training"),
        ("label", 836, 184, "start", "once"),
        ("label", 836, 308, "start", "in every step"),
    ),
)

_TALL = Layout(
    "tall",
    (380, 1120),
    {
        "images": (10, 8, 170, 78),
        "prompt": (200, 8, 170, 78),
        "siglip": (10, 116, 170, 78),
        "embedder": (200, 116, 170, 78),
        "prefix": (70, 232, 240, 78),
        "backbone": (70, 340, 240, 92),
        "cache": (70, 466, 240, 72),
        "x_t": (30, 578, 165, 78),
        "time": (210, 578, 165, 78),
        "suffix": (30, 686, 165, 78),
        "time_mlp": (210, 686, 165, 78),
        "expert": (70, 804, 240, 92),
        "v_t": (30, 932, 165, 72),
        "actions": (225, 932, 150, 72),
        "target": (30, 1044, 165, 72),
        "loss": (225, 1044, 150, 72),
    },
    (
        ("vision", "M95 86 V108"),
        ("vision", "M285 86 V108"),
        ("prefix", "M95 194 V214 H150 V224"),
        ("prefix", "M285 194 V214 H230 V224"),
        ("prefix", "M190 310 V332"),
        ("cache", "M190 432 V458"),
        ("cache", "M202 538 V796"),
        ("suffix", "M112 656 V678"),
        ("time", "M292 656 V678"),
        ("suffix", "M112 764 V796"),
        ("suffix", "M112 896 V924"),
        ("suffix", "M195 968 H217"),
        ("suffix", "M30 968 H10 V617 H22"),
        ("noise", "M195 1080 H217"),
        ("noise", "M112 1004 V1024 H300 V1036"),
    ),
    (("time", "M272 764 V796"),),
    (("time", "M210 725 H203"),),
    (
        ("label strong suffix", 40, 570, "start", "×{steps}"),
        ("label", 200, 450, "start", "once"),
        ("label", 310, 1026, "start", "training"),
    ),
)


def flow_diagram(trace: Trace) -> str:
    """Both layouts as SVG; the page shows the one that fits."""
    nodes = _nodes(trace)
    return "".join(_draw(layout, nodes, trace) for layout in (_WIDE, _TALL))


def _nodes(trace: Trace) -> dict[str, Node]:
    pi05, layers = trace.inputs.config.pi05, trace.count("layers")
    cameras = len(trace.inputs.cameras)
    shapes = {(entry.step, entry.name): format_shape(entry.shape) for entry in trace.entries}
    camera = trace.inputs.cameras[0]
    state = {} if pi05 else {"state": Node("vision", "state", "one token", shapes["5", "state_proj"])}
    expert = f"{trace.count('time_inputs')} norms modulated by t" if pi05 else "attends to prefix and suffix"
    return state | {
        "images": Node("vision", "images", f"{cameras} × uint8", shapes["0", f"image/{camera}"]),
        "prompt": Node("vision", "prompt", "text with state" if pi05 else "text", shapes["0", "tokenized_prompt"]),
        "siglip": Node("vision", "SigLIP", f"each of {cameras} cameras", shapes["2", f"image_tokens/{camera}"]),
        "embedder": Node("vision", "embedder", "× √D", shapes["3", "text_tokens"]),
        "prefix": Node("prefix", "prefix", "images, then text", shapes["4", "prefix_tokens"]),
        "backbone": Node("prefix", "backbone", f"Gemma, {layers} layers", "reads images and prompt"),
        "cache": Node("cache", "KV cache", f"{layers} × (k, v)", shapes["8", "cache/layer_0/k"]),
        "x_t": Node("noise", "noisy actions x_t", "noise at t = 1", shapes["5", "x_t"]),
        "time": Node("time", "time t", "as sines and cosines", shapes["5", "posemb_sincos"]),
        "embed": Node("suffix", "action_in_proj", "one token per action", shapes["5", "action_in_proj"]),
        "time_mlp": Node(
            "time",
            "adarms_cond" if pi05 else "time, repeated",
            "MLP of the time" if pi05 else "mixed into every action",
            shapes["5", "adarms_cond" if pi05 else "action_and_time"],
        ),
        "suffix": Node("suffix", "suffix", "actions" if pi05 else "state, then actions", shapes["5", "suffix_tokens"]),
        "expert": Node("suffix", "action expert", f"Gemma, {layers} layers", expert),
        "v_t": Node("suffix", "velocity v_t", "action_out_proj", shapes["10", "v_t"]),
        "actions": Node("suffix", "action chunk", "x_t at t = 0", shapes["inference", "action_chunk"]),
        "target": Node("noise", "target u_t", "noise − actions"),
        "loss": Node("noise", "loss", "mean((v_t − u_t)²)", shapes["11", "loss"]),
    }


def _draw(layout: Layout, nodes: dict[str, Node], trace: Trace) -> str:
    width, height = layout.size
    arrows = layout.arrows + (layout.pi05_arrows if trace.inputs.config.pi05 else layout.pi0_arrows)
    title = f"{trace.inputs.config.variant}: from an observation to an action chunk"
    parts = [
        f'<svg class="flow {layout.css_class}" viewBox="-22 0 {width + 26} {height + 4}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    parts += [_arrow(kind, path) for kind, path in arrows]
    parts += [_box(nodes[name], *box) for name, box in layout.boxes.items() if name in nodes]
    for css, x, y, anchor, label in layout.labels:
        text = escape(label.format(steps=trace.count("euler_steps")))
        parts.append(f'<text class="{css}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>')
    return "".join([*parts, "</svg>"])


def _box(node: Node, x: int, y: int, width: int, height: int) -> str:
    lines = [("title", node.title), ("small", node.line), ("shape", node.shape)]
    lines = [(css, text) for css, text in lines if text]
    first = y + height / 2 - 10 * (len(lines) - 1) + 5
    texts = "".join(
        f'<text class="{css}" x="{x + width / 2}" y="{first + 20 * i:.0f}" text-anchor="middle">{escape(text)}</text>'
        for i, (css, text) in enumerate(lines)
    )
    box = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="12"'
    return f'<g class="node {node.kind}"><rect {box}/><rect class="wash" {box}/>{texts}</g>'


def _arrow(kind: str, path: str) -> str:
    """A path of the SVG commands M, H and V; its head is drawn over the 7 units that follow its end."""
    (x, y), commands = (0.0, 0.0), re.findall(r"([MHV])([-\d. ]+)", path)
    for command, numbers in commands:
        start, values = (x, y), [float(number) for number in numbers.split()]
        x, y = values if command == "M" else (values[0], y) if command == "H" else (x, values[0])
    dx, dy = (x > start[0]) - (x < start[0]), (y > start[1]) - (y < start[1])
    tip = f"{x + 7 * dx:g},{y + 7 * dy:g} {x - 4.5 * dy:g},{y + 4.5 * dx:g} {x + 4.5 * dy:g},{y - 4.5 * dx:g}"
    return f'<g class="{kind}"><path class="arrow" d="{path}"/><polygon class="arrowhead" points="{tip}"/></g>'
