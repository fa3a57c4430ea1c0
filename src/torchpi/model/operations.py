"""Operations of a workload, with their FLOPs and bytes: those of sampling and of a training step.

Matmuls and attention read their operands and write their results once; each normalization, softmax, activation and
residual reads and writes its tensors once. Not counted: the last prefix layer behind its keys and values, padding, and
the time conditioning of all steps but once. A training step is three times the forward pass, and the optimizer's bytes.
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
    """Sizes of one call of the model."""

    config: Pi0Config
    batch: int
    num_cameras: int
    prompt_tokens: int
    """Valid tokens of the prompt; it is padded to the config's max_token_len."""
    num_steps: int
    dtype: torch.dtype
    device: str = "cpu"
    flow_samples_per_obs: int = 1
    """Pairs of noise and time per observation, in training."""
    num_samples: int = 1
    """Chunks per observation, in sampling."""

    @property
    def prefix_tokens(self) -> int:
        """Valid tokens of one prefix."""
        return self.num_cameras * self.config.num_patches + self.prompt_tokens


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peak rates of this machine, measured in this run."""

    flops: float
    """Per second, in the dtype of the workload."""
    bytes: float
    """Per second, read and written."""


@dataclasses.dataclass(frozen=True)
class Op:
    """Operations of one kind."""

    name: str
    flops: int
    bytes: int

    def floor(self, machine: Machine) -> float:
        """Seconds."""
        return max(self.flops / machine.flops, self.bytes / machine.bytes)


class _Counter:
    """Operations of one part of the model, in elements of one size."""

    def __init__(self, part: str, element_bytes: int) -> None:
        self.part, self.element_bytes = part, element_bytes

    def matmul(self, name: str, rows: int, num_in: int, num_out: int) -> Op:
        elements = rows * num_in + num_in * num_out + rows * num_out
        return Op(f"{self.part} {name}", 2 * rows * num_in * num_out, self.element_bytes * elements)

    def elementwise(self, name: str, elements: int) -> Op:
        return Op(f"{self.part} {name}", 0, 2 * self.element_bytes * elements)

    def layer(self, sizes: GemmaConfig | VisionConfig, batch: int, tokens: int, past: int = 0) -> Iterator[Op]:
        """A transformer layer; `past` keys and values are cached."""
        heads, width, hidden = sizes.num_heads, sizes.width, sizes.mlp_dim
        if isinstance(sizes, GemmaConfig):
            kv_heads, dim, mlp_inputs = sizes.num_kv_heads, sizes.head_dim, 2 * hidden  # gate and value
        else:
            kv_heads, dim, mlp_inputs = heads, width // heads, hidden
        rows, keys = batch * tokens, past + tokens
        yield self.elementwise("norm", 2 * rows * width)
        yield self.matmul("qkv", rows, width, (heads + 2 * kv_heads) * dim)
        elements = 2 * rows * heads * dim + 2 * batch * keys * kv_heads * dim
        yield Op(f"{self.part} attention", 4 * rows * keys * heads * dim, self.element_bytes * elements)
        yield self.elementwise("softmax", rows * heads * keys)
        yield self.matmul("attention out", rows, heads * dim, width)
        yield self.matmul("mlp", rows, width, mlp_inputs)
        yield self.elementwise("activation", rows * hidden)
        yield self.matmul("mlp", rows, hidden, width)
        yield self.elementwise("residual", 2 * rows * width)


def vision_ops(work: Workload) -> Iterator[Op]:
    """SigLIP over all cameras."""
    vit, patches = work.config.siglip, work.config.num_patches
    images = work.batch * work.num_cameras
    count = _Counter("vision", work.dtype.itemsize)
    yield _Counter("vision", 4).matmul("patch embedding", images * patches, 3 * vit.patch**2, vit.width)
    for _ in range(vit.depth):
        yield from count.layer(vit, images, patches)
    yield count.elementwise("norm", images * patches * vit.width)
    yield count.matmul("head", images * patches, vit.width, work.config.paligemma.width)


def prefix_ops(work: Workload) -> Iterator[Op]:
    """The backbone over the valid prefix tokens, up to the last layer's keys and values."""
    gemma, rows = work.config.paligemma, work.batch * work.prefix_tokens
    count = _Counter("prefix", work.dtype.itemsize)
    for _ in range(gemma.depth - 1):
        yield from count.layer(gemma, work.batch, work.prefix_tokens)
    yield count.elementwise("norm", rows * gemma.width)
    yield count.matmul("qkv", rows, gemma.width, 2 * gemma.num_kv_heads * gemma.head_dim)


