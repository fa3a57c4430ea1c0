"""A policy's provenance, which is free; each part that is read here may be absent.

source      of the weights, a text
tasks       names of the tasks that it was trained on
recipe      of `torchpi train`, and step, the number of its updates
machine     on which it was trained, a text
dataset     of the demonstrations, num_episodes and num_frames among it
metrics     lines of the training run's metrics.jsonl
results     what `torchpi eval --json` printed, of which "tasks" is read; results_swapped: with the instructions of two
            tasks swapped; results_blank: with black images
"""

from collections.abc import Mapping

from torchpi.checkpoints.card import training_of
from torchpi.policy import Policy
from torchpi.rates import Rate, rates_of


def measured(policy: Policy, name: str = "results") -> dict[str, Rate]:
    """Success rates of an evaluation by task; empty: not stated.

    Args:
        name: the evaluation's.
    """
    results = policy.provenance.get(name)
    return {} if results is None else rates_of(results, f"{name} in the policy's provenance")


def overall(rates: Mapping[str, Rate]) -> Rate:
    """All tasks together."""
    successes = round(sum(rate.success_rate * rate.episodes for rate in rates.values()))
    return Rate.of(successes, sum(rate.episodes for rate in rates.values()))


def describe_policy(policy: Policy) -> list[tuple[str, str]]:
    """Origin and measured success of a policy, as pairs of texts."""
    config, stated = policy.model.config, policy.provenance
    count = sum(parameter.numel() for parameter in policy.model.parameters())
    rows = [
        ("model", f"{config.variant}, {count / 1e6:.2f} million parameters"),
        ("weights", "; ".join([*map(str, filter(None, [stated.get("source")])), *training_of(stated)])),
        ("tasks", ", ".join(stated.get("tasks", ()))),
    ]
    for title, name in (
        ("measured success", "results"),
        ("with swapped instructions", "results_swapped"),
        ("with black images", "results_blank"),
    ):
        if rates := measured(policy, name):
            where = "" if list(rates) == list(stated.get("tasks", ())) else f" of {', '.join(rates)}"
            rows.append((title, f"{overall(rates)} episodes{where}"))
    return [(name, text) for name, text in rows if text]
