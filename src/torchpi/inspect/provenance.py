"""Provenance of a policy. It has no fixed schema; these entries are read here, and each may be absent:

source      text about the source of the weights
tasks       names of the training tasks
recipe      recipe of `torchpi train`; step: number of updates
machine     text about the training machine
dataset     facts about the demonstrations, such as num_episodes and num_frames
metrics     lines of the training run's metrics.jsonl
results     output of `torchpi eval --json`, from which "tasks" is read; results_swapped: with the instructions of two
            tasks swapped; results_blank: with black images
"""

from collections.abc import Mapping

from torchpi.checkpoints.card import training_of
from torchpi.policy import Policy
from torchpi.rates import Rate, rates_of


def measured(policy: Policy, name: str = "results") -> dict[str, Rate]:
    """Success rates by task; empty if not stated.

    Args:
        name: provenance entry of the evaluation.
    """
    results = policy.provenance.get(name)
    return {} if results is None else rates_of(results, f"{name} in the policy's provenance")


def overall(rates: Mapping[str, Rate]) -> Rate:
    """Success rate over all tasks."""
    successes = round(sum(rate.success_rate * rate.episodes for rate in rates.values()))
    return Rate.of(successes, sum(rate.episodes for rate in rates.values()))


def describe_policy(policy: Policy) -> list[tuple[str, str]]:
    """Rows about a policy's model, training and success rates."""
    provenance = policy.provenance
    count = sum(parameter.numel() for parameter in policy.model.parameters())
    source = [str(provenance["source"])] if provenance.get("source") else []
    tasks = list(provenance.get("tasks", ()))
    rows = [
        ("model", f"{policy.model.config.variant}, {count / 1e6:.2f} million parameters"),
        ("weights", "; ".join([*source, *training_of(provenance)])),
        ("tasks", ", ".join(tasks)),
    ]
    for title, name in (
        ("measured success", "results"),
        ("with swapped instructions", "results_swapped"),
        ("with black images", "results_blank"),
    ):
        if rates := measured(policy, name):
            of_tasks = "" if list(rates) == tasks else f" of {', '.join(rates)}"
            rows.append((title, f"{overall(rates)} episodes{of_tasks}"))
    return [(title, text) for title, text in rows if text]
