"""FLOPs and bytes of the operations in sampling and in a training step.

Each matmul and attention reads its operands and writes its result once; each normalization, softmax, activation and
residual reads and writes its tensors once. Not counted: padding, and the operations after the keys and values in the
last prefix layer. The time conditioning of all steps is counted as one batched matmul. A training step counts three
times the forward pass, plus the bytes of the optimizer.
"""

import dataclasses
from collections.abc import Iterator

import torch

from torchpi.config import GemmaConfig, Pi0Config, VisionConfig
from torchpi.model.pi0 import Pi0

# Master weight read and written, gradient read, both moments read and written; float32.
ADAMW_BYTES_PER_PARAMETER = 4 * (2 + 1 + 4)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of one model call."""

    config: Pi0Config
    batch: int
    num_cameras: int
    prompt_tokens: int
    """Valid tokens of the prompt; it is padded to the config's max_token_len."""
    num_steps: int
    dtype: torch.dtype
    device: str = "cpu"
    flow_samples_per_obs: int = 1
    """Training: pairs of noise and time per observation."""
    num_samples: int = 1
    """Sampling: chunks per observation."""

    @property
    def prefix_tokens(self) -> int:
        """Valid tokens of one prefix."""
        return self.num_cameras * self.config.num_patches + self.prompt_tokens


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peak rates of the machine, measured in the same run."""

    flops: float
    """FLOPs per second in the dtype of the workload."""
    bytes: float
    """Bytes read and written per second."""


@dataclasses.dataclass(frozen=True)
class Op:
    """One or several operations of the same kind."""

    name: str
    flops: int
    bytes: int

    def floor(self, machine: Machine) -> float:
        """Compute the shortest possible time in seconds."""
        return max(self.flops / machine.flops, self.bytes / machine.bytes)


class _Counter:
    """Builds the operations of one part of the model, for a fixed element size."""

    def __init__(self, part: str, element_bytes: int) -> None:
        self.part, self.element_bytes = part, element_bytes

    def matmul(self, name: str, rows: int, num_in: int, num_out: int) -> Op:
        elements = rows * num_in + num_in * num_out + rows * num_out
        return Op(f"{self.part} {name}", 2 * rows * num_in * num_out, self.element_bytes * elements)

    def elementwise(self, name: str, elements: int) -> Op:
        return Op(f"{self.part} {name}", 0, 2 * self.element_bytes * elements)

    def layer(self, sizes: GemmaConfig | VisionConfig, batch: int, tokens: int, past: int = 0) -> Iterator[Op]:
        """Count a transformer layer whose tokens also attend to `past` cached keys and values."""
        heads, width, hidden = sizes.num_heads, sizes.width, sizes.mlp_dim
        if isinstance(sizes, GemmaConfig):
            kv_heads, dim, mlp_width = sizes.num_kv_heads, sizes.head_dim, 2 * hidden  # gate and up
        else:
            kv_heads, dim, mlp_width = heads, width // heads, hidden
        rows, keys = batch * tokens, past + tokens
        yield self.elementwise("norm", 2 * rows * width)
        yield self.matmul("qkv", rows, width, (heads + 2 * kv_heads) * dim)
        elements = 2 * rows * heads * dim + 2 * batch * keys * kv_heads * dim
        yield Op(f"{self.part} attention", 4 * rows * keys * heads * dim, self.element_bytes * elements)
        yield self.elementwise("softmax", rows * heads * keys)
        yield self.matmul("attention out", rows, heads * dim, width)
        yield self.matmul("mlp", rows, width, mlp_width)
        yield self.elementwise("activation", rows * hidden)
        yield self.matmul("mlp", rows, hidden, width)
        yield self.elementwise("residual", 2 * rows * width)


def vision_ops(work: Workload) -> Iterator[Op]:
    """Count SigLIP over all cameras."""
    vit, patches = work.config.siglip, work.config.num_patches
    images = work.batch * work.num_cameras
    count = _Counter("vision", work.dtype.itemsize)
    yield _Counter("vision", 4).matmul("patch embedding", images * patches, 3 * vit.patch**2, vit.width)
    for _ in range(vit.depth):
        yield from count.layer(vit, images, patches)
    yield count.elementwise("norm", images * patches * vit.width)
    yield count.matmul("head", images * patches, vit.width, work.config.paligemma.width)


def prefix_ops(work: Workload) -> Iterator[Op]:
    """Count the backbone over the valid prefix tokens, up to the last layer's keys and values."""
    gemma, rows = work.config.paligemma, work.batch * work.prefix_tokens
    count = _Counter("prefix", work.dtype.itemsize)
    for _ in range(gemma.depth - 1):
        yield from count.layer(gemma, work.batch, work.prefix_tokens)
    yield count.elementwise("norm", rows * gemma.width)
    yield count.matmul("qkv", rows, gemma.width, 2 * gemma.num_kv_heads * gemma.head_dim)


