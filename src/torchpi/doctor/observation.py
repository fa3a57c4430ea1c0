"""One observation on its way through a policy: what does not fit, and what the policy makes of it."""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from torchpi.doctor.description import state_dim, state_units
from torchpi.doctor.result import ActionCheck, CameraCheck, Finding, Level, ObservationCheck, PromptCheck, StateCheck
from torchpi.doctor.sensitivity import check_sensitivities, sample_chunks, sensitivities, spread_of
from torchpi.doctor.statistics import excess
from torchpi.policy import Policy
from torchpi.randomness import generator_at
from torchpi.robots.keys import flatten
from torchpi.transforms.normalize import constant_dims, normalize
from torchpi.transforms.pipeline import Transforms
from torchpi.transforms.prompt import clean_text, pi05_prompt_text, tokenize_prompt

# In widths of the range that holds 98 % of the training data. 2 % of the data lie outside themselves; up to a tenth of
# the width is no news.
_NEAR = 0.1
# A normal distribution's range is 4.7 deviations wide, so half a width beyond it is 4.7 deviations from the mean: a
# state that the training data practically never had.
_FAR_STATE = 0.5
# Actions have longer tails than states, because fast motions are rare: a whole width.
_FAR_ACTION = 1.0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How actions are predicted."""

    num_seeds: int = 8
    num_steps: int = 10
    seed: int = 0
    other_instruction: str | None = None
    """What the instruction is replaced by; None: another one that the policy was trained with, or a made-up one."""


def check_observation(
    policy: Policy, observation: Mapping[str, Any], sampling: Sampling, *, run: bool
) -> tuple[ObservationCheck, list[Finding]]:
    """Everything that one observation shows, as far as the policy can read it.

    Args:
        observation: the robot's own keys, nested, or flat with '.' between them.
        run: whether the model can be run.
    """
    cameras = _cameras(policy, observation)
    checks, findings = ObservationCheck(cameras), list(_check_cameras(policy, cameras))
    # Of their own, so that what they warn of once is still told to the one who uses the policy afterwards.
    robot, transforms = dataclasses.replace(policy.embodiment), dataclasses.replace(policy.transforms)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample = robot.to_model(observation, default_prompt=policy.default_prompt, state_dim=state_dim(policy))
    except (KeyError, ValueError) as error:
        if not any(finding.level == "problem" for finding in findings):
            findings.append(Finding("problem", "observation", str(error.args[0])))
        return checks, findings
    findings += [Finding("warning", "observation", str(warning.message)) for warning in caught]
    findings += _check_pixels(sample)
    state = _state(policy, sample["state"])
    findings += _check_state(policy, state)
    prompt = _prompt(transforms, sample)
    findings += _check_prompt(transforms, prompt)
    checks = dataclasses.replace(checks, state=state, prompt=prompt)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said above, in more detail
            if run:
                return _run(policy, transforms, sample, sampling, checks, findings)
            transforms.forward(sample)
    except ValueError as error:
        findings.append(Finding("problem", "observation", str(error)))
    return checks, findings


# ---- what the robot sent ----


def _cameras(policy: Policy, observation: Mapping[str, Any]) -> tuple[CameraCheck, ...]:
    return tuple(
        CameraCheck(str(c.name), c.key, c.presence, c.key is not None and flatten(observation).get(c.key) is not None)
        for c in policy.embodiment.read_cameras
    )


def _check_cameras(policy: Policy, cameras: tuple[CameraCheck, ...]) -> Iterator[Finding]:
    for camera in cameras:
        if camera.found or camera.presence == "masked":
            continue
        what = f"the observation has no image {camera.key}"
        if camera.presence == "required":
            yield Finding(
                "problem",
                f"camera {camera.name}",
                f"{what}, which {policy.embodiment.name} requires. Send it, under this key; if the robot does not have "
                "the camera and the policy was trained without, state it as masked in the embodiment.",
            )
        else:
            yield Finding(
                "note",
                f"camera {camera.name}",
                f"{what}, which is optional: it is masked. Send it if the policy was trained with it.",
            )


def _check_pixels(sample: Mapping[str, Any]) -> Iterator[Finding]:
    for name, image in sample["image"].items():
        if sample["image_mask"][name] and image.min() == image.max():
            yield Finding(
                "warning",
                f"camera {name}",
                f"every pixel of the image is {image.min()}; expected a picture. Check the camera and its driver.",
            )


def _state(policy: Policy, state: np.ndarray) -> tuple[StateCheck, ...]:
    transforms = policy.transforms
    stats, kind = transforms.norm_stats["state"], transforms.normalization["state"].kind
    low, high = (end[: len(state)] for end in stats.training_range(kind))
    rows = zip(state, low, high, excess(state, low, high), strict=True)
    names = policy.embodiment.state_names[: len(state)]
    return tuple(
        StateCheck(name, unit, *(float(number) for number in row))
        for name, unit, row in zip(names, state_units(policy), rows, strict=True)
    )


def _check_state(policy: Policy, checks: tuple[StateCheck, ...]) -> Iterator[Finding]:
    stats, rule = policy.transforms.norm_stats["state"], policy.transforms.normalization["state"]
    constant = [i for i in constant_dims(stats, rule.kind) if i < len(checks)]
    seen = normalize(np.array([check.value for check in checks]), stats, rule, what="state")
    for i in constant:
        check = checks[i]
        # What the eps hides is rounding.
        if abs(check.value - check.low) > 1e-6:
            yield Finding(
                "problem",
                "state",
                f"{check.name} is {check.value:.6g}, but in the statistics it never varies from {check.low:.6g}: the "
                f"difference is divided by the eps alone, and the model reads {seen[i]:.3g} instead of about -1 to 1. "
                "Give the statistics of this robot (norm_stats=, asset_id=), widen them in norm_stats.json, or send "
                "the constant.",
            )
    for level, least, most in _STATE_LEVELS:
        named = [
            f"{check.name} {check.value:.4g} (from {check.low:.4g} to {check.high:.4g})"
            for i, check in enumerate(checks)
            if i not in constant and least < check.excess <= most
        ]
        if named:
            yield Finding(level, "state", f"{_HOW_FAR[level]} {', '.join(named)}.{_STATE_ADVICE[level]}")


_STATE_LEVELS: tuple[tuple[Level, float, float], ...] = (
    ("problem", _FAR_STATE, math.inf),
    ("warning", _NEAR, _FAR_STATE),
    ("note", 0.0, _NEAR),
)
_HOW_FAR = {
    "problem": "far outside of the training data's range, by more than half of its width:",
    "warning": "outside of the training data's range, by more than a tenth of its width:",
    "note": "just outside of the training data's range, as 1 % of the data are on either side:",
}
_STATE_ADVICE = {
    "problem": " Check units, order and calibration of the state, and whether the statistics belong to this robot "
    "(norm_stats=, asset_id=).",
    "warning": " Check the calibration, and begin where the demonstrations begin.",
    "note": "",
}


# ---- what the model reads ----


def _prompt(transforms: Transforms, sample: Mapping[str, Any]) -> PromptCheck:
    state = transforms.norm_stats["state"], transforms.normalization["state"]
    normalized = normalize(sample["state"], *state, what="state")
    ids, _ = tokenize_prompt(
        transforms.tokenizer,
        sample["prompt"],
        normalized,
        discrete_state_input=transforms.discrete_state_input,
        max_token_len=None,
        prompt_format=transforms.prompt_format,
    )
    return PromptCheck(prompt_text(transforms, sample["prompt"], normalized), len(ids), transforms.max_token_len)


def prompt_text(transforms: Transforms, instruction: str, normalized_state: np.ndarray) -> str:
    """The whole text that a policy's prompt is the tokens of."""
    if transforms.discrete_state_input:
        return pi05_prompt_text(instruction, normalized_state)
    if transforms.prompt_format == "lerobot":
        return instruction if instruction.endswith("\n") else f"{instruction}\n"
    return f"{clean_text(instruction)}\n"


