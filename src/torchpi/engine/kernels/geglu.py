"""GeGLU (arXiv:2002.05202): gelu(gate)·up, alone and behind the matmul that computes gate and up.

gelu(g) = 0.5·g·(1 + tanh u) = g·sigmoid(2u)    with u = √(2/π)·(g + 0.044715·g³)
"""

from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from torchpi.engine.kernels.jit import Kernel, constexpr
from torchpi.model.layers import gelu_tanh

if TYPE_CHECKING:
    import triton.language as tl


def geglu(gate_up: Float[Tensor, "B T gate_up"]) -> Float[Tensor, "B T I"]:
    """gelu(gate)·up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu_tanh(gate) * up


def linear_geglu(x: Float[Tensor, "B T D"], weight: Float[Tensor, "gate_up D"]) -> Float[Tensor, "B T I"]:
    """gelu(x·Wgᵀ)·(x·Wuᵀ) with the weights of gate and up one behind the other."""
    return geglu(F.linear(x, weight))


@Kernel
def geglu_kernel(gate_up: Any, out: Any, width: constexpr, block: constexpr) -> None:  # a program per block
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
    block = 1024
    geglu_kernel[(batch * num_tokens, -(-width // block))](gate_up, out, width=width, block=block)
    return out
