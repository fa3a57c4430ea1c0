"""Gemma: a stack of decoder layers, used both as the backbone (over the prefix) and as the action expert.

Sources: Gemma (arXiv:2403.08295), GeGLU (arXiv:2002.05202), RoPE (arXiv:2104.09864), AdaRMSNorm with gates as in DiT
(arXiv:2212.09748), conditioned on the flow-matching time as in π₀.₅ (arXiv:2504.16054).
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from torchpi.config import GemmaConfig
from torchpi.model.layers import Linear, attend, geglu, lecun_normal_

RMS_NORM_EPS = 1e-6
ROPE_MAX_WAVELENGTH = 10_000.0

Rope = tuple[Tensor, Tensor]  # cosine and sine, float32 [B, S, 1, K/2]
Modulation = Tensor  # float [B or 1, T or 1, 3d]: scale, shift and gate of one AdaRMSNorm


class KeyValue(NamedTuple):  # a tuple, because FSDP finds tensors only in built-in containers
    """Keys (after RoPE) and values of one layer for the prefix, optionally with free slots for a suffix."""

    keys: Float[Tensor, "B slots G K"]
    values: Float[Tensor, "B slots G K"]
    length: int
    """S: number of slots filled by the prefix."""

    def with_room(self, num_tokens: int) -> "KeyValue":
        """Copy to buffers with `num_tokens` free slots, which `extended` fills."""
        batch, _, *shape = self.keys.shape
        keys, values = (self.keys.new_empty(batch, self.length + num_tokens, *shape) for _ in range(2))
        keys[:, : self.length], values[:, : self.length] = self.keys, self.values
        return KeyValue(keys, values, self.length)

    def repeat(self, times: int) -> "KeyValue":
        """Repeat each sample `times` times in a row."""
        return KeyValue(self.keys.repeat_interleave(times, 0), self.values.repeat_interleave(times, 0), self.length)

    def extended(self, k: Float[Tensor, "B T G K"], v: Float[Tensor, "B T G K"]) -> tuple[Tensor, Tensor]:
        """Append the keys and values of a suffix to those of the prefix.

        They are written into the free slots in place. Autograd does not allow that: with gradients enabled, or without
        free slots, they are concatenated.
        """
        if torch.is_grad_enabled() or self.keys.shape[1] == self.length:
            prefix_keys, prefix_values = self.keys[:, : self.length], self.values[:, : self.length]
            return torch.cat([prefix_keys, k], dim=1), torch.cat([prefix_values, v], dim=1)
        self.keys[:, self.length :], self.values[:, self.length :] = k, v
        return self.keys, self.values


def rope_table(positions: Int[Tensor, "B S"], head_dim: int) -> Rope:
    """Cosine and sine of the rotation angles, shared by all layers and heads."""
    exponent = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device) * (2.0 / head_dim)
    angle = positions[:, :, None].float() / ROPE_MAX_WAVELENGTH**exponent  # [B, S, K/2]
    return angle.cos()[:, :, None, :], angle.sin()[:, :, None, :]


def apply_rope(x: Float[Tensor, "B S heads K"], rope: Rope) -> Float[Tensor, "B S heads K"]:
    """Rotate each pair (i, i + K/2) by its angle, in float32."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def over_rms(x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
    """x / rms(x), computed and returned in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + RMS_NORM_EPS)


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + scale), computed in float32. It has no gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "B S D"], modulation: None = None) -> tuple[Float[Tensor, "B S D"], None]:
        """Normalize x; the result has x's dtype."""
        return (over_rms(x) * (1 + self.scale.float())).to(x.dtype), None

    def init_weights(self) -> None:
        """Set the scale to 0: x / rms(x) at initialization."""
        nn.init.zeros_(self.scale)


class AdaRMSNorm(nn.Module):
    """x / rms(x) · (1 + scale) + shift; scale, shift and the residual's gate are linear in the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, 3 * width)

    def modulation(self, cond: Float[Tensor, "B d"] | Float[Tensor, "B T d"]) -> Modulation:
        """Compute scale, shift and gate, concatenated: [B, 1, 3d] for one condition per sample, else [B, T, 3d]."""
        modulation: Tensor = self.dense(cond)
        return modulation if cond.ndim == 3 else modulation[:, None, :]

    def forward(
        self, x: Float[Tensor, "B T d"], modulation: Float[Tensor, "#B #T 3*d"]
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "#B #T d"]]:
        """Normalize and modulate x (in x's dtype); also return the gate for the output of the following sublayer."""
        scale, shift, gate = modulation.chunk(3, dim=-1)
        return torch.addcmul(shift.float(), over_rms(x), 1 + scale.float()).to(x.dtype), gate

    def init_weights(self) -> None:
        """Set all weights to 0: every gate is closed and the stack is the identity at initialization."""
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)