def _check_prompt(transforms: Transforms, prompt: PromptCheck) -> Iterator[Finding]:
    if prompt.cut:
        how = (
            "the instruction loses words at its end"
            if transforms.truncation == "instruction"
            else "the end is cut, and with it the state or the ending"
        )
        yield Finding(
            "problem",
            "prompt",
            f"the prompt has {prompt.num_tokens} tokens, and the policy reads {prompt.max_token_len} (max_token_len): "
            f"{how}. Shorten the instruction.",
        )


# ---- what the policy makes of it ----


def _run(
    policy: Policy,
    transforms: Transforms,
    sample: Mapping[str, Any],
    sampling: Sampling,
    checks: ObservationCheck,
    findings: list[Finding],
) -> tuple[ObservationCheck, list[Finding]]:
    config, dims = policy.model.config, policy.embodiment.action_size
    shape = (sampling.num_seeds, config.require("action_horizon"), config.action_dim)
    noise = generator_at(sampling.seed, "doctor").standard_normal(shape).astype(np.float32)

    def sample_variant(inputs: Mapping[str, Any]) -> np.ndarray:
        return sample_chunks(policy, inputs, noise, num_steps=sampling.num_steps)[..., :dims]

    chunks = sample_variant(transforms.forward(sample))  # [K, H, a]
    if not np.isfinite(chunks).all():
        share = 1 - np.isfinite(chunks).mean()
        message = f"{share:.0%} of the predicted numbers are NaN or infinite; expected none. Do not run this policy."
        return checks, [*findings, Finding("problem", "actions", message)]
    actions = _actions(policy, transforms, chunks, sample["state"])
    found = tuple(
        sensitivities(policy, transforms, sample, chunks, sample_variant, other_instruction=sampling.other_instruction)
    )
    checks = dataclasses.replace(checks, actions=actions, spread=spread_of(chunks), sensitivity=found)
    by_input = {entry.input: entry for entry in found}
    return checks, [*findings, *_check_actions(actions), *check_sensitivities(policy, by_input)]


