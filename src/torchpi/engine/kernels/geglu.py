"""GeGLU (arXiv:2002.05202): gelu(gate)·up, alone or fused with the matmul that computes gate and up.

gelu(g) = 0.5·g·(1 + tanh u) = g·sigmoid(2u)    with u = √(2/π)·(g + 0.044715·g³)

With an `fp8_scale`, the output is rounded to e4m3 (`kernels.fp8`).
"""

from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from torchpi.engine.kernels.fp8 import BLOCK, empty_output, to_fp8
from torchpi.engine.kernels.jit import Kernel, as_output, constexpr, tl
from torchpi.model import layers


def geglu(gate_up: Float[Tensor, "B T gate_up"], fp8_scale: float | None = None) -> Float[Tensor, "B T I"]:
    """gelu(gate)·up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return to_fp8(layers.geglu(gate, up), fp8_scale)


def linear_geglu(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "gate_up D"],
    scale: Float32[Tensor, " gate_up"] | None = None,
    fp8_scale: float | None = None,
) -> Float[Tensor, "B T I"]:
    """gelu(x·Wgᵀ)·(x·Wuᵀ); the weights of gate and up are concatenated.

    Args:
        scale: scale of each output of the matmul, for x and weight in e4m3. Needs an `fp8_scale`.
    """
    if scale is None:
        return geglu(F.linear(x, weight), fp8_scale)
    return geglu(F.linear(x.float(), weight.float()) * scale, fp8_scale)


@Kernel
def geglu_kernel(
    gate_up: "tl.tensor", out: "tl.tensor", fp8_scale: "tl.tensor", width: constexpr, block: constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # 2·√(2/π)
    tl.store(out + row * width + column, as_output(activated * up, gate_up.dtype.element_ty, fp8_scale), mask=inside)


def triton_geglu(gate_up: Tensor, fp8_scale: float | None = None) -> Tensor:
    batch, num_tokens, width = gate_up.shape[0], gate_up.shape[1], gate_up.shape[2] // 2
    assert gate_up.is_contiguous()
    out = empty_output(gate_up, (batch, num_tokens, width), fp8_scale)
    geglu_kernel[(batch * num_tokens, -(-width // BLOCK))](gate_up, out, fp8_scale, width=width, block=BLOCK)
    return out


@Kernel
def linear_geglu_kernel(  # one program per block of output columns and rows
    x: "tl.tensor",
    weight: "tl.tensor",
    scale: "tl.tensor",  # None: x and weight are not in e4m3
    out: "tl.tensor",
    fp8_scale: "tl.tensor",
    num_rows: "tl.tensor",
    depth: constexpr,
    width: constexpr,
    block_rows: constexpr,
    block_columns: constexpr,
    block_depth: constexpr,
) -> None:
    column = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    row = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    gate = tl.zeros([block_rows, block_columns], tl.float32)
    up = tl.zeros([block_rows, block_columns], tl.float32)
    for start in range(0, depth, block_depth):
        k = start + tl.arange(0, block_depth)
        tile = tl.load(x + row[:, None] * depth + k[None, :], mask=(row < num_rows)[:, None] & (k < depth), other=0.0)
        at, inside = column[None, :] * depth + k[:, None], (column < width)[None, :] & (k < depth)[:, None]
        to_gate = tl.load(weight + at, mask=inside, other=0.0)
        to_up = tl.load(weight + width * depth + at, mask=inside, other=0.0)
        # max_num_imprecise_acc=0: otherwise Hopper's tensor cores accumulate fp8 in less than float32.
        gate = tl.dot(tile, to_gate, gate, input_precision="ieee", max_num_imprecise_acc=0)
        up = tl.dot(tile, to_up, up, input_precision="ieee", max_num_imprecise_acc=0)
    if scale is not None:
        gate *= tl.load(scale + column, mask=column < width, other=0.0)[None, :]
        up *= tl.load(scale + width + column, mask=column < width, other=0.0)[None, :]
    activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    stored = (row < num_rows)[:, None] & (column < width)[None, :]
    dtype = tl.float32 if scale is not None else x.dtype.element_ty
    tl.store(out + row[:, None] * width + column[None, :], as_output(activated, dtype, fp8_scale), mask=stored)


def triton_linear_geglu(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, fp8_scale: float | None = None
) -> Tensor:
    """`linear_geglu` in one launch. Its time is that of reading the weights, for up to about 64 rows."""
    (batch, num_tokens, depth), width = x.shape, weight.shape[0] // 2
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert scale is None or fp8_scale is not None
    out = empty_output(x, (batch, num_tokens, width), fp8_scale)
    num_rows = batch * num_tokens
    tile = {
        "block_rows": 64,
        "block_columns": 32,
        "block_depth": 64,
        "num_stages": 5,
    }  # stages keep many reads in flight
    grid = (-(-width // tile["block_columns"]), -(-num_rows // tile["block_rows"]))
    linear_geglu_kernel[grid](x, weight, scale, out, fp8_scale, num_rows, depth=depth, width=width, **tile)
    return out
