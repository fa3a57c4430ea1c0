"""Flow matching: the straight path between noise and actions, the time along it, and the Euler schedule.

Time follows the code that the weights were trained with: t = 1 is noise and t = 0 is actions. The papers use the
opposite convention (π₀, arXiv:2410.24164, section IV; π₀.₅, arXiv:2504.16054).
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from torchpi.errors import ModelError, is_whole
from torchpi.model.layers import require_shape

# Periods of the time embedding (formula in π₀, appendix B).
MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
MAX_NUM_STEPS = 1000


def posemb_sincos(
    time: Float[Tensor, " B"],
    dim: int,
    min_period: float = MIN_PERIOD,
    max_period: float = MAX_PERIOD,
    *,
    frequencies: Float32[Tensor, " half"] | None = None,
) -> Float32[Tensor, "B d"]:
    """Sine and cosine of the time at dim/2 periods, log-spaced from `min_period` to `max_period`.

    Phases reach 2π/4e-3 = 1571 rad, where a difference of one float32 ulp in a frequency changes the sine by 1e-4. The
    frequencies are therefore computed with the same float32 operations, in the same order, as in openpi.

    Args:
        time: any float dtype; the embedding is computed in float32.
        dim: width of the result, even.
        frequencies: precomputed `angular_frequencies` on the device of `time`; by default they are computed on the
            host and copied.

    Raises:
        ValueError: `dim` is odd.
    """
    if dim % 2:
        raise ModelError(f"dim must be even, half for the sine and half for the cosine, got {dim}.")
    if frequencies is None:
        frequencies = angular_frequencies(dim // 2, min_period, max_period).to(time.device)
    phase = time.float()[:, None] * frequencies[None, :]  # [B, dim/2]
    return torch.cat([torch.sin(phase), torch.cos(phase)], dim=-1)


def angular_frequencies(
    count: int, min_period: float = MIN_PERIOD, max_period: float = MAX_PERIOD
) -> Float32[Tensor, " half"]:
    """2π / period for each period of `posemb_sincos`, on the host."""
    # XLA's linspace multiplies 0, 1, … count − 1 by the float32 reciprocal of count − 1; its last value is exactly 1.
    fraction = np.arange(count, dtype=np.float32) * np.float32(1.0 / max(count - 1, 1))
    fraction[-1] = 1.0 if count > 1 else 0.0
    # The power is computed in float64 and rounded: the result is then the same with every math library.
    period = np.float32(min_period) * np.power(max_period / min_period, fraction.astype(np.float64)).astype(np.float32)
    return torch.from_numpy(np.float32(1.0) / period * np.float32(2.0) * np.float32(math.pi))


def sample_time(batch: int, *, generator: torch.Generator | None = None, device: torch.device) -> Float32[Tensor, " B"]:
    """Draw t ~ Beta(1.5, 1)·0.999 + 0.001: more weight on noisy times, never exactly 0 (π₀, appendix B)."""
    uniform = torch.rand(batch, generator=generator, dtype=torch.float32, device=device)
    return uniform.pow(1 / 1.5) * 0.999 + 0.001  # the CDF of Beta(a, 1) is x^a


def check_time(time: Any) -> None:
    """Raise a ModelError unless `time` is a tensor in [0, 1]. Values on a GPU are not checked (no sync)."""
    require_shape("Time", time)
    if time.device.type == "cpu" and not bool(((time >= 0) & (time <= 1)).all()):
        raise ModelError(
            f"Time must be in [0, 1], where 1 is noise, got values from {time.min():.4g} to {time.max():.4g}."
        )


def interpolate(
    actions: Float32[Tensor, "B H A"],
    noise: Float32[Tensor, "B H A"],
    time: Float32[Tensor, " B"] | Float32[Tensor, "B H"],
) -> tuple[Float32[Tensor, "B H A"], Float32[Tensor, "B H A"]]:
    """Compute x_t = t·noise + (1 − t)·actions and the target velocity u_t = noise − actions."""
    t = time.reshape(len(time), -1, 1)  # [B, 1 or H, 1]
    return t * noise + (1 - t) * actions, noise - actions


def token_times(time: Float32[Tensor, " B"], prefix_len: Int[Tensor, " B"], horizon: int) -> Float32[Tensor, "B H"]:
    """Time of each action in a chunk: 0 for the action prefix (the first `prefix_len`), `time` for the others."""
    in_prefix = torch.arange(horizon, device=time.device) < prefix_len[:, None]
    return time[:, None].masked_fill(in_prefix, 0.0)


def check_num_steps(num_steps: int, where: str = "") -> None:
    """Raise a ModelError unless `num_steps` is a valid number of Euler steps."""
    if not is_whole(num_steps) or not 1 <= num_steps <= MAX_NUM_STEPS:
        raise ModelError(
            f"{where}num_steps must be a positive integer, got {num_steps!r}; the maximum is {MAX_NUM_STEPS}."
        )


def euler_times(num_steps: int) -> list[float]:
    """Times at which the velocity is evaluated: 1, 1 − 1/n, … 1/n, accumulated in float32 as in openpi."""
    check_num_steps(num_steps)
    dt = np.float32(-1.0 / num_steps)
    times, t = [], np.float32(1.0)
    while t >= -dt / 2:
        times.append(float(t))
        t = t + dt
    return times
