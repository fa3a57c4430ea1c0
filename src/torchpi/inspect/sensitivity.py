"""Sensitivity of a policy to its inputs: movement of the action chunk when one input is changed.

X [K, H, a] are the chunks of an observation for K noise samples, V those with one input changed and the same noise.
Both are in normalized units, where all dimensions have one scale, and without padding.

    spread = RMS over K, H, a of X − (mean of X over K)         effect of noise alone
    moves  = RMS over K, H, a of V − X, divided by the spread   0: no effect; √2: as large as that of other noise

Because the noise is the same, an input that is not read gives exactly 0, and no sampling error hides a small effect.
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
_MIN_SPREAD = 1e-3
"""Lower bound of the spread, for a nearly deterministic policy; the training range has width 2."""
_MIN_STATE_CHANGE = 0.1
"""A state closer to its mean in all dimensions gives no information; 1 is half the training range."""

Chunks = Float32[np.ndarray, "K H A"]


@torch.no_grad()
def sample_chunks(policy: Policy, inputs: Mapping[str, Any], noise: Chunks, *, num_steps: int) -> Chunks:
    """Sample a chunk for each noise sample, with one prefill for all.

    Args:
        inputs: of one observation, from `Transforms.forward`.

    Returns:
        Normalized actions, padded to action_dim.
    """
    observation, device = collate([inputs]), policy.model.device
    noise_batch = torch.from_numpy(noise)[None].to(device)
    chunks = policy.model.sample_many(observation.to(device), noise=noise_batch, num_steps=num_steps)
    return chunks.actions[0].cpu().numpy()


def spread_of(chunks: np.ndarray) -> float:
    """RMS deviation of chunks [K, H, a] from their mean over the noise samples."""
    return _rms(chunks - chunks.mean(axis=0))


def sensitivities(
    policy: Policy,
    transforms: Transforms,
    sample: Mapping[str, Any],
    base: np.ndarray,
    sampler: Callable[[Mapping[str, Any]], np.ndarray],
    other_instruction: str | None,
) -> Iterator[Sensitivity]:
    """Change one input after another, and measure how far the chunk moves.

    Args:
        transforms: the policy's transforms.
        sample: of the observation, from `Embodiment.to_model`.
        base: chunks [K, H, a] of the unchanged sample, normalized, without padding.
        sampler: samples chunks for changed inputs with the same noise.
        other_instruction: replacement of the instruction; None to choose another one that the policy was trained with,
            or a made-up one.
    """
    inputs = transforms.forward(sample)
    spread = max(spread_of(base), _MIN_SPREAD)

    def measure(name: str, change: str, changed: Mapping[str, Any], untried: str = "") -> Sensitivity:
        moves = None if untried else _rms(sampler(changed) - base) / spread
        return Sensitivity(name, change, moves, untried)

    def with_images(**images: np.ndarray) -> dict[str, Any]:
        return {**inputs, "image": {**inputs["image"], **images}}

    images = {name: image for name, image in inputs["image"].items() if inputs["image_mask"][name]}
    for name, image in images.items():
        black = black_like(image)
        untried = "" if (image > black).any() else "it is already black"
        yield measure(f"camera {name}", "blanked", with_images(**{name: black}), untried)
    for a, b in itertools.combinations(images, 2):
        untried = "both images are the same" if np.array_equal(images[a], images[b]) else ""
        yield measure(f"cameras {a} and {b}", "swapped", with_images(**{a: images[b], b: images[a]}), untried)
    text = other_instruction or _other_instruction(policy, sample["prompt"])
    yield measure("instruction", f"replaced by {text!r}", transforms.forward({**sample, "prompt": text}))
    if not len(sample["state"]):
        return
    at_mean = transforms.forward({**sample, "state": transforms.norm_stats["state"].mean[: len(sample["state"])]})
    untried = ""
    if state_input(policy.model.config) is None:
        untried = "the policy does not read it"
    elif abs(at_mean["state"] - inputs["state"]).max() < _MIN_STATE_CHANGE:
        untried = "it is already near its mean"
    yield measure("state", "set to its mean", at_mean, untried)


def _other_instruction(policy: Policy, instruction: str) -> str:
    """Another instruction. A trained one is preferred, because an unfamiliar text moves the chunk by itself."""
    texts = [*_trained_instructions(policy), OTHER_INSTRUCTION, "wave"]
    return next(text for text in texts if clean_text(text) != clean_text(instruction))


def _trained_instructions(policy: Policy) -> list[str]:
    dataset = policy.provenance.get("dataset")
    tasks = dataset.get("tasks") if isinstance(dataset, Mapping) else None
    return [text for text in tasks.values() if isinstance(text, str)] if isinstance(tasks, Mapping) else []


def check_sensitivities(policy: Policy, measured: Sequence[Sensitivity]) -> Iterator[Finding]:
    """Report inputs that the policy ignores."""
    for entry in measured:
        if entry.moves is None:
            continue
        if not np.isfinite(entry.moves):
            rule = "change_breaks_actions"
        elif not entry.is_ignored:
            continue
        elif entry.change == "swapped":
            if any(other.is_ignored and other.change == "blanked" for other in measured):
                continue  # already reported for the camera itself
            rule = "cameras_not_told_apart"
        else:
            has_one = entry.input == "instruction" and len(set(_trained_instructions(policy))) == 1
            rule = "one_instruction" if has_one else "input_ignored"
        yield finding(rule, entry.input, **vars(entry), minimum=IGNORED_BELOW, kind=entry.input.split(" ")[0])


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
