"""Diagnosis of a policy: its weights, its statistics, and its behaviour on one observation."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from torchpi.errors import first_of
from torchpi.inspect.diagnosis import (
    RULES,
    ActionCheck,
    CameraCheck,
    Diagnosis,
    Finding,
    ObservationCheck,
    PromptCheck,
    StateCheck,
    describe,
    finding,
    state_dim,
    state_units,
)
from torchpi.inspect.sensitivity import check_sensitivities, sample_chunks, sensitivities, spread_of
from torchpi.inspect.statistics import check_statistics, excess
from torchpi.policy import Policy
from torchpi.randomness import generator_at
from torchpi.robots.commands import control_gaps
from torchpi.robots.keys import flatten
from torchpi.transforms.normalize import constant_dims, normalize

_LEVELS = ("problem", "warning", "note")

Sampler = Callable[[Mapping[str, Any]], np.ndarray]
"""Samples chunks [K, H, a] from model inputs: normalized, without padding, with the same noise in each call."""


def diagnose(
    policy: Policy,
    observation: Mapping[str, Any] | None = None,
    *,
    num_seeds: int = 8,
    num_steps: int | None = None,
    seed: int = 0,
    other_instruction: str | None = None,
    dataset: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Examine a policy without changing it.

    Args:
        observation: the robot's observation, nested, or flat with '.' between the keys; without one, only the policy
            itself is examined.
        num_seeds: number of noise samples; each gives one chunk.
        num_steps: number of Euler steps; by default the policy's.
        seed: random seed for the noise.
        other_instruction: instruction that replaces the observation's to measure its effect; by default another one
            that the policy was trained with, or a made-up one.
        dataset: dataset of the robot to compare with the policy's statistics and units, as arguments of
            `LeRobotDataset`.

    Returns:
        Description of the policy, findings, and checks of the observation. An observation that the policy cannot read
        is reported as a finding, not raised as an error.
    """

    def sample(inputs: Mapping[str, Any]) -> np.ndarray:
        shape = (num_seeds, *policy.model.config.chunk_shape)
        noise = generator_at(seed, "doctor").standard_normal(shape).astype(np.float32)
        chunks = sample_chunks(policy, inputs, noise, num_steps=num_steps or policy.num_steps)
        return chunks[..., : policy.embodiment.action_size]

    weight_findings = _check_weights(policy)
    findings, checks = [*weight_findings, *check_statistics(policy)], None
    if policy.transforms.untrained_actions:
        findings.append(finding("untrained_actions", "actions", names=first_of(policy.transforms.untrained_actions, 5)))
    gaps = control_gaps(policy.embodiment, policy.model.config.action_horizon)
    findings += [finding("control_gap", "robot", gap=gap) for gap in gaps]
    if dataset is not None:
        findings += _check_dataset(policy, dataset)
    if observation is not None:
        examination = _Examination(policy, observation, other_instruction)
        findings += examination.run(None if weight_findings else sample)
        checks = examination.checks
    findings.sort(key=lambda finding: _LEVELS.index(finding.level))
    return Diagnosis(describe(policy), tuple(findings), checks)


def _check_dataset(policy: Policy, dataset_args: Mapping[str, Any]) -> Iterator[Finding]:
    from torchpi.data import LeRobotDataset
    from torchpi.data.fit import stats_problems, unit_problems

    horizon, robot = policy.model.config.require("action_horizon"), policy.embodiment
    dataset = LeRobotDataset(action_horizon=horizon, embodiment=robot, columns=(), cameras=(), **dataset_args)
    problems = list(unit_problems(dataset, robot))
    try:
        problems += stats_problems(dataset, robot, policy.transforms)
    except ValueError as error:
        yield finding("dataset", "dataset", error=error)
    yield from (finding("dataset_warning", "dataset", warning=problem) for problem in problems)


def _check_weights(policy: Policy) -> list[Finding]:
    names = [name for name, weight in policy.model.named_parameters() if not torch.isfinite(weight.float()).all()]
    return [finding("weights_not_finite", "weights", names=first_of(names, 5))] if names else []


