"""Grouped-query attention of prefix or suffix over a cache whose prefix may end in padding.

    out = softmax(q·keysᵀ / √K over the allowed keys)·values

Key j of sample b is allowed if j < valid[b], or if j ≥ num_prefix (the suffix). In the suffix, the first
`num_state_tokens` queries (π₀'s state) only attend to each other. With an `fp8_scale`, out is rounded to e4m3
(`kernels.fp8`).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torchpi.engine.kernels.fp8 import empty_output, to_fp8
from torchpi.engine.kernels.jit import Kernel, as_output, constexpr, num_processors, power_of_two, tl
from torchpi.model import layers

BLOCK_SLOTS, MAX_SPLITS = 32, 8


def attend(
    q: Float[Tensor, "B T Q K"],
    keys: Float[Tensor, "B slots G K"],
    values: Float[Tensor, "B slots G K"],
    valid: Int[Tensor, " B"],
    num_prefix: int,
    num_state_tokens: int = 0,
    fp8_scale: float | None = None,
) -> Float[Tensor, "B T heads"]:
    """Attention of all query heads. Every query needs at least one allowed key.

    Args:
        valid: number of each sample's prefix tokens, without padding.
        num_prefix: number of prefix slots, including padding; all slots if there is no suffix.
    """
    slot = torch.arange(keys.shape[1], device=valid.device)
    mask = ((slot < valid[:, None]) | (slot >= num_prefix))[:, None]  # [B, 1, slots]
    if num_state_tokens:
        mask = mask.repeat(1, q.shape[1], 1)
        mask[:, :num_state_tokens, num_prefix + num_state_tokens :] = False
    return to_fp8(layers.attend(q, keys, values, mask), fp8_scale)


@Kernel
def attend_kernel(  # one program per block of rows (queries of a group, for all tokens), split of the slots, and group
    q: "tl.tensor", keys: "tl.tensor", values: "tl.tensor", valid: "tl.tensor", out: "tl.tensor",
    fp8_scale: "tl.tensor",  # None: `out` is not rounded
    partial: "tl.tensor",  # float32 [blocks, splits, block_rows, block_dim]: outputs for the keys of one split
    logsums: "tl.tensor",  # float32 [blocks, splits, block_rows]: log2 of the softmax's denominator
    counters: "tl.tensor",  # [blocks], all 0
    num_tokens: "tl.tensor", slots: "tl.tensor", num_prefix: "tl.tensor", num_state_tokens: "tl.tensor",
    slots_per_split: "tl.tensor", cache_batch: "tl.tensor", cache_slot: "tl.tensor", scale: constexpr,
    num_heads: constexpr, num_kv_heads: constexpr, head_dim: constexpr, splits: constexpr, block_rows: constexpr,
    block_slots: constexpr, block_dim: constexpr,
) -> None:  # fmt: skip
    sample, group = tl.program_id(2) // num_kv_heads, tl.program_id(2) % num_kv_heads
    local, column = tl.arange(0, block_rows), tl.arange(0, block_dim)
    row = tl.program_id(0) * block_rows + local
    per_group: constexpr = num_heads // num_kv_heads
    token, head = row // per_group, group * per_group + row % per_group
    at_row = ((sample * num_tokens + token) * num_heads + head)[:, None] * head_dim + column[None, :]
    stored = (token < num_tokens)[:, None] & (column < head_dim)[None, :]
    query = tl.load(q + at_row, mask=stored, other=0.0)
    length, visible = tl.load(valid + sample), tl.where(token < num_state_tokens, num_prefix + num_state_tokens, slots)

    maximum = tl.full([block_rows], -1e30, tl.float32)  # finite: no NaN where a block has no allowed key
    total, mixed = tl.zeros([block_rows], tl.float32), tl.zeros([block_rows, block_dim], tl.float32)
    first, cache = tl.program_id(1) * slots_per_split, sample.to(tl.int64) * cache_batch + group * head_dim
    for start in range(first, tl.minimum(first + slots_per_split, slots), block_slots):
        slot = start + tl.arange(0, block_slots)
        at = cache + slot[:, None] * cache_slot + column[None, :]
        inside = (slot < slots)[:, None] & (column < head_dim)[None, :]
        logits = tl.dot(query, tl.trans(tl.load(keys + at, mask=inside, other=0.0)), input_precision="ieee") * scale
        allowed = ((slot < length) | (slot >= num_prefix))[None, :] & (slot[None, :] < visible[:, None])
        logits = tl.where(allowed, logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        shrink, weights = tl.exp2(maximum - new_maximum), tl.exp2(logits - new_maximum[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        value = tl.load(values + at, mask=inside, other=0.0)
        mixed = tl.dot(weights.to(value.dtype), value, mixed * shrink[:, None], input_precision="ieee")
        maximum = new_maximum

    total = tl.maximum(total, 1e-30)  # 0 in a split without an allowed key
    mixed /= total[:, None]
    if splits > 1:
        block = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        part = block * splits + tl.program_id(1)
        at_part = local[:, None] * block_dim + column[None, :]
        tl.store(partial + part * block_rows * block_dim + at_part, mixed)
        tl.store(logsums + part * block_rows + local, maximum + tl.log2(total))
        tl.debug_barrier()  # all threads must have written their part before the program increments the counter
        if tl.atomic_add(counters + block, 1, sem="acq_rel") == splits - 1:  # the last program combines all parts
            tl.store(counters + block, 0)
            total, mixed = tl.zeros_like(total), tl.zeros_like(mixed)
            for part in range(block * splits, (block + 1) * splits):
                maximum = tl.maximum(maximum, tl.load(logsums + part * block_rows + local, cache_modifier=".cg"))
            for part in range(block * splits, (block + 1) * splits):
                weight = tl.exp2(tl.load(logsums + part * block_rows + local, cache_modifier=".cg") - maximum)
                other = tl.load(partial + part * block_rows * block_dim + at_part, cache_modifier=".cg")
                total += weight
                mixed += other * weight[:, None]
            tl.store(out + at_row, as_output(mixed / total[:, None], q.dtype.element_ty, fp8_scale), mask=stored)
    else:
        tl.store(out + at_row, as_output(mixed, q.dtype.element_ty, fp8_scale), mask=stored)


class TritonAttention:
    """`attend` in one launch. An instance is for one stream at a time, because a launch uses its counters."""

    def __init__(self) -> None:
        self._counters: dict[torch.device, Tensor] = {}

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, num_prefix: int, num_state_tokens: int = 0,
        fp8_scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        (batch, num_tokens, num_heads, head_dim), (_, slots, groups, _) = q.shape, keys.shape
        assert q.is_contiguous()
        assert keys.stride() == values.stride()
        assert keys[0, 0].is_contiguous()
        num_rows, processors = num_tokens * num_heads // groups, num_processors(q.device)
        # Large blocks read the keys fewer times; small ones and splits over the keys occupy more processors.
        many = -(-num_rows // 64) * batch * groups > processors // 2
        block_rows, num_warps, num_stages = (64, 8, 2) if many else (32, 4, 3)
        row_blocks = -(-num_rows // block_rows)
        blocks = row_blocks * batch * groups
        splits = 1 if many else max(1, min(MAX_SPLITS, processors // blocks))
        slots_per_split = -(-slots // (splits * BLOCK_SLOTS)) * BLOCK_SLOTS
        splits = -(-slots // slots_per_split)
        out = empty_output(q, (batch, num_tokens, num_heads * head_dim), fp8_scale)
        block_dim = max(16, power_of_two(head_dim))
        workspace: tuple[Tensor | None, ...] = (None, None, None)
        if splits > 1:  # there are fewer blocks than processors
            if q.device not in self._counters:
                self._counters[q.device] = torch.zeros(processors, dtype=torch.int32, device=q.device)
            partial = q.new_empty(blocks, splits, block_rows, block_dim, dtype=torch.float32)
            logsums = q.new_empty(blocks, splits, block_rows, dtype=torch.float32)
            workspace = partial, logsums, self._counters[q.device]
        sizes = {"num_heads": num_heads, "num_kv_heads": groups, "head_dim": head_dim, "splits": splits}
        sizes |= {"block_rows": block_rows, "block_slots": BLOCK_SLOTS, "block_dim": block_dim}
        counts = (num_tokens, slots, num_prefix, num_state_tokens, slots_per_split, *keys.stride()[:2])
        options = {"scale": head_dim**-0.5 * math.log2(math.e), "num_warps": num_warps, "num_stages": num_stages}
        # Without a limit, ptxas spills a few registers to fit a third program per processor.
        options["maxnreg"] = 255
        launch = attend_kernel[(row_blocks, splits, batch * groups)]
        launch(q, keys, values, valid, out, fp8_scale, *workspace, *counts, **sizes, **options)
        return out
