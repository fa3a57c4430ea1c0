"""The diagnosis of a policy: its weights, its statistics, and one observation in it."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
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

Sample = Callable[[Mapping[str, Any]], np.ndarray]
"""Chunks [K, H, a] of a policy's inputs, normalized, without padding; the same noises in each call."""


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
    """Examine a policy; nothing about it is changed.

    Args:
        observation: of its robot, nested, or flat with '.' between the keys; None: only what needs no observation.
        num_seeds: noises, each with its own chunk.
        num_steps: Euler steps; by default the policy's.
        seed: of the noises.
        other_instruction: replaces the instruction; by default another one that the policy was trained with, or a
            made-up one.
        dataset: of the robot, compared with its statistics and units: arguments of `LeRobotDataset`.

    Returns:
        A description of the policy, findings, and what the observation shows. An observation that the policy cannot
        read is a finding, not an error.
    """

    def sample(inputs: Mapping[str, Any]) -> np.ndarray:
        shape = (num_seeds, *policy.model.config.chunk_shape)
        noise = generator_at(seed, "doctor").standard_normal(shape).astype(np.float32)
        chunks = sample_chunks(policy, inputs, noise, num_steps=num_steps or policy.num_steps)
        return chunks[..., : policy.embodiment.action_size]

    of_weights = list(_check_weights(policy))
    findings, checks = [*of_weights, *check_statistics(policy)], None
    if policy.transforms.untrained_actions:
        findings.append(finding("untrained_actions", "actions", names=first_of(policy.transforms.untrained_actions, 5)))
    gaps = control_gaps(policy.embodiment, policy.model.config.action_horizon)
    findings += [finding("control_gap", "robot", gap=gap) for gap in gaps]
    if dataset is not None:
        findings += _check_dataset(policy, dataset)
    if observation is not None:
        examination = _Examination(policy, observation, other_instruction)
        findings += examination.run(None if of_weights else sample)
        checks = examination.checks
    findings.sort(key=lambda found: _LEVELS.index(found.level))
    return Diagnosis(describe(policy), tuple(findings), checks)


def _check_dataset(policy: Policy, reading: Mapping[str, Any]) -> Iterator[Finding]:
    from torchpi.data import LeRobotDataset
    from torchpi.data.fit import stats_problems, unit_problems

    horizon, robot = policy.model.config.require("action_horizon"), policy.embodiment
    data = LeRobotDataset(action_horizon=horizon, embodiment=robot, columns=(), cameras=(), **reading)
    yield from (finding("dataset_warning", "dataset", warning=problem) for problem in unit_problems(data, robot))
    try:
        problems = stats_problems(data, robot, policy.transforms)
    except ValueError as error:
        yield finding("dataset", "dataset", error=error)
    else:
        yield from (finding("dataset_warning", "dataset", warning=problem) for problem in problems)


def _check_weights(policy: Policy) -> Iterator[Finding]:
    broken = [name for name, weight in policy.model.named_parameters() if not torch.isfinite(weight.float()).all()]
    if broken:
        yield finding("weights_not_finite", "weights", names=first_of(broken, 5))


