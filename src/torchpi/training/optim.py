"""The optimizer: schedule, clipping, AdamW and the moving average of the weights, in openpi's order and formulas."""

import math
from collections.abc import Iterable, Sequence
from typing import get_args

import torch
from torch import Tensor

from torchpi.errors import TrainingError
from torchpi.extras import require
from torchpi.training.config import Optimizer, Schedule
from torchpi.training.distributed import is_sharded, local, sum_over_shards

BETAS = (0.9, 0.95)
EPS = 1e-8


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    decay_steps: int,
    final: float,
    schedule: Schedule = "cosine",
    timescale: float = 10_000.0,
) -> float:
    """The rate of an update, as optax's schedules have it.

    Linear from peak/(warmup + 1) at step 0 to peak at `warmup_steps`; then a cosine to `final` at `decay_steps`, or
    "rsqrt": peak/√(1 + (step − warmup)/timescale), or "constant".
    """
    if schedule not in get_args(Schedule):
        raise TrainingError(f"Unknown schedule {schedule!r}; schedules are {', '.join(get_args(Schedule))}.")
    if step < warmup_steps:
        first = peak / (warmup_steps + 1)
        return first + (peak - first) * step / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "rsqrt":
        return peak / math.sqrt(1 + (step - warmup_steps) / timescale)
    progress = min(1.0, (step - warmup_steps) / max(decay_steps - warmup_steps, 1))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(
    parameters: Iterable[Tensor], *, weight_decay: float, kind: Optimizer = "adamw"
) -> torch.optim.Optimizer:
    """AdamW; its learning rate is set before each step.

    Args:
        kind: "adamw8bit" keeps the moments of large arrays in 8 bits, by blocks (arXiv:2110.02861, bitsandbytes).
    """
    if kind == "adamw8bit":
        optimizer = require("bitsandbytes.optim", "adamw8bit").AdamW8bit
        found: torch.optim.Optimizer = optimizer(parameters, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay)
        return found
    if kind != "adamw":
        raise TrainingError(f"Unknown optimizer {kind!r}; optimizers are {', '.join(get_args(Optimizer))}.")
    return torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=True)


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Scale the gradients in place to a global L2 norm of at most `max_norm`; the norm that they had.

    Unlike torch's `clip_grad_norm_`, which adds 1e-6 to the norm, gradients that are cut have exactly `max_norm`.
    """
    whole = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [local(gradient) for gradient in whole]
    norm = global_norm(whole)
    if norm >= max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return float(norm)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all numbers together, over the processes where they are sharded (all of them alike)."""
    norm = torch.stack(torch._foreach_norm([local(tensor.detach()) for tensor in tensors])).norm()
    return sum_over_shards(norm.square(), tensors[0]).sqrt() if is_sharded(tensors[0]) else norm


@torch.no_grad()
def update_ema(ema: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """ema ← decay·ema + (1 − decay)·parameters, without a correction for the beginning."""
    torch._foreach_lerp_(list(ema), list(parameters), 1 - decay)
