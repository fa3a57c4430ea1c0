"""Trace of a forward pass: name, shape and dtype of every stage, and the values shown on the trace page."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchpi.config import Pi0Config
from torchpi.inspect import nanopi
from torchpi.inspect.inputs import Shapes, inputs_of_config, inputs_of_policy, observation_of
from torchpi.inspect.stages import Stage, TraceInputs, forward_stages
from torchpi.inspect.steps import STEP_OF, formula_of
from torchpi.policy import Policy
from torchpi.ui.format import without_nan


class Stats(NamedTuple):
    """Statistics of a tensor; for booleans, the mean is the fraction of True."""

    min: float
    mean: float
    max: float
    std: float


@dataclasses.dataclass(frozen=True)
class TraceEntry:
    """One stage without its values."""

    step: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    view: str = "both"
    """"joint", "cached" or "both", see `Stage`."""
    phase: str = "both"
    """"training", "inference" or "both"."""
    formula: str = ""
    value: int | str | None = None
    """Value of a count or a text."""
    stats: Stats | None = None
    """Statistics of the values; None on the meta device."""

    def to_json(self) -> dict[str, Any]:
        """JSON document without empty fields."""
        stats = None if self.stats is None else without_nan(self.stats._asdict())
        entry: dict[str, Any] = vars(self) | {"shape": list(self.shape), "stats": stats}
        return {key: value for key, value in entry.items() if value not in (None, "")}


class Segment(NamedTuple):
    """Consecutive tokens of one kind."""

    label: str
    start: int
    stop: int
    group: int
    """Attention group; tokens attend to their own group and to earlier ones."""


class Agreement(NamedTuple):
    """Largest difference between two computations of a value, and the largest absolute value."""

    what: str
    max_abs: float
    scale: float


@dataclasses.dataclass(frozen=True)
class Values:
    """Values of the first sample of a trace."""

    images: Mapping[str, np.ndarray | None]
    """Camera images as the model reads them, uint8 [h, w, 3]; None if the camera is masked."""
    chunk: np.ndarray
    """x_t before the first Euler step and after each: [steps + 1, H, A]."""
    modulation: Mapping[str, np.ndarray]
    """Root mean square of "scale", "shift" and "gate" for each adaptive norm, at 41 times from 1 to 0: [norms, times].
    Empty for π₀, which has no adaptive norms."""
    agreement: list[Agreement]
    """Joint forward pass compared with `Pi0`."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """Trace of one forward pass."""

    inputs: TraceInputs
    entries: list[TraceEntry]
    segments: list[Segment]
    mask: np.ndarray
    """Joint attention mask of the first sample, bool [S+T, S+T]."""
    values: Values | None

    @property
    def dtype(self) -> str:
        """Dtype of the computation."""
        return str(self.inputs.model.embedding.dtype).removeprefix("torch.")

    @property
    def prefix_tokens(self) -> int:
        """Number of prefix tokens S."""
        return next(segment.start for segment in self.segments if segment.group > 0)

    @property
    def suffix_tokens(self) -> int:
        """Number of suffix tokens T."""
        return self.sequence_length - self.prefix_tokens

    @property
    def sequence_length(self) -> int:
        """Number of tokens S + T."""
        return self.segments[-1].stop

    @property
    def num_groups(self) -> int:
        """Number of attention groups."""
        return self.segments[-1].group + 1

    @property
    def cache_bytes(self) -> int:
        """Size of the KV cache of one observation, in bytes."""
        cache = [entry for entry in self.entries if entry.step == "inference" and entry.name.startswith("cache/")]
        return sum(math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize for entry in cache)

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters in each part of the model."""
        parts = {"vision": "SigLIP", "embedding": "token embedding", "backbone": "backbone", "expert": "action expert"}
        norms, projections = "the expert's adaptive norms", "action, state and time projections"
        counts = dict.fromkeys([*parts.values(), norms, projections], 0)
        for name, parameter in self.inputs.model.named_parameters():
            root = name.partition(".")[0]
            part = norms if root == "expert" and ".dense." in name else parts.get(root, projections)
            counts[part] += parameter.numel()
        return {part: count for part, count in counts.items() if count}

    def count(self, name: str) -> int:
        """Value of a count: layers, time_injections, time_inputs, prefills or euler_steps."""
        return next(int(entry.value or 0) for entry in self.entries if entry.name == name)


