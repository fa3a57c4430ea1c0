"""What a policy says of its own making: its provenance is free, and each part that is read here may be absent.

source      where the weights come from, a text
tasks       names of the tasks that it was trained on
recipe      of `torchpi train`, and step, the number of its updates
machine     on which it was trained, a text
dataset     how the demonstrations were recorded, num_episodes and num_frames among it
metrics     lines of the training run's metrics.jsonl
results     what `torchpi eval --json` printed, of which "tasks" is read; results_swapped: with the instructions of two
            tasks swapped; results_blank: with black images
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torchpi.errors import SimulationError
from torchpi.policy import Policy
from torchpi.sim.result import wilson_interval
from torchpi.training.config import flat_options
from torchpi.ui.format import format_count


@dataclasses.dataclass(frozen=True)
class Rate:
    """How often something succeeded."""

    success_rate: float
    """0 to 1."""
    interval: tuple[float, float]
    """Wilson's 95 % interval of it."""
    episodes: int

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.success_rate:.0%} ({low:.0%} – {high:.0%}) of {self.episodes} episodes"


def measured(policy: Policy, name: str = "results") -> dict[str, Rate]:
    """How often the policy succeeded in each task when it was evaluated; empty: it does not say.

    Args:
        name: the evaluation's.
    """
    results = policy.provenance.get(name)
    if results is None:
        return {}
    try:
        return {
            task: Rate(float(entry["success_rate"]), (entry["interval"][0], entry["interval"][1]), entry["episodes"])
            for task, entry in results["tasks"].items()
        }
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise SimulationError(
            f"{name} in the policy's provenance is not what `torchpi eval --json` prints: expected tasks, by name, "
            f"each with success_rate, interval and episodes ({type(error).__name__}: {error})."
        ) from error


def overall(rates: Mapping[str, Rate]) -> Rate:
    """All tasks together."""
    episodes = sum(rate.episodes for rate in rates.values())
    successes = round(sum(rate.success_rate * rate.episodes for rate in rates.values()))
    return Rate(successes / episodes, wilson_interval(successes, episodes), episodes)


def describe_policy(policy: Policy) -> list[tuple[str, str]]:
    """What the policy is and where it comes from, as pairs of texts."""
    config, said = policy.model.config, policy.provenance
    count = sum(parameter.numel() for parameter in policy.model.parameters())
    rows = [
        ("model", f"{'π₀.₅' if config.pi05 else 'π₀'}, {count / 1e6:.2f} million parameters"),
        ("weights", _training(said)),
        ("tasks", ", ".join(said.get("tasks", ()))),
    ]
    for title, name in (
        ("measured success", "results"),
        ("with swapped instructions", "results_swapped"),
        ("with black images", "results_blank"),
    ):
        if rates := measured(policy, name):
            where = "" if list(rates) == list(said.get("tasks", ())) else f" of {', '.join(rates)}"
            rows.append((title, f"{overall(rates)}{where}"))
    return [(name, text) for name, text in rows if text]


def _training(said: Mapping[str, Any]) -> str:
    """Where the weights come from."""
    parts = [str(said["source"])] if "source" in said else []
    recipe, dataset = said.get("recipe"), said.get("dataset")
    if isinstance(recipe, Mapping) and "batch_size" in recipe and "step" in said:
        begun = flat_options(recipe).get("init") or "random weights"
        parts.append(f"{said['step']} steps of {recipe['batch_size']} samples, from {begun}")
    if "machine" in said:
        parts.append(f"on {said['machine']}")
    if isinstance(dataset, Mapping) and {"num_episodes", "num_frames"} <= set(dataset):
        frames = format_count(dataset["num_frames"])
        parts.append(f"{dataset['num_episodes']} demonstrations by scripted experts, {frames} frames")
    return "; ".join(parts)


def losses(policy: Policy) -> dict[str, list[tuple[int, float]]]:
    """The curves of the training run as steps and values, by name; empty: the policy does not say."""
    lines = policy.provenance.get("metrics") or ()
    curves = {
        name: [(int(line["step"]), float(line[name])) for line in lines if name in line]
        for name in ("loss", "holdout_loss")
    }
    return {name: points for name, points in curves.items() if len(points) > 1}
