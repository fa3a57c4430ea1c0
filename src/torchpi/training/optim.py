"""Learning-rate schedule, gradient clipping, AdamW and EMA, with openpi's formulas."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchpi.extras import require
from torchpi.training.config import OptimConfig, Optimizer
from torchpi.training.distributed import local

BETAS = (0.9, 0.95)
EPS = 1e-8


def learning_rate(step: int, optim: OptimConfig, num_steps: int) -> float:
    """Learning rate of an update, with the formulas of optax's schedules.

    It grows linearly from lr/(warmup_steps + 1) at step 0 to lr at warmup_steps. Then "cosine" decays to min_lr at
    decay_steps, "rsqrt" is lr/√(1 + (step − warmup_steps)/timescale), and "constant" stays at lr.
    """
    peak, after_warmup = optim.lr, step - optim.warmup_steps
    if after_warmup < 0:
        first = peak / (optim.warmup_steps + 1)
        return first + (peak - first) * step / optim.warmup_steps
    if optim.lr_schedule == "constant":
        return peak
    if optim.lr_schedule == "rsqrt":
        return peak / math.sqrt(1 + after_warmup / optim.timescale)
    decay_steps = (optim.decay_steps or num_steps) - optim.warmup_steps
    progress = min(1.0, after_warmup / max(decay_steps, 1))
    return optim.min_lr + (peak - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(
    parameters: Iterable[Tensor], *, weight_decay: float, kind: Optimizer = "adamw"
) -> torch.optim.Optimizer:
    """Create AdamW; the learning rate is set before each step.

    Args:
        kind: "adamw8bit" quantizes the moments of large arrays to 8 bits in blocks (arXiv:2110.02861, bitsandbytes).
    """
    options: dict[str, Any] = {"lr": 0.0, "betas": BETAS, "eps": EPS, "weight_decay": weight_decay}
    if kind == "adamw8bit":
        optimizer: torch.optim.Optimizer = require("bitsandbytes.optim", "adamw8bit").AdamW8bit(parameters, **options)
        return optimizer
    return torch.optim.AdamW(parameters, fused=True, **options)


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Scale the gradients in place to a global L2 norm of at most `max_norm`; return their previous norm.

    Unlike torch's `clip_grad_norm_`, which adds 1e-6 to the norm, clipped gradients have exactly `max_norm`.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = global_norm(gradients)
    value = float(norm)  # the only wait for the device in an update
    if value >= max_norm:
        torch._foreach_mul_([local(gradient) for gradient in gradients], max_norm / norm)
    return value


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm over the elements of all tensors, and over all processes if they are sharded."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors])))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def update_ema(ema: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """ema ← decay·ema + (1 − decay)·parameters, without bias correction."""
    torch._foreach_lerp_(list(ema), list(parameters), 1 - decay)