def trace_steps(
    target: Pi0Config | Policy,
    *,
    observation: Mapping[str, Any] | None = None,
    batch: int = 4,
    max_token_len: int | None = None,
    action_horizon: int | None = None,
    action_dim: int | None = None,
) -> list[TraceEntry]:
    """Trace a model, and list every tensor in the order of the steps.

    Args:
        target: a config, which gives shapes only, or a policy, which also gives statistics of the values.
        observation: of the policy's robot; by default the embodiment's example.
        batch: batch size; a policy's observation is repeated.
        max_token_len, action_horizon, action_dim: override the target's own.
    """
    shapes = Shapes(batch, max_token_len, action_horizon, action_dim)
    if isinstance(target, Pi0Config):
        return trace_forward(inputs_of_config(target, shapes)).entries
    return trace_forward(inputs_of_policy(target, shapes, observation or target.example_observation())).entries


@torch.no_grad()
def trace_forward(inputs: TraceInputs, *, num_steps: int = 10) -> Trace:
    """Run a forward pass of training and of inference, and describe every stage."""
    entries: dict[tuple[str, str], TraceEntry] = {}
    tensors: dict[tuple[str, str], Tensor] = {}
    for stage in forward_stages(inputs, num_steps=num_steps):
        entries[stage.step, stage.name] = _entry(stage, pi05=inputs.config.pi05)
        if isinstance(stage.value, Tensor) and stage.name.partition("/")[0] in _KEPT:
            tensors[stage.step, stage.name] = stage.value
    segments = _segments(inputs, tensors["4", "prefix_mask"][0], tensors["6", "attn_mask"].shape[-1])
    groups = np.repeat([segment.group for segment in segments], [s.stop - s.start for s in segments])
    order = list(STEP_OF)
    return Trace(
        inputs,
        sorted([*entries.values(), *_counts(entries)], key=lambda entry: order.index(entry.step)),
        segments,
        tensors["6", "attn_mask"][0].cpu().numpy() if inputs.has_values else groups[None, :] <= groups[:, None],
        _values(inputs, tensors) if inputs.has_values else None,
    )


_KEPT = {"prefix_tokens", "prefix_mask", "attn_mask", "x_t", "v_t", "action_chunk"}
"""Tensors that `_segments` and `_values` need; the others are dropped to save memory."""


def _entry(stage: Stage, *, pi05: bool) -> TraceEntry:
    step, name, value = stage.step, stage.name, stage.value
    phase = "inference" if step == "inference" else "training" if name in STEP_OF[step].training else "both"
    entry = TraceEntry(step, name, (), "str", stage.view, phase, formula_of(step, name, pi05=pi05))
    if isinstance(value, str):
        return dataclasses.replace(entry, value=value)
    dtype = str(value.dtype).removeprefix("torch.")
    return dataclasses.replace(entry, shape=tuple(value.shape), dtype=dtype, stats=_stats(value))


