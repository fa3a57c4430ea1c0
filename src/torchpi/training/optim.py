"""The optimizer: schedule, clipping, AdamW and the moving average of the weights, in openpi's order and formulas."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.95)
EPS = 1e-8


def learning_rate(step: int, *, peak: float, warmup_steps: int, decay_steps: int, final: float) -> float:
    """Linear from peak/(warmup + 1) at step 0 to peak at `warmup_steps`, then a cosine to `final` at `decay_steps`."""
    if step < warmup_steps:
        first = peak / (warmup_steps + 1)
        return first + (peak - first) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(decay_steps - warmup_steps, 1))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(parameters: Iterable[Tensor], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; its learning rate is set before each step."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=True)


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Scale the gradients in place to a global L2 norm of at most `max_norm`; the norm that they had.

    Unlike torch's `clip_grad_norm_`, which adds 1e-6 to the norm, gradients that are cut have exactly `max_norm`.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    if norm >= max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return float(norm)


@torch.no_grad()
def update_ema(ema: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """ema ← decay·ema + (1 − decay)·parameters, without a correction for the beginning."""
    torch._foreach_lerp_(list(ema), list(parameters), 1 - decay)
