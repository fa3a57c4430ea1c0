"""Effect of the recipe's parts: closed-loop success of trainings that leave them out, with several seeds each.

    python benchmarks/training_recipe.py DATASET OUT [--init POLICY] [--select EPISODES] [--tasks A,B]
        [--learning-rate 1e-3] [--steps 600] [--seeds 0,1,2] [--episodes 20]

Variants: ours; weights, moments and updates in pure bfloat16 (as PyTorch ports do it) instead of float32 masters, the
average in float32; no moving average; one draw of the augmentation for a whole batch; and all three together.
Everything else is the recipe metaworld.

Each run has a folder in OUT with its result.json; those that are there are left alone, so that several processes may
share the work (delete what was interrupted). OUT/results.json and results.png have all that are done.

What bfloat16 loses depends on the size of an update beside that of a weight. The published models are fine-tuned with
a peak of 2.5e-5 and have weights of about 2048^-0.5: with the 128 columns of the small model 1e-4 is the same share.
"""

import argparse
import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from torchpi.sim.evaluate import evaluate
from torchpi.sim.result import wilson_interval
from torchpi.training import loop, optim, weights
from torchpi.training.config import TrainConfig
from torchpi.training.samples import Samples
from torchpi.training.state import TrainState

VARIANTS = {
    "ours": frozenset[str](),
    "bfloat16 weights": frozenset({"bfloat16"}),
    "no average": frozenset({"no average"}),
    "one augmentation per batch": frozenset({"one augmentation"}),
    "all three": frozenset({"bfloat16", "no average", "one augmentation"}),
}


def bfloat16_model(*args: Any, **kwargs: Any) -> Any:
    """`begin_model` with everything in bfloat16: AdamW's moments follow."""
    model, beginning = weights.begin_model(*args, **kwargs)
    return model.to(torch.bfloat16), beginning


def float32_average(*args: Any, **kwargs: Any) -> TrainState:
    """`TrainState.begin` whose average is in float32 even if the weights are not."""
    state = TrainState.begin(*args, **kwargs)
    state.ema.update({name: average.float() for name, average in state.ema.items()})
    return state


def update_float32_average(ema: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], decay: float) -> None:
    """`update_ema` for weights of another dtype."""
    optim.update_ema(ema, [parameter.float() for parameter in parameters], decay)


class OneAugmentation(Samples):
    """Every sample of a batch gets the first one's augmentation, camera by camera."""

    @staticmethod
    def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        first = samples[0]["augmentation"]
        return Samples.collate([{**sample, "augmentation": first} for sample in samples])


def train(variant: str, seed: int, run: pathlib.Path, arguments: argparse.Namespace) -> pathlib.Path:
    """A training; its policy."""
    without = VARIANTS[variant]
    base = TrainConfig.from_json("metaworld")
    config = base.replace(
        dataset=arguments.dataset,
        episodes=arguments.select,
        init=arguments.init,
        model=None if arguments.init else base.model.config,
        norm_stats="init" if arguments.init else "dataset",
        lr=arguments.learning_rate,
        min_lr=arguments.learning_rate / 10,
        num_steps=arguments.steps,
        seed=seed,
        ema_decay=0.0 if "no average" in without else 0.99,
        eval_every=arguments.steps,
        save_every=arguments.steps,
        chunk_samples=0,
        trackers=(),
    )
    replaced: dict[str, Any] = {}
    if "one augmentation" in without:
        replaced["Samples"] = OneAugmentation
    if "bfloat16" in without:
        average = mock.Mock(begin=float32_average)
        replaced |= {"begin_model": bfloat16_model, "TrainState": average, "update_ema": update_float32_average}
    with contextlib.ExitStack() as stack:
        for name, replacement in replaced.items():
            stack.enter_context(mock.patch.object(loop, name, replacement))
        return loop.train(config, run).policy


def holdout_loss(run: pathlib.Path) -> float:
    """The latest that the run has measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([line["holdout_loss"] for line in lines if "holdout_loss" in line][-1])


def runs(seeds: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Seed by seed, so that a comparison that is stopped has all variants."""
    for seed in seeds:
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
    parser.add_argument("--init", help="the policy that all begin with; its statistics are kept")
    parser.add_argument("--select", help="the dataset's episodes, as of torchpi train's --episodes")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="that are evaluated; by default all")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the peak; a tenth of it in the end")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=20)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed, variant in runs(arguments.seeds):
        folder = arguments.out / f"{variant.replace(' ', '_')}_{seed}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        policy = train(variant, seed, folder / "run", arguments)
        result = evaluate(
            str(policy), "metaworld", tasks=arguments.tasks, episodes=arguments.episodes, seed=1000 + seed
        ).to_dict()
        episodes = sum(task["episodes"] for task in result["tasks"].values())
        entry = {
            **result,
            "evaluation_seed": result["seed"],
            "variant": variant,
            "seed": seed,
            "steps": arguments.steps,
            "holdout_loss": holdout_loss(folder / "run"),
            "episodes": episodes,
        }
        (folder / "result.json").write_text(json.dumps(entry))
        print(f"{variant}, seed {seed}: {100 * result['success_rate']:.0f} % of {episodes}", flush=True)
    results = [json.loads(file.read_text()) for file in sorted(arguments.out.glob("*/result.json"))]
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1))
    plot(results, arguments.out / "results.png")


if __name__ == "__main__":
    main()
