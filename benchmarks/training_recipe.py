"""Effect of the recipe's parts: closed-loop success of trainings without them, with several seeds each.

    python benchmarks/training_recipe.py DATASET OUT [--init POLICY] [--select EPISODES] [--tasks A,B]
        [--lr 1e-3] [--steps 600] [--seeds 0,1,2] [--episodes 20]

Variants: ours; weights, moments and updates in pure bfloat16 (as in PyTorch ports) instead of float32 master weights,
with EMA weights in float32; no EMA weights; one augmentation for a whole batch; and all three together. Everything else
follows the recipe metaworld.

Each run has a folder in OUT with its result.json. Existing folders are skipped, so that several processes can share the
work (delete interrupted ones). OUT/results.json and results.png contain all finished runs.

The effect of bfloat16 depends on the size of an update relative to a weight. The published models are fine-tuned with a
peak learning rate of 2.5e-5 and have weights of about 2048^-0.5; for the small model's 128 columns, 1e-4 is the same
ratio.
"""

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from torchpi.model.pi0 import Pi0
from torchpi.rates import wilson_interval
from torchpi.sim.evaluate import evaluate
from torchpi.training import loop, optim
from torchpi.training.config import TrainConfig
from torchpi.training.samples import Samples
from torchpi.training.state import TrainState
from torchpi.ui.palette import COLORS
from torchpi.ui.plots import draw_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIANTS = {
    "ours": frozenset[str](),
    "bfloat16 weights": frozenset({"bfloat16"}),
    "no EMA weights": frozenset({"no EMA"}),
    "one augmentation per batch": frozenset({"one augmentation"}),
    "all three": frozenset({"bfloat16", "no EMA", "one augmentation"}),
}


def recipe(variant: str, seed: int, arguments: argparse.Namespace) -> TrainConfig:
    """Recipe metaworld with the study's steps, and without EMA weights if the variant has none."""
    base = TrainConfig.from_json("metaworld")
    return base.replace(
        dataset=arguments.dataset,
        episodes=arguments.select,
        init=arguments.init,
        model=None if arguments.init else base.options["model"],
        norm_stats="init" if arguments.init else "dataset",
        lr=arguments.lr,
        min_lr=arguments.lr / 10,
        num_steps=arguments.steps,
        seed=seed,
        ema_decay=0.0 if "no EMA" in VARIANTS[variant] else 0.99,
        eval_every=arguments.steps,
        save_every=arguments.steps,
        chunk_samples=0,
        trackers=(),
    )


def train(variant: str, config: TrainConfig, run: pathlib.Path) -> pathlib.Path:
    """Train a variant and return its policy."""
    with contextlib.ExitStack() as stack:
        if "one augmentation" in VARIANTS[variant]:
            stack.enter_context(mock.patch.object(Samples, "collate", _one_augmentation(Samples.collate)))
        if "bfloat16" in VARIANTS[variant]:
            stack.enter_context(mock.patch.object(TrainState, "create", _bfloat16_state(TrainState.create)))
            update = optim.update_ema
            users = [m for name, m in sys.modules.items() if name.startswith("torchpi.") and hasattr(m, "update_ema")]
            for module in users:
                stack.enter_context(mock.patch.object(module, "update_ema", _update_float32_ema(update)))
        return loop.train(config, run).policy


def _one_augmentation(collate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Samples.collate` so that every sample of a batch gets the first one's augmentation, camera by camera."""

    def one(self: Samples, samples: Sequence[dict[str, Any]]) -> Any:
        return collate(self, [{**sample, "augmentation": samples[0]["augmentation"]} for sample in samples])

    return one


def _bfloat16_state(create: Callable[..., TrainState]) -> Callable[..., TrainState]:
    """Wrap `TrainState.create` to use weights and moments in bfloat16, and EMA weights in float32."""

    def create_bfloat16(model: Pi0, **options: Any) -> TrainState:
        state = create(model.to(torch.bfloat16), **options)
        state.ema.update({name: average.float() for name, average in state.ema.items()})
        return state

    return create_bfloat16


def _update_float32_ema(update: Callable[..., None]) -> Callable[..., None]:
    def update_ema(ema: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], decay: float) -> None:
        update(ema, [parameter.float() for parameter in parameters], decay)

    return update_ema


def holdout_loss(run: pathlib.Path) -> float:
    """Latest held-out loss of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([line["holdout_loss"] for line in lines if "holdout_loss" in line][-1])


def runs(seeds: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Order the runs by seed, so that an interrupted comparison has all variants."""
    for seed in seeds:
        for variant in VARIANTS:
            yield seed, variant


def plot(results: Sequence[dict[str, Any]], out: pathlib.Path) -> None:
    """Plot a point per run, and a bar with interval for the mean of each variant's runs."""
    save_figure(draw_figure(lambda figure: _draw(figure, results), size=(8.0, 3.2)), out)


def _draw(figure: "Figure", results: Sequence[dict[str, Any]]) -> None:
    axes = figure.subplots()
    for row, variant in enumerate(VARIANTS):
        found = [result for result in results if result["variant"] == variant]
        if not found:
            continue
        episodes = sum(result["episodes"] for result in found)
        rate = sum(result["success_rate"] * result["episodes"] for result in found) / episodes
        low, high = wilson_interval(round(rate * episodes), episodes)
        axes.barh(row, rate, color=COLORS["line"])
        axes.plot([low, high], [row, row], color=COLORS["prefix"], linewidth=2)
        axes.scatter([result["success_rate"] for result in found], [row] * len(found), color=COLORS["prefix"], s=18)
    axes.set_yticks(range(len(VARIANTS)), list(VARIANTS))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("success rate; line: 95 % interval over all episodes, points: single trainings")


def main() -> None:
    """Run the missing trainings and evaluations, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--init", help="initial policy of all trainings, whose statistics are kept")
    parser.add_argument("--select", help="episodes of the dataset, as in torchpi train --select")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="tasks to evaluate; by default all")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate; ends at a tenth of it")
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
        policy = train(variant, recipe(variant, seed, arguments), folder / "run")
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
