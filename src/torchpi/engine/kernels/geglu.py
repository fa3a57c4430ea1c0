"""GeGLU (arXiv:2002.05202): gelu(gate)·up, alone and behind the matmul that computes gate and up.

gelu(g) = 0.5·g·(1 + tanh u) = g·sigmoid(2u)    with u = √(2/π)·(g + 0.044715·g³)
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from torchpi.engine.kernels.jit import Kernel, constexpr, tl
from torchpi.model.layers import gelu_tanh


def geglu(gate_up: Float[Tensor, "B T gate_up"]) -> Float[Tensor, "B T I"]:
    """gelu(gate)·up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu_tanh(gate) * up


def linear_geglu(x: Float[Tensor, "B T D"], weight: Float[Tensor, "gate_up D"]) -> Float[Tensor, "B T I"]:
    """gelu(x·Wgᵀ)·(x·Wuᵀ) with the weights of gate and up one behind the other."""
    return geglu(F.linear(x, weight))


@Kernel
def geglu_kernel(gate_up: "tl.tensor", out: "tl.tensor", width: constexpr, block: constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # 2·√(2/π)
    tl.store(out + row * width + column, (activated * up).to(out.dtype.element_ty), mask=inside)


def triton_geglu(gate_up: Tensor) -> Tensor:
    """`geglu` in one launch."""
    batch, num_tokens, width = gate_up.shape[0], gate_up.shape[1], gate_up.shape[2] // 2
    assert gate_up.is_contiguous()
    out = gate_up.new_empty(batch, num_tokens, width)
    geglu_kernel[(batch * num_tokens, -(-width // 1024))](gate_up, out, width=width, block=1024)
    return out


@Kernel
def linear_geglu_kernel(  # a program per block of output columns, and of rows
    x: "tl.tensor",
    weight: "tl.tensor",
    out: "tl.tensor",
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
        gate = tl.dot(tile, tl.load(weight + at, mask=inside, other=0.0), gate, input_precision="ieee")
        up = tl.dot(tile, tl.load(weight + width * depth + at, mask=inside, other=0.0), up, input_precision="ieee")
    activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    stored = (row < num_rows)[:, None] & (column < width)[None, :]
    tl.store(out + row[:, None] * width + column[None, :], activated.to(out.dtype.element_ty), mask=stored)


def triton_linear_geglu(x: Tensor, weight: Tensor) -> Tensor:
    """`linear_geglu` in one launch, whose time is that of reading the weights: for up to some 64 rows."""
    (batch, num_tokens, depth), width = x.shape, weight.shape[0] // 2
    assert x.is_contiguous()
    assert weight.is_contiguous()
    out = x.new_empty(batch, num_tokens, width)
    num_rows = batch * num_tokens
    tile = {"block_rows": 64, "block_columns": 32, "block_depth": 64, "num_stages": 5}  # many reads in flight
    grid = (-(-width // tile["block_columns"]), -(-num_rows // tile["block_rows"]))
    linear_geglu_kernel[grid](x, weight, out, num_rows, depth=depth, width=width, **tile)
    return out
