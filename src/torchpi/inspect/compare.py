"""Stage-by-stage comparison of two policies on one observation and the same noise."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from torchpi.engine.quantize import quantization_of
from torchpi.errors import UsageError, listed
from torchpi.inspect.inputs import Shapes, inputs_of_policy
from torchpi.inspect.stages import Stage, forward_stages
from torchpi.policy import Policy
from torchpi.randomness import generator_at
from torchpi.ui.format import format_shape, without_nan

TOLERANCE = 1e-4
"""Relative to a stage's largest value. In float32, rounding through all layers adds up to about 1e-6."""

_LABELS = ("name", "asset_id", "metadata")
"""Fields of an embodiment that do not affect any computation."""

_STAGES = {
    r"0 cameras": "cameras",
    r"0 image/(.*)": r"image \1",
    r"0 embodiment/state": "state",
    r"0 normalized_state": "normalized state",
    r"0 prompt_text": "prompt text",
    r"0 token_ids": "token ids",
    r"2 image_tokens/(.*)": r"image tokens \1",
    r"inference prefix_tokens": "prefix tokens",
    r"inference cache/layer_(\d+)/k": r"cache layer \1 keys",
    r"inference cache/layer_(\d+)/v": r"cache layer \1 values",
    r"inference v_t/t=1": "v_t at t = 1",
    r"inference action_chunk": "action chunk, normalized",
    r"inference robot_actions": "actions, robot's units",
}
"""Compared stages: pattern of "step name", and name in a comparison."""


@dataclasses.dataclass(frozen=True)
class ComparedStage:
    """One stage of both policies."""

    name: str
    differs: bool
    message: str = ""
    """Description of a difference that is not numerical."""
    shape: tuple[int, ...] | None = None
    """Shape in both policies; None for a text, or if the shapes differ."""
    max_abs: float | None = None
    """Largest absolute difference; None if the values are not arrays of one shape."""
    scale: float | None = None
    """Largest absolute value in either policy."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Comparison of two policies, called A and B."""

    tolerance: float
    settings: tuple[str, ...]
    """Differences in their configurations, one line each."""
    stages: tuple[ComparedStage, ...]
    """Stages in the order of computation."""
    stopped: tuple[str, ...] = ()
    """Errors that ended the computation of a policy."""

    @property
    def first_difference(self) -> str | None:
        """Name of the first stage that differs."""
        return next((stage.name for stage in self.stages if stage.differs), None)

    @property
    def same(self) -> bool:
        """True if all settings and stages agree."""
        return not self.settings and not self.stopped and self.first_difference is None

    @property
    def status(self) -> int:
        """Exit status: 0 if the policies agree, else 1."""
        return int(not self.same)

    def to_dict(self) -> dict[str, Any]:
        """JSON document; non-finite numbers become None."""
        verdict = {"same": self.same, "first_difference": self.first_difference, "status": self.status}
        return dict(without_nan(verdict | dataclasses.asdict(self)))


def compare_policies(
    a: Policy,
    b: Policy,
    observation: Mapping[str, Any],
    *,
    tolerance: float = TOLERANCE,
    num_steps: int = 10,
    seed: int = 0,
) -> Comparison:
    """Compare the stages of two policies on one observation.

    Padding of the prompt and the state, and absent cameras, are not compared, because they affect no result. If the
    policies differ in horizon or action_dim, each gets its slice of the same noise.

    Args:
        observation: the robot's observation, nested, or flat with '.' between the keys.
        tolerance: a stage differs if its largest difference exceeds `tolerance` times its largest value.
        num_steps: number of Euler steps.
        seed: random seed for the noise.

    Raises:
        ValueError: neither policy can read the observation, neither states its action_horizon, or the tolerance is
            negative.
    """
    if not tolerance >= 0:
        raise UsageError(f"tolerance must not be negative, got {tolerance}.")
    config_a, config_b = a.model.config, b.model.config
    horizon_a = config_a.action_horizon or config_b.action_horizon or config_a.require("action_horizon")
    horizon_b = config_b.action_horizon or horizon_a
    shape = max(horizon_a, horizon_b), max(config_a.action_dim, config_b.action_dim)
    noise = generator_at(seed, "compare").standard_normal(shape).astype(np.float32)
    stages_a, error_a = _stages_of(a, observation, noise[:horizon_a, : config_a.action_dim], num_steps)
    stages_b, error_b = _stages_of(b, observation, noise[:horizon_b, : config_b.action_dim], num_steps)
    if not stages_a and not stages_b:
        raise UsageError(f"Neither policy can read the observation. A: {error_a} B: {error_b}")
    names = list(stages_a)
    for previous, name in itertools.pairwise(["", *stages_b]):  # insert stages of B alone after their predecessor
        if name not in stages_a:
            names.insert(names.index(previous) + 1 if previous else 0, name)
    return Comparison(
        tolerance,
        tuple(_differences(_settings(a), _settings(b))),
        tuple(_compare(name, stages_a.get(name), stages_b.get(name), tolerance) for name in names),
        tuple(f"{side} stopped: {error}" for side, error in (("A", error_a), ("B", error_b)) if error),
    )