def add_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + y, or x + y · gate after an AdaRMSNorm."""
    return x + y if gate is None else x + y * gate


class Attention(nn.Module):
    """Grouped-query attention with RoPE; queries, keys and values come from one matmul."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.q_width = config.num_heads * config.head_dim
        self.qkv = Linear(config.width, self.q_width + 2 * config.num_kv_heads * config.head_dim, bias=False)
        self.out = Linear(self.q_width, config.width, bias=False)

    def project(
        self, x: Float[Tensor, "B S D"], rope: Rope
    ) -> tuple[Float[Tensor, "B S Q K"], Float[Tensor, "B S G K"], Float[Tensor, "B S G K"]]:
        """Compute queries, keys (both after RoPE) and values."""
        q, kv = self.qkv(x).tensor_split([self.q_width], dim=-1)
        k, v = self._split_key_value(kv)
        return apply_rope(q.unflatten(-1, (-1, self.config.head_dim)), rope), apply_rope(k, rope), v

    def key_value(self, x: Float[Tensor, "B S D"], rope: Rope) -> KeyValue:
        """Compute keys (after RoPE) and values only."""
        k, v = self._split_key_value(self.qkv.rows(x, self.q_width))
        return KeyValue(apply_rope(k, rope), v, x.shape[1])

    def _split_key_value(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        k, v = kv.unflatten(-1, (2, self.config.num_kv_heads, self.config.head_dim)).unbind(dim=2)
        return k, v

    def forward(
        self, x: Float[Tensor, "B T D"], rope: Rope, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Float[Tensor, "B T D"], KeyValue]:
        """Attend to `past` (if any) and to x; also return the keys and values of x."""
        q, k, v = self.project(x, rope)
        keys, values = (k, v) if past is None else past.extended(k, v)
        return self.out(attend(q, keys, values, mask)), KeyValue(k, v, x.shape[1])


class FeedForward(nn.Module):
    """GeGLU: (gelu(x·Wg) * (x·Wu))·Wd; gate and up come from one matmul."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.width, 2 * config.mlp_dim, bias=False)
        self.down = Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(geglu(gate, up))


class Block(nn.Module):
    """One decoder layer: norm, attention, residual, norm, feed-forward, residual."""

    def __init__(self, config: GemmaConfig, norm: type[RMSNorm] | type[AdaRMSNorm]) -> None:
        super().__init__()
        self.pre_attention_norm = norm(config.width)
        self.attention = Attention(config)
        self.pre_ffw_norm = norm(config.width)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rope: Rope,
        mask: Tensor | None,
        past: KeyValue | None,
        modulations: tuple[Modulation | None, Modulation | None],
    ) -> tuple[Float[Tensor, "B T D"], KeyValue]:
        """Run the layer; also return the keys and values of x."""
        y, gate = self.pre_attention_norm(x, modulations[0])
        y, key_value = self.attention(y, rope, mask, past)
        x = add_residual(x, y, gate)
        y, gate = self.pre_ffw_norm(x, modulations[1])
        return add_residual(x, self.feed_forward(y), gate), key_value


class Gemma(nn.Module):
    """Decoder layers and a final norm. The token embedding belongs to `Pi0`, because the expert has none."""

    def __init__(self, config: GemmaConfig, *, adaptive_norm: bool) -> None:
        super().__init__()
        self.config = config
        norm = AdaRMSNorm if adaptive_norm else RMSNorm
        # Cast, because the elements of a ModuleList have no static type.
        self.layers = cast("Sequence[Block]", nn.ModuleList(Block(config, norm) for _ in range(config.depth)))
        self.final_norm = norm(config.width)

    def norms(self) -> list[nn.Module]:
        """All 2·depth + 1 norms, in the order of the forward pass."""
        inside = [norm for layer in self.layers for norm in (layer.pre_attention_norm, layer.pre_ffw_norm)]
        return [*inside, self.final_norm]

    def modulations(self, cond: Float[Tensor, "B d"] | Float[Tensor, "B T d"]) -> list[Modulation]:
        """Compute scale, shift and gate of every AdaRMSNorm, in the order of `norms`.

        Args:
            cond: one condition per sample, or one per token.
        """
        return [norm.modulation(cond) for norm in self.norms() if isinstance(norm, AdaRMSNorm)]

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rope: Rope,
        mask: Bool[Tensor, "B #T keys"] | None,
        *,
        past: Sequence[KeyValue] | None = None,
        modulations: Sequence[Modulation] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], list[KeyValue]]:
        """Run the stack.

        Args:
            x: embedded tokens.
            rope: `rope_table` of their positions.
            mask: True where a query may attend to a key (of `past`, then of x); None: every key.
            past: per layer, keys and values that precede those of x.
            modulations: output of `self.modulations`, for a stack with AdaRMSNorm.

        Returns:
            The output of the final norm, and per layer the keys and values of x.
        """
        per_norm: Sequence[Modulation | None] = modulations or [None] * (2 * len(self.layers) + 1)
        key_values = []
        for i, layer in enumerate(self.layers):
            x, key_value = layer(x, rope, mask, past[i] if past else None, (per_norm[2 * i], per_norm[2 * i + 1]))
            key_values.append(key_value)
        # The gate of the final norm is unused: no residual follows.
        return self.final_norm(x, per_norm[-1])[0], key_values

    def keys_and_values(
        self, x: Float[Tensor, "B S D"], rope: Rope, mask: Bool[Tensor, "B #S S"] | None
    ) -> list[KeyValue]:
        """Compute the keys and values of x per layer; skips everything in the last layer that they don't need."""
        key_values = []
        *front, last = self.layers
        for layer in front:
            x, key_value = layer(x, rope, mask, None, (None, None))
            key_values.append(key_value)
        y, _ = last.pre_attention_norm(x, None)
        return [*key_values, last.attention.key_value(y, rope)]

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Initialize the weights as openpi does: norms 0, all matrices lecun-normal over their fan-in."""
        for module in self.modules():
            if isinstance(module, RMSNorm | AdaRMSNorm):
                module.init_weights()
            elif isinstance(module, Attention):
                lecun_normal_(module.qkv.weight, generator)
                lecun_normal_(module.out.weight, generator)
            elif isinstance(module, FeedForward):
                lecun_normal_(module.gate_up.weight, generator)
                lecun_normal_(module.down.weight, generator)