def _stats(value: Tensor | np.ndarray) -> Stats | None:
    """Statistics of the values; None on the meta device, and for values that are not numbers."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            return None
        value = torch.from_numpy(np.array(value))  # copied, because arrays may be read-only
    if value.is_meta or value.numel() == 0:
        return None
    value = value.detach().float()
    std, mean = torch.std_mean(value, correction=0)
    return Stats(value.min().item(), mean.item(), value.max().item(), std.item())


def _counts(entries: Mapping[tuple[str, str], TraceEntry]) -> list[TraceEntry]:
    names = [name for step, name in entries if step in ("8", "9", "inference") or name == "action_time_mlp_in"]
    modulations = sum(name.startswith("modulation/") for name in names)
    counts = {
        ("8", "layers"): sum(name.startswith("suffix/layer_") for name in names),
        ("8", "time_injections"): sum(name.startswith("modulation/layer_") for name in names),
        ("8", "time_inputs"): modulations or names.count("action_time_mlp_in"),
        ("inference", "prefills"): 1,
        ("inference", "euler_steps"): sum(name.startswith("time/") for name in names),
    }
    return [TraceEntry(step, name, (), "int64", value=value) for (step, name), value in counts.items()]


def _segments(inputs: TraceInputs, prefix_mask: Tensor, length: int) -> list[Segment]:
    """Segments of the joint sequence; prompt and padding are those of the first sample."""
    num_prompt, horizon = inputs.batch["tokenized_prompt"].shape[1], inputs.noise.shape[1]
    num_valid = num_prompt if prefix_mask.is_meta else int(prefix_mask[-num_prompt:].sum())
    num_state = length - len(prefix_mask) - horizon
    counts = [(camera, inputs.config.num_patches, 0) for camera in inputs.cameras]
    counts += [("prompt", num_valid, 0), ("padding", num_prompt - num_valid, 0)]
    counts += [("state", num_state, 1), ("actions", horizon, 1 + num_state)]
    segments, start = [], 0
    for label, count, group in counts:
        if count:
            segments.append(Segment(label, start, start + count, group))
        start += count
    return segments


def _values(inputs: TraceInputs, tensors: Mapping[tuple[str, str], Tensor]) -> Values:
    images: dict[str, np.ndarray | None] = dict.fromkeys(inputs.cameras)
    for name, image in observation_of(inputs.batch).images.items():
        if inputs.batch.get(f"image_mask.{name}", torch.ones(1))[0]:
            images[name] = ((image[0] + 1) * 127.5).round().clamp_min(0).to(torch.uint8).cpu().numpy()
    chunks = [tensor for (_, name), tensor in tensors.items() if name.startswith("x_t/") or name == "action_chunk"]
    agreement = _agreement(inputs, tensors, num_steps=len(chunks) - 1)
    return Values(images, torch.cat(chunks).cpu().numpy(), _modulation(inputs), agreement)


def _modulation(inputs: TraceInputs, num_times: int = 41) -> dict[str, np.ndarray]:
    if not inputs.config.pi05:
        return {}
    w, state = nanopi.weights_of(inputs.model), inputs.batch["state"][:1].expand(num_times, -1)
    times, x_t = torch.linspace(1, 0, num_times, device=state.device), inputs.noise[:1].expand(num_times, -1, -1)
    *_, cond = nanopi.embed_suffix(w, inputs.config, state, x_t, times, nanopi.silent)
    norms = [name.removesuffix(".weight") for name in w if name.endswith(".dense.weight")]
    parts = torch.stack([nanopi.linear(w, name, cond).unflatten(-1, (3, -1)) for name in norms])  # [norms, times, 3, d]
    rms = parts.square().mean(dim=-1).sqrt().cpu().numpy()
    return {part: rms[..., i] for i, part in enumerate(("scale", "shift", "gate"))}


def _agreement(inputs: TraceInputs, tensors: Mapping[tuple[str, str], Tensor], num_steps: int) -> list[Agreement]:
    """Compare the joint forward pass of `nanopi` with the model itself."""
    model, observation = inputs.model, observation_of(inputs.batch)
    horizon, valid = inputs.noise.shape[1], tensors["4", "prefix_mask"]
    prefix = model.embed_prefix(observation)
    cache = model.prefill(observation, prefix, action_horizon=horizon)
    pairs = [
        ("prefix_tokens", tensors["4", "prefix_tokens"][valid], prefix[0][valid]),
        ("v_t, joint and cached", tensors["10", "v_t"], model.denoise_step(cache, tensors["5", "x_t"], inputs.time)),
    ]
    if model.config.action_horizon in (None, horizon):
        first = observation_of({name: rows[:1] for name, rows in inputs.batch.items()})
        chunk = model.sample_actions(first, noise=inputs.noise[:1], num_steps=num_steps)
        pairs.append(("action_chunk, with padding and without", tensors["inference", "action_chunk"], chunk))
    return [
        Agreement(what, (joint.float() - own.float()).abs().max().item(), own.float().abs().max().item())
        for what, joint, own in pairs
    ]
