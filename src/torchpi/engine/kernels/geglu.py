"""GeGLU (arXiv:2002.05202): gelu(gate)·up, alone and behind the matmul that computes gate and up.

gelu(g) = 0.5·g·(1 + tanh u) = g·sigmoid(2u)    with u = √(2/π)·(g + 0.044715·g³)
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from torchpi.model.layers import gelu_tanh


def geglu(gate_up: Float[Tensor, "B T gate_up"]) -> Float[Tensor, "B T I"]:
    """gelu(gate)·up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu_tanh(gate) * up


def linear_geglu(x: Float[Tensor, "B T D"], weight: Float[Tensor, "gate_up D"]) -> Float[Tensor, "B T I"]:
    """gelu(x·Wgᵀ)·(x·Wuᵀ) with the weights of gate and up one behind the other."""
    return geglu(F.linear(x, weight))