def expert_ops(work: Workload, num_steps: int) -> Iterator[Op]:
    """Count the action expert in all steps, and the time conditioning of all steps as one batch."""
    config, expert = work.config, work.config.action_expert
    horizon = config.require("action_horizon")
    tokens = horizon if config.pi05 else horizon + 1
    rows, width = work.batch * tokens, expert.width
    count, count_float32 = _Counter("expert", work.dtype.itemsize), _Counter("suffix", 4)
    if config.pi05:
        yield count_float32.matmul("time", num_steps, width, width)
        yield count_float32.matmul("time", num_steps, width, width)
        for _ in range(2 * expert.depth + 1):
            yield count.matmul("modulation", num_steps, width, 3 * width)
    for _ in range(num_steps):
        yield count_float32.matmul("projections", work.batch * horizon, config.action_dim, width)
        if not config.pi05:
            yield count_float32.matmul("projections", work.batch, config.action_dim, width)  # the state
            yield count_float32.matmul("projections", work.batch * horizon, 2 * width, width)
            yield count_float32.matmul("projections", work.batch * horizon, width, width)
        for _ in range(expert.depth):
            yield from count.layer(expert, work.batch, tokens, work.prefix_tokens)
        yield count.elementwise("norm", rows * width)
        yield count_float32.matmul("projections", work.batch * horizon, width, config.action_dim)


def sampling_ops(work: Workload) -> list[Op]:
    """Count all operations of `sample_actions` or `sample_many`."""
    suffixes = dataclasses.replace(work, batch=work.batch * work.num_samples)
    return [*vision_ops(work), *prefix_ops(work), *expert_ops(suffixes, work.num_steps)]


def forward_ops(work: Workload) -> list[Op]:
    """Count all operations of the forward pass in a training step."""
    # All flow samples of an observation share its prefix.
    suffixes = dataclasses.replace(work, batch=work.batch * work.flow_samples_per_obs)
    return [*vision_ops(work), *prefix_ops(work), *expert_ops(suffixes, num_steps=1)]


def training_ops(work: Workload) -> list[Op]:
    """Count all operations of a training step: forward, backward (twice the forward) and AdamW."""
    parameters = sum(parameter.numel() for parameter in Pi0(work.config, device="meta").parameters())
    forward_and_backward = [Op(op.name, 3 * op.flops, 3 * op.bytes) for op in forward_ops(work)]
    return [*forward_and_backward, Op("optimizer AdamW", 0, ADAMW_BYTES_PER_PARAMETER * parameters)]


def trained_flops(model: Pi0, work: Workload) -> int:
    """Count the FLOPs of a training step, for the model FLOPs utilization (MFU).

    Weight gradients count if the weights are trained, input gradients if any earlier parameter is. Recomputation by
    activation checkpointing and LoRA's own small matmuls don't count.
    """
    parts = [(name, name.partition(".")[0], p) for name, p in model.named_parameters() if p.requires_grad]
    trained = {part for _, part, _ in parts}
    full = {part for name, part, p in parts if p.ndim > 1 and "lora" not in name}
    factors = {
        "vision": 3 if "vision" in full else 1,
        "prefix": 3 if "backbone" in full else 2 if trained & {"backbone", "vision", "embedding"} else 1,
        "expert": 3 if "expert" in full else 2,  # the projections in front of it are always trained
        "suffix": 3,
    }
    return sum(factors[op.name.split()[0]] * op.flops for op in forward_ops(work))