class _Examination:
    """One observation in a policy: its findings, and with them all that it shows as far as the policy can read it."""

    def __init__(self, policy: Policy, observation: Mapping[str, Any], other_instruction: str | None) -> None:
        self.policy, self.observation, self.other_instruction = policy, observation, other_instruction
        # Copies, so that the policy still warns of what it warns of once when it is used afterwards.
        self.robot, self.transforms = dataclasses.replace(policy.embodiment), dataclasses.replace(policy.transforms)
        sent = flatten(observation)
        cameras = (
            CameraCheck(str(c.name), c.key, c.presence, c.key is not None and sent.get(c.key) is not None)
            for c in policy.embodiment.read_cameras
        )
        self.checks = ObservationCheck(tuple(cameras))

    def run(self, sample_variant: Sample | None) -> Iterator[Finding]:
        """The findings in the order of the computation; without `sample_variant` nothing is predicted."""
        of_cameras = list(self.cameras())
        yield from of_cameras
        dim, prompt = state_dim(self.policy), self.policy.default_prompt
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                sample = self.robot.to_model(self.observation, default_prompt=prompt, state_dim=dim)
        except (KeyError, ValueError) as error:
            if not any(found.level == "problem" for found in of_cameras):
                yield finding("observation", "observation", error=error.args[0])
            return
        yield from (finding("observation_warning", "observation", warning=warning.message) for warning in caught)
        yield from self.pixels(sample)
        if len(sample["state"]):
            yield from self.state(sample["state"])
        yield from self.prompt(sample)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # found above, in more detail
                inputs = self.transforms.forward(sample)
                found = [] if sample_variant is None else list(self.predictions(sample, inputs, sample_variant))
        except ValueError as error:
            found = [finding("observation", "observation", error=error)]
        yield from found

    def cameras(self) -> Iterator[Finding]:
        for camera in self.checks.cameras:
            if not camera.found and camera.presence != "masked":
                rule = "camera_required" if camera.presence == "required" else "camera_optional"
                yield finding(rule, f"camera {camera.name}", key=camera.key, robot=self.robot.name)

    def pixels(self, sample: Mapping[str, Any]) -> Iterator[Finding]:
        for name, image in sample["image"].items():
            if sample["image_mask"][name] and image.min() == image.max():
                yield finding("image_of_one_color", f"camera {name}", pixel=image.min())

    def state(self, state: np.ndarray) -> Iterator[Finding]:
        stats, rule = self.transforms.norm_stats["state"], self.transforms.normalization["state"]
        low, high = (end[: len(state)] for end in stats.training_range(rule.kind))
        columns = self.robot.state_names[: len(state)], state_units(self.policy), state, low, high
        self.checks.state = tuple(
            StateCheck(name, unit, float(value), float(least), float(most), float(far), bool(far > 0))
            for name, unit, value, least, most, far in zip(*columns, excess(state, low, high), strict=True)
        )
        self.checks.state_outside = sum(check.outside for check in self.checks.state) / len(state)
        constant = [i for i in constant_dims(stats, rule.kind) if i < len(state)]
        normalized = normalize(state.astype(np.float64), stats, rule, what="state")
        for i in constant:
            check = self.checks.state[i]
            if abs(check.value - check.low) > 1e-6:  # below is rounding
                found = {"name": check.name, "value": check.value, "constant": check.low, "normalized": normalized[i]}
                yield finding("state_not_constant", "state", **found)
        named = (
            (f"{check.name} {check.value:.4g} (from {check.low:.4g} to {check.high:.4g})", check.excess)
            for i, check in enumerate(self.checks.state)
            if i not in constant
        )
        yield from _by_distance("state", named)

    def prompt(self, sample: Mapping[str, Any]) -> Iterator[Finding]:
        stats, rule = self.transforms.norm_stats["state"], self.transforms.normalization["state"]
        inputs = sample["prompt"], normalize(sample["state"], stats, rule, what="state")
        count, most = self.transforms.num_prompt_tokens(*inputs), self.transforms.max_token_len
        is_cut = most is not None and count > most
        self.checks.prompt = PromptCheck(self.transforms.prompt_text(*inputs), count, most, is_cut)
        if is_cut:
            is_instruction = self.transforms.truncation == "instruction"
            yield finding("instruction_cut" if is_instruction else "prompt_cut", "prompt", count=count, most=most)

    def predictions(
        self, sample: Mapping[str, Any], inputs: Mapping[str, Any], sample_variant: Sample
    ) -> Iterator[Finding]:
        """Predict actions, and change one input after the other."""
        chunks = sample_variant(inputs)  # [K, H, a]
        if not (finite := np.isfinite(chunks)).all():
            yield finding("actions_not_finite", "actions", share=1 - finite.mean())
            return
        actions = self._actions(chunks, sample["state"])
        found = sensitivities(self.policy, self.transforms, sample, chunks, sample_variant, self.other_instruction)
        self.checks.sensitivity = tuple(found)
        self.checks.actions, self.checks.spread = actions, spread_of(chunks)
        named = (
            (f"{a.name} from {a.min:.4g} to {a.max:.4g} (training data: {a.low:.4g} to {a.high:.4g})", a.excess)
            for a in actions
        )
        yield from _by_distance("actions", named)
        yield from check_sensitivities(self.policy, self.checks.sensitivity)

    def _actions(self, chunks: np.ndarray, state: np.ndarray) -> tuple[ActionCheck, ...]:
        """The chunks [K, H, a] compared with the statistics: distances in the model's units, values in the robot's."""
        robot, transforms, dims = self.policy.embodiment, self.transforms, self.robot.action_size
        kind = transforms.normalization["actions"].kind
        low, high = (end[:dims] for end in transforms.norm_stats["actions"].training_range(kind))
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


def _by_distance(about: str, named: Iterable[tuple[str, float]]) -> Iterator[Finding]:
    """A finding per level that names what is outside; `named` are descriptions and distances."""
    named, most = list(named), math.inf
    for name, rule in RULES.items():
        if rule.beyond is not None and name.startswith(about):
            if outside := ", ".join(text for text, excess in named if rule.beyond < excess <= most):
                yield finding(name, about, names=outside)
            most = rule.beyond
