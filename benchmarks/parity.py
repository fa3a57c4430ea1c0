"""Largest differences of torchpi, openpi's PyTorch port and LeRobot from the original in JAX, on the golden models.

    python benchmarks/parity.py [docs/parity.png]

torchpi runs here in float32 on the CPU; the others' results for the same inputs, noise and weights are recorded in
tests/golden. Prints a Markdown table, and writes a plot if a file is given.
"""

import pathlib
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import torchpi
from torchpi.ui.palette import COLORS
from torchpi.ui.plots import draw_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
KINDS = {"pi05": "π₀.₅", "pi0": "π₀"}
STAGES = {"loss": "loss", "sample_actions_4": "actions, 4 steps", "sample_actions_10": "actions, 10 steps"}
PORTS = {"openpi's PyTorch port": "outputs_openpi_pytorch", "LeRobot": "outputs_lerobot"}
BARS = {"torchpi": COLORS["suffix"], "openpi's PyTorch port": COLORS["prefix"], "LeRobot": COLORS["noise"]}
TOLERANCE = 2e-5
"""Tolerance of the tests."""


def recorded(kind: str, name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / kind / f"{name}.npz") as arrays:
        return {stage: arrays[stage] for stage in STAGES}


def computed(kind: str) -> dict[str, np.ndarray]:
    """Compute torchpi's results for the recorded inputs."""
    root = GOLDEN / kind
    model = torchpi.load_model(root / "jax_ckpt_pure", config=root / "model_config.json", dtype=torch.float32)
    nested: dict[str, Any] = {"image": {}, "image_mask": {}}
    with np.load(root / "inputs.npz") as arrays:
        for name, values in arrays.items():
            group, _, camera = name.partition(".")
            (nested[group] if camera else nested)[camera or name] = torch.from_numpy(values)
    actions, noise, time = (nested.pop(name) for name in ("actions", "noise", "time"))
    observation = torchpi.Observation.from_dict({name: nested[name] for name in nested if name != "time_beta_raw"})
    with torch.no_grad():
        results = {"loss": model.compute_loss(observation, actions, noise=noise, time=time)}
        for steps in (4, 10):
            results[f"sample_actions_{steps}"] = model.sample_actions(observation, noise=noise, num_steps=steps)
    return {stage: values.numpy() for stage, values in results.items()}


def differences() -> dict[str, dict[str, float]]:
    """Largest absolute differences by row and implementation."""
    rows: dict[str, dict[str, float]] = {}
    for kind, title in KINDS.items():
        jax = recorded(kind, "outputs")
        results = {"torchpi": computed(kind)} | {port: recorded(kind, file) for port, file in PORTS.items()}
        for stage, label in STAGES.items():
            rows[f"{title}: {label}"] = {
                name: float(np.abs(result[stage] - jax[stage]).max()) for name, result in results.items()
            }
    return rows


def draw(figure: "Figure", rows: dict[str, dict[str, float]]) -> None:
    from matplotlib.ticker import NullFormatter

    axes = figure.subplots()
    height = 0.8 / len(BARS)
    for i, (name, color) in enumerate(BARS.items()):
        positions = np.arange(len(rows)) + i * height
        axes.barh(positions, [row[name] for row in rows.values()], height * 0.85, color=color, label=name)
    axes.axvline(TOLERANCE, color=COLORS["ink"], linewidth=0.8, linestyle=":")
    axes.text(TOLERANCE, -0.45, " the tests' tolerance", fontsize=8, va="center")
    axes.set_yticks(np.arange(len(rows)) + height, list(rows))
    axes.set_ylim(len(rows) - 0.2, -0.65)
    axes.set_xscale("log")
    axes.set_xlim(1e-6, 1e-4)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("largest difference from the original in JAX, float32 (smaller is better)")
    axes.tick_params(length=0)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=len(BARS))


def main() -> None:
    rows = differences()
    print("| | " + " | ".join(BARS) + " |\n| --- |" + " --- |" * len(BARS))
    for label, row in rows.items():
        print(f"| {label} | " + " | ".join(f"{row[name]:.1e}" for name in BARS) + " |")
    for file in sys.argv[1:]:
        save_figure(draw_figure(lambda figure: draw(figure, rows), size=(7.2, 3.4)), pathlib.Path(file))


if __name__ == "__main__":
    main()