class _Examination:
    """Examination of one observation: yields findings, and fills `checks` as far as the policy can read it."""

    def __init__(self, policy: Policy, observation: Mapping[str, Any], other_instruction: str | None) -> None:
        self.policy, self.observation, self.other_instruction = policy, observation, other_instruction
        # Copied, because embodiment and transforms give some warnings only once; later users must still get them.
        self.robot, self.transforms = dataclasses.replace(policy.embodiment), dataclasses.replace(policy.transforms)
        values = flatten(observation)
        cameras = (
            CameraCheck(str(c.name), c.key, c.presence, c.key is not None and values.get(c.key) is not None)
            for c in policy.embodiment.read_cameras
        )
        self.checks = ObservationCheck(tuple(cameras))

    def run(self, sampler: Sampler | None) -> Iterator[Finding]:
        """Yield findings in the order of the computation; without a sampler, no actions are predicted."""
        camera_findings = list(self.check_cameras())
        yield from camera_findings
        dim, prompt = state_dim(self.policy), self.policy.default_prompt
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                sample = self.robot.to_model(self.observation, default_prompt=prompt, state_dim=dim)
        except (KeyError, ValueError) as error:
            if not any(finding.level == "problem" for finding in camera_findings):
                yield finding("observation", "observation", error=error.args[0])
            return
        yield from (finding("observation_warning", "observation", warning=warning.message) for warning in caught)
        yield from self.check_pixels(sample)
        if len(sample["state"]):
            yield from self.check_state(sample["state"])
        yield from self.check_prompt(sample)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # reported above, in more detail
                inputs = self.transforms.forward(sample)
                findings = [] if sampler is None else list(self.check_actions(sample, inputs, sampler))
        except ValueError as error:
            findings = [finding("observation", "observation", error=error)]
        yield from findings

    def check_cameras(self) -> Iterator[Finding]:
        for camera in self.checks.cameras:
            if not camera.found and camera.presence != "masked":
                rule = "camera_required" if camera.presence == "required" else "camera_optional"
                yield finding(rule, f"camera {camera.name}", key=camera.key, robot=self.robot.name)

    def check_pixels(self, sample: Mapping[str, Any]) -> Iterator[Finding]:
        for name, image in sample["image"].items():
            if sample["image_mask"][name] and image.min() == image.max():
                yield finding("image_of_one_color", f"camera {name}", pixel=image.min())

    def check_state(self, state: np.ndarray) -> Iterator[Finding]:
        stats, rule = self.transforms.norm_stats["state"], self.transforms.normalization["state"]
        low, high = (bound[: len(state)] for bound in stats.training_range(rule.kind))
        columns = self.robot.state_names[: len(state)], state_units(self.policy), state, low, high
        checks = self.checks.state = tuple(
            StateCheck(name, unit, float(value), float(lower), float(upper), float(distance), bool(distance > 0))
            for name, unit, value, lower, upper, distance in zip(*columns, excess(state, low, high), strict=True)
        )
        self.checks.state_outside = sum(check.outside for check in checks) / len(state)
        constant = [i for i in constant_dims(stats, rule.kind) if i < len(state)]
        normalized = normalize(state.astype(np.float64), stats, rule, what="state")
        for i in constant:
            name, value, expected = checks[i].name, checks[i].value, checks[i].low
            if abs(value - expected) > 1e-6:  # larger than rounding
                values = {"name": name, "value": value, "constant": expected, "normalized": normalized[i]}
                yield finding("state_not_constant", "state", **values)
        distances_by_text = {
            f"{check.name} {check.value:.4g} (from {check.low:.4g} to {check.high:.4g})": check.excess
            for i, check in enumerate(checks)
            if i not in constant
        }
        yield from _distance_findings("state", distances_by_text)

    def check_prompt(self, sample: Mapping[str, Any]) -> Iterator[Finding]:
        stats, rule = self.transforms.norm_stats["state"], self.transforms.normalization["state"]
        inputs = sample["prompt"], normalize(sample["state"], stats, rule, what="state")
        count, limit = self.transforms.num_prompt_tokens(*inputs), self.transforms.max_token_len
        is_cut = limit is not None and count > limit
        self.checks.prompt = PromptCheck(self.transforms.prompt_text(*inputs), count, limit, is_cut)
        if is_cut:
            rule_name = "instruction_cut" if self.transforms.truncation == "instruction" else "prompt_cut"
            yield finding(rule_name, "prompt", count=count, limit=limit)

    def check_actions(
        self, sample: Mapping[str, Any], inputs: Mapping[str, Any], sampler: Sampler
    ) -> Iterator[Finding]:
        """Predict actions, then change one input after another."""
        chunks = sampler(inputs)  # [K, H, a]
        is_finite = np.isfinite(chunks)
        if not is_finite.all():
            yield finding("actions_not_finite", "actions", fraction=1 - is_finite.mean())
            return
        actions = self._compare_actions(chunks, sample["state"])
        self.checks.sensitivity = tuple(
            sensitivities(self.policy, self.transforms, sample, chunks, sampler, self.other_instruction)
        )
        self.checks.actions, self.checks.spread = actions, spread_of(chunks)
        distances_by_text = {
            f"{a.name} from {a.min:.4g} to {a.max:.4g} (training data: {a.low:.4g} to {a.high:.4g})": a.excess
            for a in actions
        }
        yield from _distance_findings("actions", distances_by_text)
        yield from check_sensitivities(self.policy, self.checks.sensitivity)

    def _compare_actions(self, chunks: np.ndarray, state: np.ndarray) -> tuple[ActionCheck, ...]:
        """Compare chunks [K, H, a] with the statistics: distances in the model's units, values in the robot's."""
        robot, transforms, dims = self.policy.embodiment, self.transforms, self.robot.action_size
        kind = transforms.normalization["actions"].kind
        low, high = (bound[:dims] for bound in transforms.norm_stats["actions"].training_range(kind))
        predicted = np.stack([transforms.inverse(chunk, action_size=dims) for chunk in chunks])  # [K, H, a]
        distances = excess(predicted, low, high).reshape(-1, dims)
        robot_actions = np.concatenate([robot.from_model(chunk, state) for chunk in predicted])  # [K·H, a]
        bounds = np.sort(robot.from_model(np.stack([low, high]), state), axis=0)  # a conversion may flip a joint's sign
        # A dimension that never varies has a range of eps only; a deviation from it is too small to matter.
        largest = np.where(high - low > 0, distances.max(axis=0), 0.0)
        columns = robot_actions.min(axis=0), robot_actions.max(axis=0), *bounds, (distances > 0).mean(axis=0), largest
        return tuple(
            ActionCheck(action.name, action.unit, action.kind, *map(float, numbers))
            for action, *numbers in zip(robot.actions, *columns, strict=True)
        )


def _distance_findings(about: str, distances: Mapping[str, float]) -> Iterator[Finding]:
    """One finding per level for values outside the range; `distances` maps descriptions to distances."""
    upper = math.inf
    for name, rule in RULES.items():  # the largest threshold comes first
        if rule.beyond is not None and name.startswith(about):
            if outside := ", ".join(text for text, distance in distances.items() if rule.beyond < distance <= upper):
                yield finding(name, about, names=outside)
            upper = rule.beyond
