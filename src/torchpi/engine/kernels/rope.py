"""Splitting of a qkv matmul's output, RoPE for queries and keys, and writing of keys and values into the cache.

RoPE rotates a query or key head with halves (a, b) into (a·cos − b·sin, b·cos + a·sin), with K/2 angles per token. Keys
and values are written into the cache slots start … start + T.
"""

from jaxtyping import Float, Float32
from torch import Tensor

from torchpi.engine.kernels.jit import Kernel, constexpr, power_of_two, tl, token_strides
from torchpi.model.gemma import apply_rope


def split_rope(
    qkv: Float[Tensor, "B T width"],
    cos: Float32[Tensor, "#B #T half"],
    sin: Float32[Tensor, "#B #T half"],
    num_kv_heads: int,
) -> tuple[Float[Tensor, "B T Q K"], Float[Tensor, "B T G K"], Float[Tensor, "B T G K"]]:
    """Rotated queries and keys, and values; with gradients."""
    heads = qkv.unflatten(-1, (-1, 2 * cos.shape[-1]))
    num_rotated = heads.shape[2] - num_kv_heads
    rotated, values = heads.split([num_rotated, num_kv_heads], dim=2)
    rotated = apply_rope(rotated, (cos[:, :, None, :], sin[:, :, None, :]))
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
    """Return rotated queries, and write rotated keys and values into slots start … start + T."""
    q, k, v = split_rope(qkv, cos, sin, keys.shape[2])
    end = start + qkv.shape[1]
    keys[:, start:end], values[:, start:end] = k, v
    return q


@Kernel
def split_rope_store_kernel(  # one program per token, with tiles [heads, K/2]
    qkv: "tl.tensor",
    cos: "tl.tensor",
    sin: "tl.tensor",
    q: "tl.tensor",
    keys: "tl.tensor",
    values: "tl.tensor",
    num_tokens: "tl.tensor",
    start: "tl.tensor",
    angle_batch: "tl.tensor",  # strides
    angle_token: "tl.tensor",
    cache_batch: "tl.tensor",
    cache_slot: "tl.tensor",
    num_heads: constexpr,
    num_kv_heads: constexpr,
    half: constexpr,
    block_heads: constexpr,
    block_half: constexpr,
) -> None:
    row = tl.program_id(0)
    sample, token = row // num_tokens, row % num_tokens
    head, column = tl.arange(0, block_heads)[:, None], tl.arange(0, block_half)[None, :]
    inside = (head < num_heads + 2 * num_kv_heads) & (column < half)
    at = row.to(tl.int64) * (num_heads + 2 * num_kv_heads) * (2 * half) + head * (2 * half) + column
    first = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(qkv + at + half, mask=inside, other=0.0).to(tl.float32)

    angle = sample * angle_batch + token * angle_token + column
    rotated = head < num_heads + num_kv_heads
    c = tl.where(rotated, tl.load(cos + angle, mask=column < half, other=0.0), 1.0)
    s = tl.where(rotated, tl.load(sin + angle, mask=column < half, other=0.0), 0.0)
    low = (first * c - second * s).to(q.dtype.element_ty)
    high = (second * c + first * s).to(q.dtype.element_ty)

    is_q = inside & (head < num_heads)
    at = row.to(tl.int64) * num_heads * (2 * half) + head * (2 * half) + column
    tl.store(q + at, low, mask=is_q)
    tl.store(q + at + half, high, mask=is_q)
    cache = sample.to(tl.int64) * cache_batch + (start + token) * cache_slot + column
    at = cache + (head - num_heads) * (2 * half)
    is_key = inside & (head >= num_heads) & rotated
    tl.store(keys + at, low, mask=is_key)
    tl.store(keys + at + half, high, mask=is_key)
    at -= num_kv_heads * (2 * half)
    is_value = inside & (head >= num_heads + num_kv_heads)
    tl.store(values + at, low, mask=is_value)
    tl.store(values + at + half, high, mask=is_value)


def triton_split_rope_store(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    (batch, num_tokens, width), (num_kv_heads, head_dim) = qkv.shape, keys.shape[2:]
    num_heads = width // head_dim - 2 * num_kv_heads
    assert qkv.is_contiguous()
    assert token_strides(cos) == token_strides(sin)
    assert keys.stride() == values.stride()
    assert keys[0, 0].is_contiguous()
    q = qkv.new_empty(batch, num_tokens, num_heads, head_dim)
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "half": head_dim // 2}
    blocks = {"block_heads": power_of_two(width // head_dim), "block_half": power_of_two(head_dim // 2)}
    strides = (*token_strides(cos), *keys.stride()[:2])
    split_rope_store_kernel[(batch * num_tokens,)](
        qkv, cos, sin, q, keys, values, num_tokens, start, *strides, **sizes, **blocks
    )
    return q
