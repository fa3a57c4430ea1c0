"""Generated parts of the site: references of commands and Python names, tensors and diagrams of `trace`."""

import contextlib
import functools
import io
import itertools
import os
import re
from unittest import mock

import torch

import torchpi
from torchpi.assets import assets
from torchpi.cli import COMMANDS, main
from torchpi.demo import demo_observation
from torchpi.inspect.inputs import Shapes, Source, find_inputs
from torchpi.inspect.plots import flow_diagram, mask_figure
from torchpi.inspect.summary import rows_of
from torchpi.inspect.trace import Trace, trace_forward
from torchpi.ui.palette import PALETTE

API: dict[str, tuple[str, ...]] = {
    "Policies": ("torchpi.load_policy", "torchpi.Policy", "torchpi.ActionChunk"),
    "The model": (
        "torchpi.load_model",
        "torchpi.Pi0Config",
        "torchpi.GemmaConfig",
        "torchpi.VisionConfig",
        "torchpi.Observation",
        "torchpi.Pi0",
        "torchpi.model.masks.make_attn_mask",
        "torchpi.model.flow.posemb_sincos",
        "torchpi.engine.InferenceEngine",
    ),
    "Robots": ("torchpi.Embodiment", "torchpi.robots.ActionDim", "torchpi.robots.get_embodiment"),
    "Datasets": ("torchpi.data.LeRobotDataset", "torchpi.data.LeRobotWriter", "torchpi.data.to_observation"),
    "Inspection": ("torchpi.inspect.diagnose", "torchpi.inspect.compare_policies"),
    "The client": (
        "torchpi_client.WebsocketPolicy",
        "torchpi_client.AsyncWebsocketPolicy",
        "torchpi_client.ControlLoop",
        "torchpi_client.ControlSettings",
        "torchpi_client.ActionLimits",
    ),
}
"""Public names by subject."""

MARKER = re.compile(r"^<!-- (tensors|flow|mask): (\S+) -->$", re.MULTILINE)
"""Marker in a document for a step's table, or for a diagram of a preset or policy."""


def cli_page() -> str:
    """Page with the help of every command: the description as text, usage and options as in the terminal."""
    parts = ["# Command line\n", "The output of `torchpi COMMAND --help`.\n"]
    for name in COMMANDS:
        shown = io.StringIO()
        with (
            mock.patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"),
            contextlib.redirect_stdout(shown),
            contextlib.suppress(SystemExit),
        ):
            main([*name.split(), "--help"])
        usage, rest = shown.getvalue().rstrip().split("\n\n", 1)
        text, options = re.split(r"\n\n(?= \w)", rest, maxsplit=1)
        parts.append(f"## torchpi {name}\n\n{text}\n\n```text\n{usage}\n\n{options}\n```\n")
    return "\n".join(parts)


def api_page() -> str:
    """Page with the public names and their docstrings."""
    if missing := {f"torchpi.{name}" for name in torchpi.__all__} - set(itertools.chain(*API.values())):
        raise ValueError(f"The page of the Python names lacks {sorted(missing)}; add them to API.")
    parts = ["# Python\n"]
    for title, names in API.items():
        parts += [f"## {title}\n", *(f"::: {name}\n" for name in names)]
    return "\n".join(parts)


def fill_markers(markdown: str) -> str:
    """Replace a document's markers by tables and diagrams."""
    return MARKER.sub(
        lambda found: _tensors(found[2]) if found[1] == "tensors" else _drawing(found[1], found[2]), markdown
    )


def _tensors(step: str) -> str:
    """Table of one step's tensors, with the shapes of the embedded policy and of full-size π₀.₅."""
    full = {row.name: row.shape for row in rows_of(_trace("pi05"), step)}
    lines = ["| tensor | `demo` | `pi05` | formula |", "| --- | --- | --- | --- |"]
    for row in rows_of(_trace("demo"), step):
        if row.entry.dtype != "str":
            formula = f"`{row.entry.formula}`" if row.entry.formula else ""
            lines.append(f"| {row.name} | {row.shape} | {full.get(row.name, '')} | {formula} |")
    return "\n".join(lines)


def _drawing(kind: str, target: str) -> str:
    drawn = flow_diagram(_trace(target)) if kind == "flow" else mask_figure(_trace(target))
    html = re.sub(r"\n\s*", "\n", drawn)  # indented lines would be code in Markdown
    return f'<div class="drawing {kind}-drawing"><style>{_style()}</style>{html}</div>'


@functools.cache
def _style() -> str:
    """Palette of torchpi's own pages for the site's two colour schemes, and CSS rules for diagrams."""
    colors = [
        f"[data-md-color-scheme={scheme}] .drawing{{"
        + "".join(f"--{name}:{pair[i]};" for name, pair in PALETTE.items())
        + "}"
        for i, scheme in enumerate(("default", "slate"))
    ]
    parts = r"^(?:svg text|\.flow|\.node|\.arrow|\.label|\.axis|\.grid|\.vision).*$"
    rules = re.findall(parts, (assets() / "page.css").read_text(encoding="utf-8"), re.MULTILINE)
    return "".join(colors) + ".drawing{" + "".join(rules) + "}"


@functools.cache
def _trace(target: str) -> Trace:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors; other programs may have the cores
    try:
        return trace_forward(find_inputs(target, Shapes(), Source(demo=demo_observation())))
    finally:
        torch.set_num_threads(threads)
