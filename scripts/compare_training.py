"""What the recipe's parts are worth: closed-loop success of trainings that leave them out, with several seeds each.

    python scripts/compare_training.py DATASET OUT [--steps 600] [--seeds 3] [--episodes 20]

Variants: ours; weights, moments and updates in pure bfloat16 (as PyTorch ports do it) instead of float32 masters; no
moving average; one draw of the augmentation for a whole batch; and all three together. Everything else is the recipe
metaworld. OUT/results.json has a line per run; a run that is there is not repeated. OUT/results.png compares them.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from torchpi.sim.evaluate import evaluate
from torchpi.sim.result import wilson_interval
from torchpi.training import loop, weights
from torchpi.training.config import TrainConfig
from torchpi.training.samples import Samples

VARIANTS = {
    "ours": frozenset[str](),
    "bfloat16 weights": frozenset({"bfloat16"}),
    "no average": frozenset({"no average"}),
    "one augmentation per batch": frozenset({"one augmentation"}),
    "all three": frozenset({"bfloat16", "no average", "one augmentation"}),
}


def bfloat16_weights(*args: Any, **kwargs: Any) -> Any:
    """`begin_model` with everything in bfloat16: AdamW's moments follow."""
    model, beginning = weights.begin_model(*args, **kwargs)
    return model.to(torch.bfloat16), beginning


class OneAugmentation(Samples):
    """Every sample of a batch gets the first one's augmentation, camera by camera."""

    @staticmethod
    def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        first = samples[0]["augmentation"]
        return Samples.collate([{**sample, "augmentation": first} for sample in samples])


def train(variant: str, seed: int, dataset: str, run: pathlib.Path, steps: int) -> pathlib.Path:
    """A training; its policy."""
    without = VARIANTS[variant]
    base = TrainConfig.from_json("metaworld")
    config = dataclasses.replace(
        base,
        dataset=dataset,
        num_steps=steps,
        seed=seed,
        ema_decay=0.0 if "no average" in without else 0.99,
        eval_every=steps,
        save_every=steps,
        chunk_samples=0,
        trackers=(),
    )
    with mock.patch.object(loop, "Samples", OneAugmentation if "one augmentation" in without else Samples):
        begin = bfloat16_weights if "bfloat16" in without else weights.begin_model
        with mock.patch.object(loop, "begin_model", begin):
            return loop.train(config, run).policy


def runs(seeds: int) -> Iterator[tuple[int, str]]:
    """Seed by seed, so that a comparison that is stopped has all variants."""
    for seed in range(seeds):
        for variant in VARIANTS:
            yield seed, variant


def plot(results: Sequence[dict[str, Any]], out: pathlib.Path) -> None:
    """A point per run, a bar for the mean of a variant's runs with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for row, variant in enumerate(VARIANTS):
        found = [result for result in results if result["variant"] == variant]
        if not found:
            continue
        episodes = sum(result["episodes"] for result in found)
        rate = sum(result["success_rate"] * result["episodes"] for result in found) / episodes
        low, high = wilson_interval(round(rate * episodes), episodes)
        axes.barh(row, rate, color="#c6d6ea")
        axes.plot([low, high], [row, row], color="#1f4e8c", linewidth=2)
        axes.scatter([result["success_rate"] for result in found], np.full(len(found), row), color="#1f4e8c", s=18)
    axes.set_yticks(range(len(VARIANTS)), list(VARIANTS))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("success; line: 95 % interval over all episodes, points: single trainings")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=20)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else []
    for seed, variant in runs(arguments.seeds):
        if any(result["seed"] == seed and result["variant"] == variant for result in results):
            continue
        run = arguments.out / f"{variant.replace(' ', '_')}_{seed}"
        policy = train(variant, seed, arguments.dataset, run, arguments.steps)
        result = evaluate(str(policy), "metaworld", episodes=arguments.episodes, seed=1000 + seed).to_dict()
        episodes = sum(task["episodes"] for task in result["tasks"].values())
        results.append({"variant": variant, "seed": seed, "steps": arguments.steps, "episodes": episodes, **result})
        file.write_text(json.dumps(results, indent=1))
        print(f"{variant}, seed {seed}: {100 * result['success_rate']:.0f} % of {episodes}", flush=True)
    plot(results, arguments.out / "results.png")


if __name__ == "__main__":
    main()
