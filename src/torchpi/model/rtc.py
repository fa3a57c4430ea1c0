"""Real-time chunking (RTC): sample a chunk that continues the one that the robot is executing.

While a chunk is computed, the robot executes the rest of the previous one. The new chunk must agree with the actions
that will have been executed when it arrives, and should continue the remaining ones smoothly. Two methods wrap
`Pi0.denoise_step`:

- `Guidance` works with any model: each Euler step is guided towards the previous chunk (training-free inpainting,
  ΠGDM). The velocity is corrected by a gradient, taken through the model, of the distance between the predicted chunk
  and the previous one. Source: "Real-Time Execution of Action Chunking Flow Policies" (arXiv:2506.07339), equations 2
  to 5; τ in the paper is 1 − t here, and its velocity is −v_t.
- `ActionPrefix` needs a model trained with action prefixes: the first actions are known and get t = 0.
  Source: "Training-Time Action Conditioning for Efficient Real-Time Chunking" (arXiv:2512.05964).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor

from torchpi.errors import ModelError
from torchpi.model.suffix import TimeConditioning

MAX_GUIDANCE = 5.0
"""β: the paper's value. A larger one does not improve the agreement, and diverges with few steps."""

Velocity = Callable[[Float32[Tensor, "B H A"], TimeConditioning], Float32[Tensor, "B H A"]]
"""Computes v_t from x_t and the time."""


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Guidance towards the previous chunk, with a weight per element."""

    target: Float32[Tensor, "B H A"]
    """Y: the previous chunk, normalized; finite even where the weight is 0."""
    weight: Float32[Tensor, "B H A"]
    """Diagonal of W, from 0 to 1; 0 where there is no target, at padding, and for samples without guidance."""
    maximum: float = MAX_GUIDANCE
    """β: upper bound of the guidance strength."""

    def __post_init__(self) -> None:
        if not 0 <= self.maximum < math.inf:
            raise ModelError(f"The guidance's maximum must be finite and not negative, got {self.maximum}.")

    def wrap(self, velocity: Velocity) -> Velocity:
        """Correct the velocity towards the target (equations 2 to 4)."""
        if torch.is_inference_mode_enabled():
            raise ModelError(
                "Guidance needs gradients, which torch.inference_mode disables; sample under torch.no_grad instead, or "
                "with Policy.infer, which leaves inference mode."
            )

        def guided(x_t: Float32[Tensor, "B H A"], time: TimeConditioning) -> Float32[Tensor, "B H A"]:
            assert isinstance(time.time, float)  # the time of an Euler step
            with torch.enable_grad():
                x = x_t.detach().requires_grad_()
                v_t = velocity(x, time)
                predicted = x - time.time * v_t  # the chunk at t = 0, at the end of a straight path from x
                error = self.weight * (self.target - predicted.detach())
                (gradient,) = torch.autograd.grad(predicted, x, error)
            return v_t.detach() - guidance_strength(time.time, self.maximum) * gradient

        return guided


@dataclasses.dataclass(frozen=True)
class ActionPrefix:
    """Known first actions of a chunk."""

    actions: Float32[Tensor, "B H A"]
    """Normalized; finite even after the prefix."""
    mask: Bool[Tensor, "B H"]
    """True for the known actions."""

    def insert(self, x_t: Float32[Tensor, "B H A"]) -> Float32[Tensor, "B H A"]:
        """Replace the first actions of x_t by the known ones."""
        return torch.where(self.mask[:, :, None], self.actions, x_t)

    def wrap(self, velocity: Velocity, at_zero: TimeConditioning) -> Velocity:
        """Give the prefix t = 0 and a velocity of 0, so that it does not change.

        Args:
            at_zero: time conditioning for t = 0.
        """
        known = self.mask[:, :, None]  # [B, H, 1]
        features_0 = at_zero.features.view(1, 1, -1)
        modulations_0 = None if at_zero.modulations is None else torch.stack(list(at_zero.modulations))  # [M, 1, 1, 3d]

        def prefixed(x_t: Float32[Tensor, "B H A"], time: TimeConditioning) -> Float32[Tensor, "B H A"]:
            modulations = None
            if time.modulations is not None and modulations_0 is not None:  # all norms in one kernel launch
                modulations = torch.where(known, modulations_0, torch.stack(list(time.modulations))).unbind()
            features = torch.where(known, features_0, time.features.view(1, 1, -1))  # [B, H, d]
            per_token = TimeConditioning(time.time, features, modulations)
            return velocity(x_t, per_token).masked_fill(known, 0.0)

        return prefixed


class Samples(NamedTuple):
    """R chunks per observation, and the curvature of their paths."""

    actions: Float32[Tensor, "B R H A"]
    residual: Float32[Tensor, "B R H A"] | None
    """(v_t − (x_1 − x_0))², averaged over the Euler steps: 0 on a straight path, where all steps have the same velocity
    (measure of straightness in "Flow Straight and Fast", arXiv:2209.03003). None for R = 1."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Samples":
        """Apply a function to both tensors."""
        return Samples(function(self.actions), None if self.residual is None else function(self.residual))


