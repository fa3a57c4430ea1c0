"""Norms of the residual stream, fused with the residual before them.

    n = x / sqrt(mean(x²) + ε)                   RMSNorm; its 1 + scale is folded into the matmul after it
    n = x / sqrt(mean(x²) + ε)·(1 + scale) + shift          AdaRMSNorm
    n = (x − mean(x)) / sqrt(var(x) + ε)·weight + bias      LayerNorm

With a residual, x is x + y or x + y·gate, rounded to x's dtype before it is normalized, as in the plain model. With an
`fp8_scale`, n is rounded to e4m3 (`kernels.fp8`). A modulation is the concatenation of scale, shift and gate of an
AdaRMSNorm. The gate is for the sublayer after the norm, and so for the residual of the *next* norm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from torchpi.engine.kernels.fp8 import empty_output, to_fp8
from torchpi.engine.kernels.jit import Kernel, as_output, constexpr, power_of_two, tl, token_strides
from torchpi.model.gemma import RMS_NORM_EPS, over_rms
from torchpi.model.siglip import LAYER_NORM_EPS


def rms_norm(
    x: Float[Tensor, "B T D"], y: Float[Tensor, "B T D"] | None = None, fp8_scale: float | None = None
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """x + y, and its norm's output."""
    x = x if y is None else x + y
    return x, to_fp8(over_rms(x).to(x.dtype), fp8_scale)


def ada_rms_norm(
    x: Float[Tensor, "B T d"],
    modulation: Float[Tensor, "#B #T 3*d"],
    y: Float[Tensor, "B T d"] | None = None,
    gate_modulation: Float[Tensor, "#B #T 3*d"] | None = None,
    fp8_scale: float | None = None,
) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T d"]]:
    """x + y·gate, with the gate of the norm before y's sublayer, and its norm's output with `modulation`."""
    if y is not None and gate_modulation is not None:
        gate = gate_modulation.chunk(3, dim=-1)[2]
        x = (x.float() + y.float() * gate.float()).to(x.dtype)
    scale, shift, _ = modulation.float().chunk(3, dim=-1)
    return x, to_fp8((over_rms(x) * (1 + scale) + shift).to(x.dtype), fp8_scale)


def layer_norm(
    x: Float[Tensor, "B T W"],
    weight: Float[Tensor, " W"],
    bias: Float[Tensor, " W"],
    y: Float[Tensor, "B T W"] | None = None,
    fp8_scale: float | None = None,
) -> tuple[Float[Tensor, "B T W"], Float[Tensor, "B T W"]]:
    """x + y, and its norm's output."""
    x = x if y is None else x + y
    n = F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), LAYER_NORM_EPS).to(x.dtype)
    return x, to_fp8(n, fp8_scale)


@Kernel
def norm_kernel(  # one program per token
    x: "tl.tensor",
    y: "tl.tensor",  # None: no residual
    gate: "tl.tensor",  # None: 1
    scale: "tl.tensor",  # None: the norm has neither scale nor shift
    shift: "tl.tensor",
    total: "tl.tensor",
    normed: "tl.tensor",
    fp8_scale: "tl.tensor",  # None: `normed` is not rounded
    num_tokens: "tl.tensor",
    gate_batch: "tl.tensor",  # strides of batch and token
    gate_token: "tl.tensor",
    scale_batch: "tl.tensor",
    scale_token: "tl.tensor",
    width: constexpr,
    block: constexpr,
    centered: constexpr,  # LayerNorm
    eps: constexpr,
) -> None:
    row = tl.program_id(0)
    sample, token = row // num_tokens, row % num_tokens
    column = tl.arange(0, block)
    inside = column < width
    at = row.to(tl.int64) * width + column
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        added = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            gate += sample * gate_batch + token * gate_token
            added *= tl.load(gate + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (wide + added).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    if centered:
        wide = tl.where(inside, wide - tl.sum(wide, axis=0) / width, 0.0)
    out = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    if scale is not None:
        at_scale = sample * scale_batch + token * scale_token + column
        factor = tl.load(scale + at_scale, mask=inside, other=0.0).to(tl.float32)
        out *= factor if centered else 1 + factor
        out += tl.load(shift + at_scale, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, as_output(out, x.dtype.element_ty, fp8_scale), mask=inside)


def _launch(
    x: Tensor, y: Tensor | None, gate: Tensor | None, affine: Sequence[Tensor], fp8_scale: float | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """x + y·gate and its norm's output, in one launch. `affine` is scale and shift, or empty."""
    assert x.is_contiguous()
    assert y is None or y.is_contiguous()
    total, normed = x if y is None else torch.empty_like(x), empty_output(x, x.shape, fp8_scale)
    scale, shift = affine or (None, None)
    strides = [(0, 0) if table is None else token_strides(table) for table in (gate, scale)]
    batch, num_tokens, width = x.shape
    options |= {"width": width, "block": power_of_two(width)}
    norm_kernel[(batch * num_tokens,)](
        x, y, gate, scale, shift, total, normed, fp8_scale, num_tokens, *strides[0], *strides[1], **options
    )
    return total, normed


_RMS: Mapping[str, Any] = {"centered": False, "eps": RMS_NORM_EPS}
_LAYER: Mapping[str, Any] = {"centered": True, "eps": LAYER_NORM_EPS}


def triton_rms_norm(x: Tensor, y: Tensor | None = None, fp8_scale: float | None = None) -> tuple[Tensor, Tensor]:
    return _launch(x, y, None, (), fp8_scale, **_RMS)


def triton_ada_rms_norm(
    x: Tensor,
    modulation: Tensor,
    y: Tensor | None = None,
    gate_modulation: Tensor | None = None,
    fp8_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    gate = None if gate_modulation is None else gate_modulation.chunk(3, dim=-1)[2]
    return _launch(x, y, gate, modulation.chunk(3, dim=-1)[:2], fp8_scale, **_RMS)


def triton_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, y: Tensor | None = None, fp8_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    return _launch(x, y, None, (weight[None, None], bias[None, None]), fp8_scale, **_LAYER)
