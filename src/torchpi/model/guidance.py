"""Real-time chunking: sampling a chunk that goes on from the one that is being executed.

While a chunk is computed, the robot executes the rest of the last one. The new chunk has to agree with the actions that
will have been executed when it arrives, and should leave the others' course smoothly. So each Euler step is guided
towards the old chunk (training-free inpainting by ΠGDM): the velocity is corrected by the gradient, through the model,
of how far the chunk that it leads to is from the old one.

Source: "Real-Time Execution of Action Chunking Flow Policies" (arXiv:2506.07339), equations 2 to 5. Its time τ is 1 − t
here, and its velocity is −v_t.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor

MAX_GUIDANCE = 5.0
"""β: the paper's value; more does not agree better, and diverges with few steps."""


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The old chunk, and how much each of its numbers counts."""

    target: Float32[Tensor, "B H A"]
    """Y, normalized; finite everywhere, also where it does not count."""
    weight: Float32[Tensor, "B H A"]
    """The diagonal of W, from 0 to 1; 0 where there is no target, at padding, and for a sample without guidance."""
    maximum: float = MAX_GUIDANCE
    """β."""


@dataclasses.dataclass(frozen=True)
class GivenActions:
    """First actions of a chunk that are known: real-time chunking for a model that was trained with them.

    Source: "Training-Time Action Conditioning for Efficient Real-Time Chunking" (arXiv:2512.05964).
    """

    actions: Float32[Tensor, "B H A"]
    """Normalized; whatever is not given does not matter, but is finite."""
    mask: Bool[Tensor, "B H"]
    """True for those that are given."""


def prefix_weights(
    horizon: int, delay: Int[Tensor, " B"], execution_horizon: Int[Tensor, " B"]
) -> Float32[Tensor, "B H"]:
    """How much each step of the old chunk counts (equation 5).

    1 for the `delay` steps that will have been executed; exponentially less up to the last one that the old chunk
    reaches, H − `execution_horizon`; 0 behind.

    Args:
        horizon: H.
        delay: d, in control steps; d ≤ H − s, or the old chunk ends before the new one arrives.
        execution_horizon: s: how many steps have been executed since the old chunk's inference began.
    """
    i = torch.arange(horizon, device=delay.device)[None, :]
    d, end = delay[:, None], horizon - execution_horizon[:, None]
    c = ((end - i) / (end - d + 1)).clamp(0, 1)
    fading = c * torch.expm1(c) / (math.e - 1)
    return torch.where(i < d, 1.0, torch.where(i < end, fading, 0.0))


def guided_velocity(
    velocity: Callable[[Float32[Tensor, "B H A"]], Float32[Tensor, "B H A"]],
    x_t: Float32[Tensor, "B H A"],
    t: float,
    guidance: Guidance,
) -> Float32[Tensor, "B H A"]:
    """v_t, corrected towards the guidance's target (equations 2 to 4).

    Args:
        velocity: v_t as a function of x_t.
    """
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        v_t = velocity(x)
        reached = x - t * v_t  # the chunk that a straight path from here would lead to
        error = guidance.weight * (guidance.target - reached.detach())
        (gradient,) = torch.autograd.grad(reached, x, error)
    return v_t.detach() - guidance_strength(t, guidance.maximum) * gradient


def guidance_strength(t: float, maximum: float) -> float:
    """min(β, (τ² + (1 − τ)²)/(τ(1 − τ))) with τ = 1 − t; β at both ends, where the fraction has no value."""
    tau = 1 - t
    product = tau * (1 - tau)
    return maximum if product <= 0 else min(maximum, (tau**2 + (1 - tau) ** 2) / product)