_Part = TypeVar("_Part", Guidance, ActionPrefix)


def _repeated(part: _Part | None, times: int) -> _Part | None:
    """Repeat each observation's previous chunk `times` times in a row."""
    if part is None or times == 1:
        return part
    tensors = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
    repeated: dict[str, Any] = {name: value.repeat_interleave(times, 0) for name, value in tensors.items()}
    return dataclasses.replace(part, **repeated)


def check_previous(noise: Tensor, guidance: Guidance | None, action_prefix: ActionPrefix | None) -> None:
    """Raise a ModelError if the shape of the previous chunk differs from the noise."""
    for name, part in {"guidance": guidance, "action_prefix": action_prefix}.items():
        for field, value in vars(part).items() if part is not None else ():
            shape = noise.shape[:2] if field == "mask" else noise.shape
            if isinstance(value, Tensor) and value.shape != shape:
                raise ModelError(f"{name}.{field} must be {list(shape)} like the noise, got {list(value.shape)}.")


def integrate(
    velocity: Velocity,
    noise: Float32[Tensor, "B R H A"],
    times: Sequence[TimeConditioning],
    *,
    guidance: Guidance | None = None,
    action_prefix: ActionPrefix | None = None,
) -> Samples:
    """Integrate from noise to actions by Euler steps.

    Args:
        velocity: function of B·R chunks; the R chunks of an observation are consecutive.
        times: time conditioning of each step, followed by that of the action prefix (t = 0) if there is one.
        guidance, action_prefix: one per observation.
    """
    num_samples = noise.shape[1]
    guidance, action_prefix = _repeated(guidance, num_samples), _repeated(action_prefix, num_samples)
    steps, x_1 = times, noise.flatten(0, 1)
    if action_prefix is not None:
        *steps, at_zero = times
        x_1, velocity = action_prefix.insert(x_1), action_prefix.wrap(velocity, at_zero)
    if guidance is not None:
        velocity = guidance.wrap(velocity)

    x_t, dt = x_1, -1.0 / len(steps)
    squares = torch.zeros_like(x_1) if num_samples > 1 else None
    for time in steps:
        v_t = velocity(x_t, time)
        x_t = x_t + dt * v_t
        if squares is not None:
            squares += v_t.square() / len(steps)
    actions = x_t.unflatten(0, noise.shape[:2])
    if squares is None:
        return Samples(actions, None)
    # The mean velocity is x_1 − x_0, so this is the variance of v_t over the steps.
    residual = (squares - (x_1 - x_t).square()).clamp(min=0)
    return Samples(actions, residual.unflatten(0, noise.shape[:2]))


def prefix_weights(
    horizon: int, delay: Int[Tensor, " B"], execution_horizon: Int[Tensor, " B"]
) -> Float32[Tensor, "B H"]:
    """Compute the guidance weight of each step of the previous chunk (equation 5).

    It is 1 for the `delay` steps that will have been executed, then decays exponentially up to the end of the previous
    chunk at H − `execution_horizon`, and is 0 after it.

    Args:
        horizon: H.
        delay: the paper's d, in control steps; at most H − s, or the previous chunk ends before the new one arrives.
        execution_horizon: the paper's s, actions of the previous chunk executed since its inference began.
    """
    i = torch.arange(horizon, device=delay.device)[None, :]
    d, end = delay[:, None], horizon - execution_horizon[:, None]
    c = ((end - i).float() / (end - d + 1)).clamp(0, 1)
    decay = c * torch.expm1(c) / (math.e - 1)
    return torch.where(i < d, 1.0, torch.where(i < end, decay, 0.0))


def guidance_strength(t: float, maximum: float) -> float:
    """min(β, (τ² + (1 − τ)²)/(τ(1 − τ))) with τ = 1 − t; β at both ends, where the fraction is undefined."""
    tau = 1 - t
    product = tau * (1 - tau)
    return maximum if product <= 0 else min(maximum, (tau**2 + (1 - tau) ** 2) / product)
