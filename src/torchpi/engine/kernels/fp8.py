"""Rounding of activations to e4m3 for an fp8 matmul, fused into the operation that computes them.

    q(x) = e4m3(x / scale)      clamped to ±448, e4m3's largest number

An operation before an fp8 matmul takes the matmul's scale as `fp8_scale`. It rounds its output to its input's dtype, as
without a scale, and then to e4m3. `to_fp8` rounds tensors from other operations.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from torchpi.engine.kernels.jit import Kernel, as_output, constexpr, tl

LARGEST_E4M3 = 448.0
BLOCK = 1024


def to_fp8(x: Float[Tensor, "*batch i"], scale: float | None) -> Float[Tensor, "*batch i"]:
    """q(x); x itself without a scale."""
    if scale is None:
        return x
    return (x.float() / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)


@Kernel
def to_fp8_kernel(
    x: "tl.tensor", out: "tl.tensor", fp8_scale: "tl.tensor", size: "tl.tensor", block: constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    rounded = as_output(tl.load(x + at, mask=at < size, other=0.0), x.dtype.element_ty, fp8_scale)
    tl.store(out + at, rounded, mask=at < size)


def triton_to_fp8(x: Tensor, scale: float | None) -> Tensor:
    """`to_fp8` in one launch, or none."""
    if scale is None:
        return x
    x = x.contiguous()
    out = empty_output(x, x.shape, scale)
    to_fp8_kernel[(-(-x.numel() // BLOCK),)](x, out, scale, x.numel(), block=BLOCK)
    return out


def empty_output(x: Tensor, shape: torch.Size | tuple[int, ...], fp8_scale: float | None) -> Tensor:
    """Uninitialized output in x's dtype, or in e4m3 if there is a scale."""
    return x.new_empty(shape, dtype=x.dtype if fp8_scale is None else torch.float8_e4m3fn)
