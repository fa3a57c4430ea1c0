"""The suffix: tokens of the action expert, made from noisy actions, state and time. π₀ and π₀.₅ differ here.

Everything is computed in float32: these projections are small, and the Euler steps integrate x_t.
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
    """Inputs of the action expert that depend only on the time."""

    time: Float32[Tensor, "*B"] | float
    """t: one per sample, one per action, or a float for the whole batch."""
    features: Float32[Tensor, "#B d"] | Float32[Tensor, "#B H d"]
    """Output of the suffix's `time_features`."""
    modulations: Sequence[Tensor] | None
    """Scale, shift and gate of each AdaRMSNorm, [#B, 1 or T, 3d]; None for π₀."""


class TimeEmbedding:
    """`posemb_sincos` with the frequencies cached on the device: copying them in each call would make a GPU wait."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._on_host = self._frequencies = angular_frequencies(dim // 2)

    def __call__(self, time: Float32[Tensor, "*B"]) -> Float32[Tensor, "*B d"]:
        if self._frequencies.device != time.device:
            with torch.inference_mode(False):  # the next call may be training
                self._frequencies = self._on_host.to(time.device)
        return posemb_sincos(time.flatten(), self.dim, frequencies=self._frequencies).unflatten(0, time.shape)


class Pi05Suffix(nn.Module):
    """Suffix of π₀.₅: one token per action; the time conditions every AdaRMSNorm."""

    num_state_tokens = 0

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        width = config.action_expert.width
        self.action_in_proj = Linear(config.action_dim, width)
        self.embed_time = TimeEmbedding(width)
        self.time_mlp_in = Linear(width, width)
        self.time_mlp_out = Linear(width, width)

    def time_features(self, time: Float32[Tensor, "*B"]) -> Float32[Tensor, "*B d"]:
        """Embed the time (one per sample or per action) and apply the MLP."""
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(self.embed_time(time)))))

    def condition(self, time_features: Float32[Tensor, "*B d"]) -> Float32[Tensor, "*B d"] | None:
        """Condition of the expert's norms (adarms_cond): the time features."""
        return time_features

    def forward(
        self,
        state: Float32[Tensor, "B A"],
        noisy_actions: Float32[Tensor, "B H A"],
        time_features: Float32[Tensor, "#B d"] | Float32[Tensor, "#B H d"],
    ) -> Float32[Tensor, "B T d"]:
        """Embed the suffix tokens, one per action. The state is ignored: it is in the prompt text."""
        return self.action_in_proj(noisy_actions)

    def ar_mask(self, action_horizon: int, device: torch.device) -> Bool[Tensor, " T"]:
        """One group after the prefix: all actions attend to each other."""
        mask = torch.zeros(action_horizon, dtype=torch.bool, device=device)
        mask[0] = True
        return mask


class Pi0Suffix(nn.Module):
    """Suffix of π₀: a state token, then one token per action with the time mixed in. The norms have no condition."""

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
        """Embed the time (one per sample or per action)."""
        return self.embed_time(time)

    def condition(self, time_features: Float32[Tensor, "*B d"]) -> None:
        """No condition: the time is mixed into the tokens."""
        return

    def forward(
        self,
        state: Float32[Tensor, "B A"],
        noisy_actions: Float32[Tensor, "B H A"],
        time_features: Float32[Tensor, "#B d"] | Float32[Tensor, "#B H d"],
    ) -> Float32[Tensor, "B T d"]:
        """Embed the suffix tokens: the state, then one token per action."""
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
        """Two groups after the prefix: the state, which does not attend to the actions, then the actions."""
        mask = torch.zeros(1 + action_horizon, dtype=torch.bool, device=device)
        mask[:2] = True
        return mask


def init_projections(module: nn.Module, generator: torch.Generator | None) -> None:
    """Initialize all linear layers of a module as openpi does: lecun-normal weights, biases 0."""
    for layer in module.modules():
        if isinstance(layer, Linear):
            lecun_normal_(layer.weight, generator)
            nn.init.zeros_(layer.bias)
