"""Layers shared by SigLIP and Gemma: linear layer, attention, initialization; and checks of arguments."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from torchpi.errors import ModelError, is_whole


class Linear(nn.Linear):
    """Linear layer that computes in the dtype of its input, whatever the dtype of its weights.

    With float32 weights and bfloat16 activations this is mixed-precision training without autocast.
    """

    def reset_parameters(self) -> None:
        """Do nothing: `Pi0.init_weights` or a checkpoint fills the weights."""

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """Compute x·Wᵀ + b in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def rows(self, x: Float[Tensor, "*batch i"], first: int) -> Float[Tensor, "*batch rows"]:
        """Compute the outputs of `forward` from index `first` on."""
        bias = None if self.bias is None else self.bias[first:].to(x.dtype)
        return F.linear(x, self.weight[first:].to(x.dtype), bias)


def attend(
    q: Float[Tensor, "B T Q K"],
    k: Float[Tensor, "B keys G K"],
    v: Float[Tensor, "B keys G K"],
    mask: Bool[Tensor, "B #T keys"] | None,
) -> Float[Tensor, "B T heads"]:
    """Grouped-query attention with scale K^-0.5 and softmax in float32.

    The Q/G query heads that share a key/value head become rows of one longer query, so that keys and values are read
    once instead of being copied per head.

    Args:
        mask: True where a query may attend to a key, with one row for all queries or one per query; None: every key.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    groups = k.shape[2]
    per_group = num_heads // groups
    q = q.reshape(batch, num_queries, groups, per_group, head_dim).permute(0, 2, 3, 1, 4)  # [B, G, Q/G, T, K]
    q = q.reshape(batch, groups, per_group * num_queries, head_dim)
    if mask is not None:
        if mask.shape[1] != 1:
            mask = mask.repeat(1, per_group, 1)  # [B, Q/G·T, keys]
        mask = mask[:, None]
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    out = out.reshape(batch, groups, per_group, num_queries, head_dim).permute(0, 3, 1, 2, 4)  # [B, T, G, Q/G, K]
    return out.reshape(batch, num_queries, num_heads * head_dim)


def gelu_tanh(x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch i"]:
    """GELU in its tanh form, 0.5·x·(1 + tanh u) = x·sigmoid(2u) with u = √(2/π)·(x + 0.044715·x³)."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype is not torch.float32:
        return F.gelu(x, approximate="tanh")
    # Half the time of PyTorch's function on a CPU.
    two_u = (x * x).mul_(0.044715).add_(1).mul_(x).mul_(2 * (2 / math.pi) ** 0.5)
    return two_u.sigmoid_().mul_(x)


def geglu(gate: Float[Tensor, "*batch i"], up: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch i"]:
    """gelu(gate)·up (arXiv:2002.05202)."""
    activated = gelu_tanh(gate)
    return activated * up if torch.is_grad_enabled() else activated.mul_(up)  # in place: no new buffer in inference


def float32_layer_norm(norm: nn.LayerNorm, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch i"]:
    """LayerNorm computed in float32, returned in x's dtype."""
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps).to(x.dtype)


def lecun_normal_(weight: Tensor, generator: torch.Generator | None) -> None:
    """Fill a linear weight [out, in] as flax's lecun_normal: normal truncated at two deviations, variance 1/in."""
    # The constant is the deviation of a standard normal truncated at ±2; dividing by it gives the variance 1/in.
    std = weight.shape[1] ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def embed_tokens(ids: Int[Tensor, "B L"], table: Float[Tensor, "V D"]) -> Float[Tensor, "B L D"]:
    """Look up token embeddings; an id out of range is a ModelError (on a GPU, a device-side assertion)."""
    try:
        return F.embedding(ids, table)
    except IndexError as error:
        raise ModelError(
            f"The prompt has token ids from {ids.min()} to {ids.max()}; the model's embedding has 0 to "
            f"{len(table) - 1}. Was it tokenized for another model?"
        ) from error


def require_shape(name: str, value: Any, *shapes: Sequence[int]) -> None:
    """Raise a ModelError unless `value` is a tensor of one of the shapes (of any shape if none is passed).

    A wrong batch size or horizon would otherwise be broadcast, or fail deep inside the attention.
    """
    if isinstance(value, Tensor) and (not shapes or tuple(value.shape) in map(tuple, shapes)):
        return
    found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    expected = f" {' or '.join(str(list(shape)) for shape in shapes)}" if shapes else ""
    raise ModelError(f"{name} must be a float32 tensor{expected}, got {found}.")


def require_count(name: str, value: Any) -> None:
    """Raise a ModelError unless `value` is a positive integer."""
    if not is_whole(value) or value < 1:
        raise ModelError(f"{name} must be a positive integer, got {value!r}.")
