"""Create the embedded policy, src/torchpi/assets/demo_policy, from a training run and its measurements.

First `torchpi sim record` and `torchpi train` as in docs/from_nothing_to_a_policy.md, into metaworld6 and run. Then:

    python scripts/package_demo_policy.py run
    torchpi eval demo --env metaworld --episodes 50 --seed 0 --json > results.json
    torchpi eval demo --env metaworld --tasks faucet-open,faucet-close --swap faucet-open:faucet-close \\
        --episodes 10 --max-steps 200 --json > swapped.json
    torchpi eval demo --env metaworld --blank-images --episodes 10 --max-steps 200 --json > blank.json
    torchpi eval run_pi0/checkpoints/00001800/policy --env metaworld --episodes 50 --seed 0 --json > pi0.json
    python scripts/package_demo_policy.py run --results results.json --swapped swapped.json --blank blank.json \\
        --pi0 pi0.json

The first call rounds the weights to bfloat16; the second one writes the same weights with the measurements.
"""

import dataclasses
import json
import pathlib
import platform
from typing import Any

import torch
import tyro

import torchpi
from torchpi.assets import assets
from torchpi.training.run_folder import METRICS, read_metrics
from torchpi.training.state import checkpoints

MAX_METRICS = 100
"""Number of metrics lines to keep, enough to plot the curves."""


def measured(file: pathlib.Path | None) -> dict[str, Any] | None:
    """Results of an evaluation, without the list of episodes and the machine's timings."""
    if file is None:
        return None
    document = json.loads(file.read_text(encoding="utf-8"))
    left_out = ("episodes", "videos", "policy", "seconds", "steps_per_second", "chunk_ms")
    return {name: value for name, value in document.items() if name not in left_out}


def _without_folders(command: str) -> str:
    """Shorten each absolute path of a command to its last part."""
    return " ".join(pathlib.PurePath(word).name if word.startswith("/") else word for word in command.split())


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Subsample the lines, keeping all with a held-out loss."""
    every = max(1, len(lines) // MAX_METRICS)
    keep = ("step", "loss", "holdout_loss")
    return [
        {name: round(line[name], 5) for name in keep if name in line}
        for i, line in enumerate(lines)
        if i % every == 0 or "holdout_loss" in line
    ]


def main(
    run: tyro.conf.Positional[pathlib.Path],
    results: pathlib.Path | None = None,
    swapped: pathlib.Path | None = None,
    blank: pathlib.Path | None = None,
    pi0: pathlib.Path | None = None,
    execute_steps: int | None = None,
    machine: str = f"{torch.get_num_threads()} threads of a {platform.machine()} CPU",
) -> None:
    """Write the packaged policy.

    Args:
        run: folder of the training run.
        results: output of `torchpi eval demo --json`.
        swapped: the same with the faucets' instructions swapped.
        blank: the same without images.
        pi0: the same for a π₀ trained with the same recipe and a third of the steps.
        execute_steps: recommended number of executed actions, if measurements showed a better one than the run's.
        machine: machine on which the run was trained.
    """
    last = checkpoints(run)[-1]
    policy = torchpi.load_policy(last / "policy", device="cpu")
    if execute_steps is not None:
        policy.embodiment = dataclasses.replace(policy.embodiment, execute_steps=execute_steps)
    provenance = policy.provenance
    data = provenance["recipe"]["data"]
    data["dataset"] = pathlib.Path(data["dataset"]).name
    provenance["dataset"]["command"] = _without_folders(provenance["dataset"]["command"])
    policy.provenance = {
        **provenance,
        "machine": machine,
        "step": int(last.name),
        "metrics": thinned(read_metrics(run / METRICS)),
        **{
            name: value
            for name, file in (
                ("results", results),
                ("results_swapped", swapped),
                ("results_blank", blank),
                ("results_pi0", pi0),
            )
            if (value := measured(file)) is not None
        },
    }
    target = assets() / "demo_policy"
    policy.save(target, overwrite=target.exists(), dtype=torch.bfloat16)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {size / 1e6:.1f} MB, step {int(last.name)}")


if __name__ == "__main__":
    tyro.cli(main)
