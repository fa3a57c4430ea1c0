"""Queries, keys and values of one matmul's output, rotated and written where attention reads them.

Head i of a token, (a, b) in halves of K/2, becomes (a·cos − b·sin, b·cos + a·sin) with the token's K/2 angles, if it
is a query's or a key's; a value's stays. Keys and values go into the cache, at slots start … start + T.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor


def split_rope(
    qkv: Float[Tensor, "B T width"],
    cos: Float32[Tensor, "#B #T half"],
    sin: Float32[Tensor, "#B #T half"],
    num_kv_heads: int,
) -> tuple[Float[Tensor, "B T Q K"], Float[Tensor, "B T G K"], Float[Tensor, "B T G K"]]:
    """Queries and keys, both rotated, and values; with gradients."""
    heads = qkv.unflatten(-1, (-1, 2 * cos.shape[-1]))
    num_rotated = heads.shape[2] - num_kv_heads
    rotated, values = heads.split([num_rotated, num_kv_heads], dim=2)
    first, second = rotated.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(qkv.dtype)
    q, k = rotated.split([num_rotated - num_kv_heads, num_kv_heads], dim=2)
    return q, k, values


def split_rope_store(
    qkv: Float[Tensor, "B T width"],
    cos: Float32[Tensor, "#B #T half"],
    sin: Float32[Tensor, "#B #T half"],
    keys: Float[Tensor, "B slots G K"],
    values: Float[Tensor, "B slots G K"],
    start: int,
) -> Float[Tensor, "B T Q K"]:
    """Rotated queries; rotated keys and values are written into slots start … start + T."""
    q, k, v = split_rope(qkv, cos, sin, keys.shape[2])
    end = start + qkv.shape[1]
    keys[:, start:end], values[:, start:end] = k, v
    return q