def _actions(policy: Policy, transforms: Transforms, chunks: np.ndarray, state: np.ndarray) -> tuple[ActionCheck, ...]:
    """The chunks [K, H, a] against the range of the statistics: distances as the model predicts, shown as the robot."""
    robot = policy.embodiment
    dims = robot.action_size
    stats, kind = transforms.norm_stats["actions"], transforms.normalization["actions"].kind
    low, high = (end[:dims] for end in stats.training_range(kind))
    predicted = np.stack([transforms.inverse(chunk, action_size=dims) for chunk in chunks])  # [K, H, a]
    beyond = excess(predicted, low, high).reshape(-1, dims)
    in_robots = np.concatenate([robot.from_model(chunk, state) for chunk in predicted])  # [K·H, a]
    ends = np.sort(robot.from_model(np.stack([low, high]), state), axis=0)  # a conversion may turn a joint around
    return tuple(
        ActionCheck(action.name, action.unit, action.kind, *(float(number) for number in numbers))
        for action, *numbers in zip(
            robot.actions,
            in_robots.min(axis=0),
            in_robots.max(axis=0),
            *ends,
            (beyond > 0).mean(axis=0),
            # In a dimension that never varies, the range is the eps: nothing that a robot could notice.
            np.where(high - low > 0, beyond.max(axis=0), 0.0),
            strict=True,
        )
    )


def _check_actions(checks: tuple[ActionCheck, ...]) -> Iterator[Finding]:
    levels: tuple[tuple[Level, float, float], ...]
    levels = ("problem", _FAR_ACTION, math.inf), ("warning", _NEAR, _FAR_ACTION)
    for level, least, most in levels:
        named = [
            f"{check.name} from {check.min:.4g} to {check.max:.4g} (training data: {check.low:.4g} to {check.high:.4g})"
            for check in checks
            if least < check.excess <= most
        ]
        if named:
            far = "far outside of" if level == "problem" else "outside of"
            width = "its whole width" if level == "problem" else "a tenth of its width"
            yield Finding(
                level,
                "actions",
                f"predicted {far} the training data's range, by more than {width}: {', '.join(named)}. Check the "
                "statistics, and whether this observation is like the training data; limit the robot before it moves.",
            )
