"""Collation of samples to a batch of model inputs, and inputs that condition actions on previous chunks."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchpi.errors import PolicyError, counted
from torchpi.model.rtc import ActionPrefix, Guidance, prefix_weights
from torchpi.types import ActionChunk, Observation, PreviousChunk


def stack_inputs(samples: Sequence[Mapping[str, Any]], prompt_lengths: Sequence[int] = ()) -> dict[str, Any]:
    """Stack the inputs of several samples for `Observation.from_dict`.

    Prompts are padded to the smallest of `prompt_lengths` that fits all of them, or else to the longest prompt.
    """
    longest = max(len(sample["tokenized_prompt"]) for sample in samples)
    length = min((fixed for fixed in prompt_lengths if fixed >= longest), default=longest)

    def stack_padded(key: str) -> Tensor:
        rows = [np.pad(sample[key], (0, length - len(sample[key]))) for sample in samples]
        return torch.from_numpy(np.stack(rows))

    cameras = list(samples[0]["image"])
    return {
        "image": {name: torch.from_numpy(np.stack([s["image"][name] for s in samples])) for name in cameras},
        "image_mask": {name: torch.tensor([bool(s["image_mask"][name]) for s in samples]) for name in cameras},
        "state": torch.from_numpy(np.stack([s["state"] for s in samples])),
        "tokenized_prompt": stack_padded("tokenized_prompt"),
        "tokenized_prompt_mask": stack_padded("tokenized_prompt_mask"),
    }


def collate(samples: Sequence[Mapping[str, Any]]) -> Observation:
    """Collate several samples to one batch."""
    return Observation.from_dict(stack_inputs(samples))


def rtc_inputs(
    samples: Sequence[Mapping[str, Any]],
    previous: Sequence[PreviousChunk | None],
    *,
    horizon: int,
    action_size: int,
    max_action_prefix: int,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of `Pi0.sample_actions` that condition it on the previous chunks.

    Args:
        samples: with "actions" [k, A], the normalized rest of the previous chunk, if there is one.
        action_size: a, the number of the robot's action dimensions.
        max_action_prefix: length of the longest action prefix that the model was trained with; 0 for none.
    """
    width = next(sample["actions"].shape[-1] for sample in samples if "actions" in sample)
    actions, present = torch.zeros(2, len(samples), horizon, width, dtype=torch.float32)
    delays, executed = torch.zeros(len(samples), dtype=torch.int64), torch.full((len(samples),), horizon)
    is_prefix = torch.zeros(len(samples), horizon, dtype=torch.bool)
    for i, (sample, chunk) in enumerate(zip(samples, previous, strict=True)):
        if chunk is None:
            continue
        steps = chunk.steps_executed(horizon)
        rest = torch.from_numpy(sample["actions"][:horizon].astype(np.float32))
        actions[i, : len(rest)] = rest
        if _uses_action_prefix(chunk, max_action_prefix):
            is_prefix[i, : min(chunk.delay, len(rest))] = True
        else:
            delays[i], executed[i] = int(chunk.delay), steps
            present[i, : len(rest), :action_size] = 1
    inputs: dict[str, Any] = {}
    if is_prefix.any():
        inputs["action_prefix"] = ActionPrefix(actions.to(device), is_prefix.to(device))
    weight = prefix_weights(horizon, delays, executed)[:, :, None] * present
    if weight.any():
        inputs["guidance"] = Guidance(actions.to(device), weight.to(device))
    return inputs


def _uses_action_prefix(chunk: PreviousChunk, max_action_prefix: int) -> bool:
    """True if the model continues a trained action prefix; False if it is guided towards the previous chunk."""
    if chunk.method == "trained" and chunk.delay > max_action_prefix:
        raise PolicyError(
            f"The policy was trained to continue at most {counted(max_action_prefix, 'action')}, not {chunk.delay}; "
            "use guidance, or train with a larger max_action_prefix."
        )
    return chunk.method == "trained" or (chunk.method is None and 0 < int(chunk.delay) <= max_action_prefix)


def check_observations(observations: Any) -> None:
    """Raise a PolicyError unless `observations` is a list (or another sized collection) with at least one item."""
    if not isinstance(observations, Collection) or isinstance(observations, Mapping | str | bytes):
        found = "one dict" if isinstance(observations, Mapping) else type(observations).__name__
        raise PolicyError(f"infer_batch takes a list of observations, got {found}; infer takes a single one.")
    if not len(observations):
        raise PolicyError("infer_batch got no observations; it needs at least one.")


def checked_arguments(prefixes: Any, generator: Any, *, count: int) -> list[PreviousChunk | None]:
    """The previous chunk of each of `count` observations, or None."""
    chunks = [None] * count if prefixes is None else list(prefixes)
    if len(chunks) != count or not all(isinstance(each, PreviousChunk | None) for each in chunks):
        kinds = ", ".join(type(each).__name__ for each in chunks[:8])
        raise PolicyError(f"prefixes are [{kinds}]; expected {count} items, each PreviousChunk or None.")
    if not isinstance(generator, torch.Generator | None):
        raise PolicyError(f"generator is {generator!r:.80}; expected a torch.Generator, or noise=.")
    return chunks


def answer_of(
    actions: np.ndarray, clipped: int, sample_fields: Any, timing: Mapping[str, float], sample: Mapping[str, Any]
) -> ActionChunk:
    """The action chunk for one observation. `sample_fields` describe its action samples, if there are several."""
    answer = ActionChunk(actions=actions, policy_timing=dict(timing), **sample_fields)
    if clipped:
        answer["actions_clipped"] = clipped
    if "prompt_tokens_cut" in sample:
        answer["prompt_tokens_cut"] = sample["prompt_tokens_cut"]
    return answer
