"""The diagnosis of a policy: its weights, its statistics, and one observation in it."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torchpi.inspect.diagnosis import (
    ActionCheck,
    CameraCheck,
    Diagnosis,
    Finding,
    Level,
    ObservationCheck,
    PromptCheck,
    StateCheck,
    describe,
    state_dim,
    state_units,
)
from torchpi.inspect.sensitivity import check_sensitivities, sample_chunks, sensitivities, spread_of
from torchpi.inspect.statistics import check_statistics, excess
from torchpi.policy import Policy
from torchpi.randomness import generator_at
from torchpi.robots.keys import flatten
from torchpi.transforms.normalize import constant_dims, normalize
from torchpi.transforms.pipeline import Transforms

_LEVELS = ("problem", "warning", "note")
_Levels = tuple[tuple[Level, float, str], ...]
"""Level, least distance and message. Distances are in widths of the range that holds 98 % of the training data: 2 % of
the data lie outside themselves, and up to a tenth of the width is no news."""

# A normal distribution's range is 4.7 deviations wide, so half a width beyond it is 4.7 deviations from the mean: a
# state that the training data practically never had.
_STATE_LEVELS: _Levels = (
    (
        "problem",
        0.5,
        "far outside of the training data's range, by more than half of its width: {}. Check units, order and "
        "calibration of the state, and whether the statistics belong to this robot (norm_stats=, asset_id=).",
    ),
    (
        "warning",
        0.1,
        "outside of the training data's range, by more than a tenth of its width: {}. Check the calibration, and begin "
        "where the demonstrations begin.",
    ),
    ("note", 0.0, "just outside of the training data's range, as 1 % of the data are on either side: {}."),
)
# Actions have longer tails than states, because fast motions are rare: a whole width.
_ACTION_ADVICE = (
    "{}. Check the statistics, and whether this observation is like the training data; limit the robot before it moves."
)
_ACTION_LEVELS: _Levels = (
    (
        "problem",
        1.0,
        f"predicted far outside of the training data's range, by more than its whole width: {_ACTION_ADVICE}",
    ),
    (
        "warning",
        0.1,
        f"predicted outside of the training data's range, by more than a tenth of its width: {_ACTION_ADVICE}",
    ),
)

Sample = Callable[[Mapping[str, Any]], np.ndarray]
"""Chunks [K, H, a] of a policy's inputs, normalized, without padding; the same noises in each call."""


def diagnose(
    policy: Policy,
    observation: Mapping[str, Any] | None = None,
    *,
    num_seeds: int = 8,
    num_steps: int = 10,
    seed: int = 0,
    other_instruction: str | None = None,
) -> Diagnosis:
    """Examine a policy; nothing about it is changed.

    Args:
        observation: of its robot, nested, or flat with '.' between the keys; None: only what needs no observation.
        num_seeds: noises, each with its own chunk.
        num_steps: Euler steps.
        seed: of the noises.
        other_instruction: replaces the instruction; by default another one that the policy was trained with, or a
            made-up one.

    Returns:
        A description of the policy, findings, and what the observation shows. An observation that the policy cannot
        read is a finding, not an error.
    """

    def sample(inputs: Mapping[str, Any]) -> np.ndarray:
        shape = (num_seeds, policy.model.config.require("action_horizon"), policy.model.config.action_dim)
        noise = generator_at(seed, "doctor").standard_normal(shape).astype(np.float32)
        return sample_chunks(policy, inputs, noise, num_steps=num_steps)[..., : policy.embodiment.action_size]

    of_weights = list(_check_weights(policy))
    findings = [*of_weights, *check_statistics(policy)]
    checks = None
    if observation is not None:
        checks = _check_observation(policy, observation, findings, None if of_weights else sample, other_instruction)
    findings.sort(key=lambda finding: _LEVELS.index(finding.level))
    return Diagnosis(describe(policy), tuple(findings), checks)


