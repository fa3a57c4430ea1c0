"""Norms of the residual stream, fused with the residual that comes before them.

    n = x / sqrt(mean(x²) + ε)                   RMSNorm; its 1 + scale is folded into the matmul behind it
    n = x / sqrt(mean(x²) + ε)·(1 + scale) + shift          AdaRMSNorm
    n = (x − mean(x)) / sqrt(var(x) + ε)·weight + bias      LayerNorm

With a residual, x is x + y or x + y·gate, rounded to its dtype before it is normalized, as it is in the plain model.
A modulation is scale, shift and gate of one AdaRMSNorm, one behind the other. A norm's gate belongs to the sublayer
behind it, and so to the residual of the *next* norm.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from torchpi.model.gemma import RMS_NORM_EPS
from torchpi.model.siglip import LAYER_NORM_EPS


def rms_norm(x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """x / rms(x)."""
    return _over_rms(x).to(x.dtype)


def residual_rms_norm(
    x: Float[Tensor, "B T D"], y: Float[Tensor, "B T D"]
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """x + y, and it normalized."""
    x = x + y
    return x, rms_norm(x)


def ada_rms_norm(x: Float[Tensor, "B T d"], modulation: Float[Tensor, "#B #T 3*d"]) -> Float[Tensor, "B T d"]:
    """x / rms(x)·(1 + scale) + shift."""
    scale, shift, _ = modulation.float().chunk(3, dim=-1)
    return (_over_rms(x) * (1 + scale) + shift).to(x.dtype)


def gated_residual_ada_rms_norm(
    x: Float[Tensor, "B T d"],
    y: Float[Tensor, "B T d"],
    gate_modulation: Float[Tensor, "#B #T 3*d"],
    modulation: Float[Tensor, "#B #T 3*d"],
) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T d"]]:
    """x + y·gate with the gate of the norm in front of y's sublayer, and it normalized with `modulation`."""
    gate = gate_modulation.chunk(3, dim=-1)[2]
    x = (x.float() + y.float() * gate.float()).to(x.dtype)
    return x, ada_rms_norm(x, modulation)


def layer_norm(
    x: Float[Tensor, "B T W"], weight: Float[Tensor, " W"], bias: Float[Tensor, " W"], eps: float = LAYER_NORM_EPS
) -> Float[Tensor, "B T W"]:
    """(x − mean) / deviation·weight + bias."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def residual_layer_norm(
    x: Float[Tensor, "B T W"],
    y: Float[Tensor, "B T W"],
    weight: Float[Tensor, " W"],
    bias: Float[Tensor, " W"],
    eps: float = LAYER_NORM_EPS,
) -> tuple[Float[Tensor, "B T W"], Float[Tensor, "B T W"]]:
    """x + y, and it normalized."""
    x = x + y
    return x, layer_norm(x, weight, bias, eps)


def _over_rms(x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + RMS_NORM_EPS)