def expert_ops(work: Workload, num_steps: int) -> Iterator[Op]:
    """The action expert in all steps, and the time conditioning once."""
    config, expert = work.config, work.config.action_expert
    horizon = config.require("action_horizon")
    tokens = horizon if config.pi05 else horizon + 1
    rows, width = work.batch * tokens, expert.width
    count, exact = _Counter("expert", work.dtype.itemsize), _Counter("suffix", 4)
    if config.pi05:
        yield exact.matmul("time", num_steps, width, width)
        yield exact.matmul("time", num_steps, width, width)
        for _ in range(2 * expert.depth + 1):
            yield count.matmul("modulation", num_steps, width, 3 * width)
    for _ in range(num_steps):
        yield exact.matmul("projections", work.batch * horizon, config.action_dim, width)
        if not config.pi05:
            yield exact.matmul("projections", work.batch, config.action_dim, width)  # the state
            yield exact.matmul("projections", work.batch * horizon, 2 * width, width)
            yield exact.matmul("projections", work.batch * horizon, width, width)
        for _ in range(expert.depth):
            yield from count.layer(expert, work.batch, tokens, work.prefix_tokens)
        yield count.elementwise("norm", rows * width)
        yield exact.matmul("projections", work.batch * horizon, width, config.action_dim)


def sampling_ops(work: Workload) -> list[Op]:
    """All operations of `sample_actions`, or of `sample_many`."""
    suffixes = dataclasses.replace(work, batch=work.batch * work.num_samples)
    return [*vision_ops(work), *prefix_ops(work), *expert_ops(suffixes, work.num_steps)]


def forward_ops(work: Workload) -> list[Op]:
    """All operations of the forward pass of a training step."""
    # The flow samples of an observation share its prefix.
    suffixes = dataclasses.replace(work, batch=work.batch * work.flow_samples_per_obs)
    return [*vision_ops(work), *prefix_ops(work), *expert_ops(suffixes, num_steps=1)]


def training_ops(work: Workload) -> list[Op]:
    """All operations of a training step: forward, backward at twice the forward, AdamW."""
    parameters = sum(parameter.numel() for parameter in Pi0(work.config, device="meta").parameters())
    both = [Op(op.name, 3 * op.flops, 3 * op.bytes) for op in forward_ops(work)]
    return [*both, Op("optimizer AdamW", 0, ADAMW_BYTES_PER_PARAMETER * parameters)]


def trained_flops(model: Pi0, work: Workload) -> int:
    """FLOPs of a training step of a model, for its utilization (MFU).

    The gradient of the weights counts where they are trained, that of the inputs where anything before them is; what
    activation checkpointing computes again and LoRA's own small matmuls do not count.
    """
    parts = [(name, name.partition(".")[0], p) for name, p in model.named_parameters() if p.requires_grad]
    trained = {part for _, part, _ in parts}
    full = {part for name, part, p in parts if p.ndim > 1 and "lora" not in name}
    factors = {
        "vision": 3 if "vision" in full else 1,
        "prefix": 3 if "backbone" in full else 2 if trained & {"backbone", "vision", "embedding"} else 1,
        "expert": 3 if "expert" in full else 2,  # the projections before it are always trained
        "suffix": 3,
    }
    return sum(factors[op.name.split()[0]] * op.flops for op in forward_ops(work))