def _check_weights(policy: Policy) -> Iterator[Finding]:
    broken = [name for name, weight in policy.model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        yield Finding(
            "problem",
            "weights",
            f"NaN or infinity in {', '.join(broken[:5])}{more}; expected finite numbers. Get the file again; if the "
            "weights come out of a training run, take an earlier checkpoint of it.",
        )


def _check_observation(
    policy: Policy,
    observation: Mapping[str, Any],
    findings: list[Finding],
    sample_variant: Sample | None,
    other_instruction: str | None,
) -> ObservationCheck:
    """All that one observation shows, as far as the policy can read it; findings are appended."""
    sent = flatten(observation)
    cameras = tuple(
        CameraCheck(str(c.name), c.key, c.presence, c.key is not None and sent.get(c.key) is not None)
        for c in policy.embodiment.read_cameras
    )
    checks, of_cameras = ObservationCheck(cameras), list(_check_cameras(policy, cameras))
    findings += of_cameras
    # Copies, so that the policy still warns of what it warns of once when it is used afterwards.
    robot, transforms = dataclasses.replace(policy.embodiment), dataclasses.replace(policy.transforms)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample = robot.to_model(observation, default_prompt=policy.default_prompt, state_dim=state_dim(policy))
    except (KeyError, ValueError) as error:
        if not any(finding.level == "problem" for finding in of_cameras):
            findings.append(Finding("problem", "observation", str(error.args[0])))
        return checks
    findings += [Finding("warning", "observation", str(warning.message)) for warning in caught]
    state, prompt = _state(policy, sample["state"]), _prompt(transforms, sample)
    findings += [*_check_pixels(sample), *_check_state(policy, state), *_check_prompt(transforms, prompt)]
    outside = sum(check.outside for check in state) / len(state)
    checks = dataclasses.replace(checks, state=state, state_outside=outside, prompt=prompt)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # found above, in more detail
            if sample_variant is not None:
                return _run(policy, transforms, sample, sample_variant, other_instruction, checks, findings)
            transforms.forward(sample)
    except ValueError as error:
        findings.append(Finding("problem", "observation", str(error)))
    return checks


def _check_cameras(policy: Policy, cameras: Sequence[CameraCheck]) -> Iterator[Finding]:
    for camera in cameras:
        if camera.found or camera.presence == "masked":
            continue
        lacking = f"the observation has no image {camera.key}"
        if camera.presence == "required":
            yield Finding(
                "problem",
                f"camera {camera.name}",
                f"{lacking}, which {policy.embodiment.name} requires. Send it, under this key; if the robot does not "
                "have the camera and the policy was trained without, state it as masked in the embodiment.",
            )
        else:
            yield Finding(
                "note",
                f"camera {camera.name}",
                f"{lacking}, which is optional: it is masked. Send it if the policy was trained with it.",
            )


def _check_pixels(sample: Mapping[str, Any]) -> Iterator[Finding]:
    for name, image in sample["image"].items():
        if sample["image_mask"][name] and image.min() == image.max():
            message = f"every pixel of the image is {image.min()}; expected a scene. Check the camera and its driver."
            yield Finding("warning", f"camera {name}", message)


def _state(policy: Policy, state: np.ndarray) -> tuple[StateCheck, ...]:
    stats, kind = policy.transforms.norm_stats["state"], policy.transforms.normalization["state"].kind
    low, high = (end[: len(state)] for end in stats.training_range(kind))
    rows = zip(state, low, high, excess(state, low, high), strict=True)
    names = policy.embodiment.state_names[: len(state)]
    return tuple(
        StateCheck(name, unit, float(value), float(least), float(most), float(far), bool(far > 0))
        for name, unit, (value, least, most, far) in zip(names, state_units(policy), rows, strict=True)
    )


def _check_state(policy: Policy, checks: Sequence[StateCheck]) -> Iterator[Finding]:
    stats, rule = policy.transforms.norm_stats["state"], policy.transforms.normalization["state"]
    constant = [i for i in constant_dims(stats, rule.kind) if i < len(checks)]
    normalized = normalize(np.array([check.value for check in checks]), stats, rule, what="state")
    for i in constant:
        check = checks[i]
        if abs(check.value - check.low) > 1e-6:  # below is rounding
            yield Finding(
                "problem",
                "state",
                f"{check.name} is {check.value:.6g}, but in the statistics it never varies from {check.low:.6g}: the "
                f"difference is divided by the eps alone, and the model reads {normalized[i]:.3g} instead of about -1 "
                "to 1. Give the statistics of this robot (norm_stats=, asset_id=), widen them in norm_stats.json, or "
                "send the constant.",
            )
    named = [
        (f"{check.name} {check.value:.4g} (from {check.low:.4g} to {check.high:.4g})", check.excess)
        for i, check in enumerate(checks)
        if i not in constant
    ]
    yield from _by_distance("state", named, _STATE_LEVELS)


def _by_distance(about: str, named: Sequence[tuple[str, float]], levels: _Levels) -> Iterator[Finding]:
    """A finding per level that names what is outside; `named` are descriptions and distances."""
    most = math.inf
    for level, least, message in levels:
        if outside := ", ".join(text for text, excess in named if least < excess <= most):
            yield Finding(level, about, message.format(outside))
        most = least


def _prompt(transforms: Transforms, sample: Mapping[str, Any]) -> PromptCheck:
    rule = transforms.norm_stats["state"], transforms.normalization["state"]
    normalized = normalize(sample["state"], *rule, what="state")
    text, most = transforms.prompt_text(sample["prompt"], normalized), transforms.max_token_len
    count = transforms.num_prompt_tokens(sample["prompt"], normalized)
    return PromptCheck(text, count, most, cut=most is not None and count > most)


def _check_prompt(transforms: Transforms, prompt: PromptCheck) -> Iterator[Finding]:
    if prompt.cut:
        loss = (
            "the instruction loses words at its end"
            if transforms.truncation == "instruction"
            else "the end is cut, and with it the state or the ending"
        )
        yield Finding(
            "problem",
            "prompt",
            f"the prompt has {prompt.num_tokens} tokens, and the policy reads {prompt.max_token_len} (max_token_len): "
            f"{loss}. Shorten the instruction.",
        )


def _run(
    policy: Policy,
    transforms: Transforms,
    sample: Mapping[str, Any],
    sample_variant: Sample,
    other_instruction: str | None,
    checks: ObservationCheck,
    findings: list[Finding],
) -> ObservationCheck:
    """Predict actions, and change one input after the other."""
    chunks = sample_variant(transforms.forward(sample))  # [K, H, a]
    if not np.isfinite(chunks).all():
        share = 1 - np.isfinite(chunks).mean()
        message = f"{share:.0%} of the predicted numbers are NaN or infinite; expected none. Do not run this policy."
        findings.append(Finding("problem", "actions", message))
        return checks
    actions = _actions(policy, transforms, chunks, sample["state"])
    named = [
        (f"{a.name} from {a.min:.4g} to {a.max:.4g} (training data: {a.low:.4g} to {a.high:.4g})", a.excess)
        for a in actions
    ]
    found = tuple(sensitivities(policy, transforms, sample, chunks, sample_variant, other_instruction))
    findings += [*_by_distance("actions", named, _ACTION_LEVELS), *check_sensitivities(policy, found)]
    return dataclasses.replace(checks, actions=actions, spread=spread_of(chunks), sensitivity=found)


def _actions(policy: Policy, transforms: Transforms, chunks: np.ndarray, state: np.ndarray) -> tuple[ActionCheck, ...]:
    """The chunks [K, H, a] compared with the statistics: distances in the model's units, values in the robot's."""
    robot = policy.embodiment
    dims = robot.action_size
    stats, kind = transforms.norm_stats["actions"], transforms.normalization["actions"].kind
    low, high = (end[:dims] for end in stats.training_range(kind))
    predicted = np.stack([transforms.inverse(chunk, action_size=dims) for chunk in chunks])  # [K, H, a]
    beyond = excess(predicted, low, high).reshape(-1, dims)
    in_robots = np.concatenate([robot.from_model(chunk, state) for chunk in predicted])  # [K·H, a]
    ends = np.sort(robot.from_model(np.stack([low, high]), state), axis=0)  # a conversion may turn a joint around
    # In a dimension that never varies, the range is the eps: nothing that a robot could notice.
    farthest = np.where(high - low > 0, beyond.max(axis=0), 0.0)
    columns = in_robots.min(axis=0), in_robots.max(axis=0), *ends, (beyond > 0).mean(axis=0), farthest
    return tuple(
        ActionCheck(action.name, action.unit, action.kind, *map(float, numbers))
        for action, *numbers in zip(robot.actions, *columns, strict=True)
    )
