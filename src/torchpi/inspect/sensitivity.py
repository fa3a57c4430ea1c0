"""Sensitivity of a policy to its inputs: the movement of its action chunk when one of them is changed.

For K noises, the chunks of the observation are X [K, H, a], those with one input changed and the same noises are V;
both in normalized units, in which all dimensions have one scale, without padding.

    spread = RMS over K, H, a of X − (mean of X over K)         effect of noise alone
    moves  = RMS over K, H, a of V − X, divided by the spread   0: the input changes nothing; √2: as another noise

Both have the same noise, so an input that is not read gives 0 and no sampling error hides a small influence.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from torchpi.collate import collate
from torchpi.inspect.diagnosis import IGNORED_BELOW, Finding, Sensitivity, finding, state_input
from torchpi.policy import Policy
from torchpi.transforms.images import black_like
from torchpi.transforms.pipeline import Transforms
from torchpi.transforms.prompt import clean_text

OTHER_INSTRUCTION = "stop and move back"
# Least spread, for a policy that is nearly certain; the range of the training data has length 2.
_LEAST_SPREAD = 1e-3
# A state that is nearer to its mean in all dimensions (1 in normalized units is half of the range) tells nothing.
_LEAST_STATE_CHANGE = 0.1

Chunks = Float32[np.ndarray, "K H A"]


@torch.no_grad()
def sample_chunks(policy: Policy, inputs: Mapping[str, Any], noise: Chunks, *, num_steps: int) -> Chunks:
    """Sample a chunk for each noise, as `Pi0.sample_actions`, with one prefill for all of them.

    Args:
        inputs: of one observation, from `Transforms.forward`.

    Returns:
        Normalized actions, padded to action_dim.
    """
    observation, noises = collate([inputs]), torch.from_numpy(noise)[None]
    device = policy.model.device
    chunks = policy.model.sample_many(observation.to(device), noise=noises.to(device), num_steps=num_steps)
    return chunks.actions[0].cpu().numpy()


def spread_of(chunks: np.ndarray) -> float:
    """RMS deviation [K, H, a] from the mean over the noises."""
    return _rms(chunks - chunks.mean(axis=0))


def sensitivities(
    policy: Policy,
    transforms: Transforms,
    sample: Mapping[str, Any],
    base: np.ndarray,
    sample_variant: Callable[[Mapping[str, Any]], np.ndarray],
    other_instruction: str | None,
) -> Iterator[Sensitivity]:
    """Change one input after the other.

    Args:
        transforms: the policy's.
        sample: of the observation, from `Embodiment.to_model`.
        base: the chunks [K, H, a] of the unchanged sample, normalized, without padding.
        sample_variant: the chunks of changed inputs with the same noises.
        other_instruction: None: another one that the policy was trained with, or a made-up one.
    """
    inputs = transforms.forward(sample)
    unit = max(spread_of(base), _LEAST_SPREAD)

    def tried(name: str, change: str, changed: Mapping[str, Any], untried: str = "") -> Sensitivity:
        moves = None if untried else _rms(sample_variant(changed) - base) / unit
        return Sensitivity(name, change, moves, untried)

    def with_images(**images: np.ndarray) -> dict[str, Any]:
        return {**inputs, "image": {**inputs["image"], **images}}

    images = {name: image for name, image in inputs["image"].items() if inputs["image_mask"][name]}
    for name, image in images.items():
        blank, black = with_images(**{name: black_like(image)}), "it is black already"
        yield tried(f"camera {name}", "blanked", blank, "" if (image > black_like(image)).any() else black)
    for one, other in itertools.combinations(images, 2):
        swapped = with_images(**{one: images[other], other: images[one]})
        are_same = np.array_equal(images[one], images[other])
        yield tried(f"cameras {one} and {other}", "swapped", swapped, "both images are the same" if are_same else "")
    other_text = other_instruction or _other_instruction(policy, sample["prompt"])
    yield tried("instruction", f"replaced by {other_text!r}", transforms.forward({**sample, "prompt": other_text}))
    if not len(sample["state"]):
        return
    at_mean = transforms.forward({**sample, "state": transforms.norm_stats["state"].mean[: len(sample["state"])]})
    untried = ""
    if state_input(policy.model.config) is None:
        untried = "the policy is made without it"
    elif abs(at_mean["state"] - inputs["state"]).max() < _LEAST_STATE_CHANGE:
        untried = "it is near its mean already"
    yield tried("state", "set to its mean", at_mean, untried)


def _other_instruction(policy: Policy, instruction: str) -> str:
    """A known instruction if possible, so that a change of the chunk is due to its meaning, not its strangeness."""
    texts = [*_known_instructions(policy), OTHER_INSTRUCTION, "wave"]
    return next(text for text in texts if clean_text(text) != clean_text(instruction))


def _known_instructions(policy: Policy) -> list[str]:
    dataset = policy.provenance.get("dataset")
    tasks = dataset.get("tasks") if isinstance(dataset, Mapping) else None
    return [text for text in tasks.values() if isinstance(text, str)] if isinstance(tasks, Mapping) else []


def check_sensitivities(policy: Policy, found: Sequence[Sensitivity]) -> Iterator[Finding]:
    """Name the inputs that the policy ignores."""
    for entry in found:
        if entry.moves is None:
            continue
        if not np.isfinite(entry.moves):
            rule = "change_breaks_actions"
        elif not entry.is_ignored:
            continue
        elif entry.change == "swapped":
            if any(other.is_ignored and other.change == "blanked" for other in found):
                continue
            rule = "cameras_not_told_apart"
        else:
            knows_one = entry.input == "instruction" and len(set(_known_instructions(policy))) == 1
            rule = "one_instruction" if knows_one else "input_ignored"
        yield finding(rule, entry.input, **vars(entry), least=IGNORED_BELOW, kind=entry.input.split(" ")[0])


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
