"""Operations of the engine's layers, each as plain PyTorch and as one launch of a Triton kernel.

Each file has the formula of an operation, a plain version and a Triton kernel. They compute in float32 and return their
input's dtype, or e4m3 before an fp8 matmul; batch and token are the leading axes. A Triton kernel runs on the current
CUDA device and has no gradient. At full size, `attend` and `linear_geglu` need dtypes of at most 16 bits.
"""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from torchpi.engine.kernels import attention, fp8, geglu, norms, rope
from torchpi.extras import require

_One = Callable[..., Tensor]
_Two = Callable[..., tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """An implementation of every operation, with the signatures of the plain versions."""

    name: str
    """"plain" or "triton"."""
    rms_norm: _Two
    ada_rms_norm: _Two
    layer_norm: _Two
    split_rope_store: _One
    geglu: _One
    linear_geglu: _One
    attend: _One
    to_fp8: _One

    def for_another_stream(self) -> "Kernels":
        """The same kernels for concurrent use on another stream: Triton's attention gets its own counters."""
        if isinstance(self.attend, attention.TritonAttention):
            return dataclasses.replace(self, attend=attention.TritonAttention())
        return self


PLAIN = Kernels(
    "plain", norms.rms_norm, norms.ada_rms_norm, norms.layer_norm, rope.split_rope_store, geglu.geglu,
    geglu.linear_geglu, attention.attend, fp8.to_fp8,
)  # fmt: skip
"""Runs on any device, with gradients except for `split_rope_store` (use `rope.split_rope` and `torch.cat` instead)."""


def triton_kernels() -> Kernels:
    """The Triton kernels, for one stream at a time (see `Kernels.for_another_stream`); a ModuleNotFoundError without
    Triton."""
    require("triton", "gpu")
    return Kernels(
        "triton", norms.triton_rms_norm, norms.triton_ada_rms_norm, norms.triton_layer_norm,
        rope.triton_split_rope_store, geglu.triton_geglu, geglu.triton_linear_geglu,
        attention.TritonAttention(), fp8.triton_to_fp8,
    )  # fmt: skip
