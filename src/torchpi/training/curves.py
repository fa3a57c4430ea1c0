"""The curves of a run: losses, gradient norm, learning rate, speed."""

import json
import pathlib
from typing import Any

import numpy as np


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def plot_curves(metrics: pathlib.Path, out: pathlib.Path) -> None:
    """Draw metrics.jsonl into a .png file."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 2)
    for panel, keys, title in (
        (panels[0, 0], ("loss", "holdout_loss"), "flow-matching loss"),
        (panels[0, 1], ("grad_norm",), "norm of the gradient, before it is cut"),
        (panels[1, 0], ("learning_rate",), "learning rate"),
        (panels[1, 1], ("samples_per_second",), "samples per second"),
    ):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                steps, values = np.array(points).T
                dense = len(points) > 40
                panel.plot(steps, values, marker=None if dense else "o", markersize=3, linewidth=1.2, label=key)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        if len(keys) > 1 and panel.lines:
            panel.legend(["training", "held-out episodes, averaged weights"], fontsize=8)
    if panels[0, 0].lines:
        panels[0, 0].set_yscale("log")
    figure.savefig(out, dpi=110)
