"""The first stage in which two policies differ, on one observation and the same noise."""

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
"""Relative to a stage's largest value; float32 keeps some 1e-6 through all layers."""

# Fields of an embodiment that identify it and compute nothing.
_NAMES = ("name", "asset_id", "metadata")

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
"""The compared stages, and their names in a comparison."""


@dataclasses.dataclass(frozen=True)
class ComparedStage:
    """One stage of both policies."""

    name: str
    differs: bool
    message: str = ""
    """The difference, if it is none of numbers."""
    shape: tuple[int, ...] | None = None
    """In both; None: a text, or the shapes differ."""
    max_abs: float | None = None
    """Largest absolute difference; None: not numbers of one shape."""
    scale: float | None = None
    """Largest absolute value in either."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two policies, called A and B."""

    tolerance: float
    settings: tuple[str, ...]
    """Differences of their configurations, one line each."""
    stages: tuple[ComparedStage, ...]
    """In the order of the computation."""
    stopped: tuple[str, ...] = ()
    """Errors that ended the computation of one of them."""

    @property
    def first_difference(self) -> str | None:
        """The name of the first stage that differs."""
        return next((stage.name for stage in self.stages if stage.differs), None)

    @property
    def same(self) -> bool:
        """True if settings and stages agree."""
        return not self.settings and not self.stopped and self.first_difference is None

    @property
    def status(self) -> int:
        """0 if they agree, else 1."""
        return int(not self.same)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; numbers that are not finite are None."""
        found = {"same": self.same, "first_difference": self.first_difference, "status": self.status}
        return dict(without_nan(found | dataclasses.asdict(self)))


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

    Padding, of prompt, state and absent cameras, is left out: it changes no result. If horizon or action_dim differ,
    each policy gets its part of the same noise.

    Args:
        observation: of the robot, nested, or flat with '.' between the keys.
        tolerance: a stage differs if its largest difference is above this, times its largest value.
        num_steps: Euler steps.
        seed: of the noise.

    Raises:
        ValueError: neither can read the observation; neither states its action_horizon; a tolerance below 0.
    """
    if not tolerance >= 0:
        raise UsageError(f"tolerance must not be negative, got {tolerance}.")
    configs = a.model.config, b.model.config
    stated = [config.action_horizon for config in configs if config.action_horizon is not None]
    horizons = [config.action_horizon or (stated or [configs[0].require("action_horizon")])[0] for config in configs]
    shape = max(horizons), max(config.action_dim for config in configs)
    noise = generator_at(seed, "compare").standard_normal(shape).astype(np.float32)
    (ours, our_end), (theirs, their_end) = (
        _stages_of(policy, observation, noise[:horizon, : policy.model.config.action_dim], num_steps)
        for policy, horizon in zip((a, b), horizons, strict=True)
    )
    if not ours and not theirs:
        raise UsageError(f"Neither policy can read the observation. A: {our_end} B: {their_end}")
    names = list(ours)
    for before, name in itertools.pairwise(["", *theirs]):  # each behind the one that it follows in its own order
        if name not in ours:
            names.insert(names.index(before) + 1 if before else 0, name)
    return Comparison(
        tolerance,
        tuple(_differences(_settings(a), _settings(b))),
        tuple(_compare(name, ours.get(name), theirs.get(name), tolerance) for name in names),
        tuple(f"{side} stopped: {end}" for side, end in (("A", our_end), ("B", their_end)) if end),
    )


def _stages_of(
    policy: Policy, observation: Mapping[str, Any], noise: Float32[np.ndarray, "H A"], num_steps: int
) -> tuple[dict[str, Any], str]:
    """The compared stages by name, without padding and batch axis; and the error that ended them, or ""."""
    found: dict[str, Any] = {}
    present: list[str] = []
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
            found[name] = value
    except (KeyError, ValueError) as error:
        return found, str(error.args[0])
    return found, ""


def _name_of(stage: Stage) -> str | None:
    where = f"{stage.step} {stage.name}"
    matches = ((re.fullmatch(pattern, where), name) for pattern, name in _STAGES.items())
    return next((match.expand(name) for match, name in matches if match), None)


def _compare(name: str, one: Any, other: Any, tolerance: float) -> ComparedStage:
    """One stage; None: the policy did not reach it."""
    if one is None or other is None:
        return ComparedStage(name, True, f"only {'A' if other is None else 'B'} has it")
    if isinstance(one, str) or isinstance(other, str):
        return ComparedStage(name, one != other, "" if one == other else f"A {one!r}, B {other!r}")
    if one.shape != other.shape:
        shapes = f"shapes differ: A {format_shape(one.shape)}, B {format_shape(other.shape)}"
        return ComparedStage(name, True, shapes)
    a, b = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity from infinity
        largest = float(abs(a - b).max(initial=0))  # a state may have no dimensions
    scale = float(max(abs(a).max(initial=0), abs(b).max(initial=0)))
    broken = [side for side, values in (("A", a), ("B", b)) if not np.isfinite(values).all()]
    message = f"NaN or infinity in {listed(broken)}" if broken else ""
    return ComparedStage(name, bool(broken) or largest > tolerance * scale, message, one.shape, largest, scale)


def _settings(policy: Policy) -> dict[str, Any]:
    transforms = policy.transforms
    return {
        "model": policy.model.config.to_dict(),
        "dtype": str(policy.model.compute_dtype).removeprefix("torch."),
        "quantization": None if (found := quantization_of(policy.model)) is None else found.kind,
        "embodiment": {name: value for name, value in policy.embodiment.to_dict().items() if name not in _NAMES},
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


def _differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """A line for each leaf in which two trees differ."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        one, other = ({str(i): part for i, part in enumerate(side)} for side in (one, other))
    if isinstance(one, dict) and isinstance(other, dict) and set(one) == set(other):
        for name in one:
            yield from _differences(one[name], other[name], f"{where}.{name}" if where else name)
    elif one != other:
        yield f"{where}: {_short(one)} in A, {_short(other)} in B"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{len(value)} entries" if isinstance(value, list) else f"{text[:57]}…"
