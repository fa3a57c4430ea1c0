"""The suffix: noisy actions, state and time as the action expert's tokens. π₀ and π₀.₅ differ here.

Everything is computed in float32: these projections are small, and x_t is what the Euler steps integrate.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from torchpi.config import Pi0Config
from torchpi.errors import ModelError
from torchpi.model.flow import angular_frequencies, posemb_sincos
from torchpi.model.layers import Linear, lecun_normal_


@dataclasses.dataclass(frozen=True)
class TimeConditioning:
    """The action expert's inputs that depend on the time alone."""

    time: Float32[Tensor, "*B"] | float
    """t, one per sample or per action, or of a whole batch."""
    features: Float32[Tensor, "#B d"] | Float32[Tensor, "#B H d"]
    """`time_features` of the suffix."""
    modulations: Sequence[Tensor] | None
    """Scale, shift and gate of each AdaRMSNorm, [#B, 1 or T, 3d]; None for π₀."""


class TimeEmbedding:
    """`posemb_sincos`, whose frequencies stay on the device of the times: a GPU would wait for a copy at each call."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._on_host = self._frequencies = angular_frequencies(dim // 2)

    def __call__(self, time: Float32[Tensor, "*B"]) -> Float32[Tensor, "*B d"]:
        """The embedding of each time."""
        if self._frequencies.device != time.device:
            with torch.inference_mode(False):  # the next call may be training
                self._frequencies = self._on_host.to(time.device)
        return posemb_sincos(time.flatten(), self.dim, frequencies=self._frequencies).unflatten(0, time.shape)


class Pi05Suffix(nn.Module):
    """π₀.₅: action tokens only; the time becomes the condition of every AdaRMSNorm."""

    num_state_tokens = 0

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        width = config.action_expert.width
        self.action_in_proj = Linear(config.action_dim, width)
        self.embed_time = TimeEmbedding(width)
        self.time_mlp_in = Linear(width, width)
        self.time_mlp_out = Linear(width, width)

    def time_features(self, time: Float32[Tensor, "*B"]) -> Float32[Tensor, "*B d"]:
        """The time, one per sample or one per action, through the MLP: the condition of the norms."""
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(self.embed_time(time)))))

    def condition(self, time_features: Float32[Tensor, "*B d"]) -> Float32[Tensor, "*B d"] | None:
        """adarms_cond, the condition of the expert's norms."""
        return time_features

    def forward(
        self,
        state: Float32[Tensor, "B A"],
        noisy_actions: Float32[Tensor, "B H A"],
        time_features: Float32[Tensor, "#B d"] | Float32[Tensor, "#B H d"],
    ) -> Float32[Tensor, "B T d"]:
        """The suffix tokens: one per action. The state is not read, it is in the prompt's text."""
        return self.action_in_proj(noisy_actions)

    def ar_mask(self, action_horizon: int, device: torch.device) -> Bool[Tensor, " T"]:
        """One group behind the prefix: all actions see each other."""
        mask = torch.zeros(action_horizon, dtype=torch.bool, device=device)
        mask[0] = True
        return mask


class Pi0Suffix(nn.Module):
    """π₀: a state token, then one token per action into which the time is mixed; the expert has no condition."""

    num_state_tokens = 1

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        width = config.action_expert.width
        self.state_proj = Linear(config.action_dim, width)
        self.action_in_proj = Linear(config.action_dim, width)
        self.embed_time = TimeEmbedding(width)
        self.action_time_mlp_in = Linear(2 * width, width)
        self.action_time_mlp_out = Linear(width, width)

    def time_features(self, time: Float32[Tensor, "*B"]) -> Float32[Tensor, "*B d"]:
        """The embedded time, one per sample or one per action."""
        return self.embed_time(time)

    def condition(self, time_features: Float32[Tensor, "*B d"]) -> None:
        """None: the time is in the tokens."""
        return

    def forward(
        self,
        state: Float32[Tensor, "B A"],
        noisy_actions: Float32[Tensor, "B H A"],
        time_features: Float32[Tensor, "#B d"] | Float32[Tensor, "#B H d"],
    ) -> Float32[Tensor, "B T d"]:
        """The suffix tokens: the state, then one per action."""
        if state.shape[-1] != self.state_proj.in_features:
            raise ModelError(
                f"π₀ reads a state padded to action_dim {self.state_proj.in_features}, got {list(state.shape)}."
            )
        actions = self.action_in_proj(noisy_actions)  # [B, H, d]
        time = (time_features if time_features.ndim == 3 else time_features[:, None, :]).expand_as(actions)
        mixed = self.action_time_mlp_in(torch.cat([actions, time], dim=-1))
        mixed = self.action_time_mlp_out(F.silu(mixed))
        return torch.cat([self.state_proj(state)[:, None, :], mixed], dim=1)

    def ar_mask(self, action_horizon: int, device: torch.device) -> Bool[Tensor, " T"]:
        """Two groups behind the prefix: the state, which does not see the actions, and the actions."""
        mask = torch.zeros(1 + action_horizon, dtype=torch.bool, device=device)
        mask[:2] = True
        return mask


def init_projections(module: nn.Module, generator: torch.Generator | None) -> None:
    """All linear layers in a module as in the original: lecun-normal kernels, biases 0."""
    for layer in module.modules():
        if isinstance(layer, Linear):
            lecun_normal_(layer.weight, generator)
            nn.init.zeros_(layer.bias)