def _stages_of(
    policy: Policy, observation: Mapping[str, Any], noise: Float32[np.ndarray, "H A"], num_steps: int
) -> tuple[dict[str, Any], str]:
    """Compared stages by name, without padding and batch dimension, and the error that ended the computation or ""."""
    stages: dict[str, Any] = {}
    present: list[str] = []  # cameras
    try:
        inputs = inputs_of_policy(policy, Shapes(batch=1), observation, noise=noise)
        for stage in forward_stages(inputs, training=False, num_steps=num_steps):
            name, value = _name_of(stage), stage.value
            if stage.name == "cameras":
                present = str(value).split(", ")
            elif stage.name == "prefix_mask" and isinstance(value, Tensor):
                valid = value[0]
            if name is None or (name.startswith("image") and stage.name.partition("/")[2] not in present):
                continue
            if isinstance(value, Tensor):
                value = value[0][valid] if name.startswith(("prefix", "cache")) else value[0]
                value = value.float().cpu().numpy()
            stages[name] = value
    except (KeyError, ValueError) as error:
        return stages, str(error.args[0])
    return stages, ""


def _name_of(stage: Stage) -> str | None:
    for pattern, name in _STAGES.items():
        if match := re.fullmatch(pattern, f"{stage.step} {stage.name}"):
            return match.expand(name)
    return None


def _compare(name: str, a: Any, b: Any, tolerance: float) -> ComparedStage:
    """Compare a stage's values in A and B; None if the policy did not reach it."""
    if a is None or b is None:
        return ComparedStage(name, True, f"only {'A' if b is None else 'B'} has it")
    if isinstance(a, str) or isinstance(b, str):
        return ComparedStage(name, a != b, "" if a == b else f"A {a!r}, B {b!r}")
    if a.shape != b.shape:
        return ComparedStage(name, True, f"shapes differ: A {format_shape(a.shape)}, B {format_shape(b.shape)}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity − infinity
        max_abs = float(abs(a - b).max(initial=0))  # a state may have no dimensions
    scale = float(max(abs(a).max(initial=0), abs(b).max(initial=0)))
    not_finite = [side for side, values in (("A", a), ("B", b)) if not np.isfinite(values).all()]
    message = f"NaN or infinity in {listed(not_finite)}" if not_finite else ""
    return ComparedStage(name, bool(not_finite) or max_abs > tolerance * scale, message, a.shape, max_abs, scale)


def _settings(policy: Policy) -> dict[str, Any]:
    transforms, quantization = policy.transforms, quantization_of(policy.model)
    return {
        "model": policy.model.config.to_dict(),
        "dtype": str(policy.model.compute_dtype).removeprefix("torch."),
        "quantization": quantization and quantization.kind,
        "embodiment": {name: value for name, value in policy.embodiment.to_dict().items() if name not in _LABELS},
        "normalization": {key: dataclasses.asdict(transforms.normalization[key]) for key in ("state", "actions")},
        "prompt": {
            "default": policy.default_prompt,
            "format": transforms.prompt_format,
            "truncation": transforms.truncation,
            "with state": transforms.discrete_state_input,
            "state_dim": transforms.prompt_state_dim,
        },
        "images": dataclasses.asdict(transforms.image_transform),
    }


def _differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """One line for each leaf in which two trees differ."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict) and set(a) == set(b):
        for key in a:
            yield from _differences(a[key], b[key], f"{path}.{key}" if path else str(key))
    elif a != b:
        yield f"{path}: {_short(a)} in A, {_short(b)} in B"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= 60:
        return text
    return f"{len(value)} entries" if isinstance(value, list) else f"{text[:57]}…"
