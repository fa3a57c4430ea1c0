"""The operations of the engine's layers, each as plain PyTorch and as one launch of a Triton kernel.

Each file has an operation's formula, its plain twin, and the kernel. All compute in float32 and return their input's
dtype, or e4m3 in front of an fp8 matmul; batch and token are the leading axes. A Triton kernel runs on the current CUDA
device and has no gradient; at full size, `attend` and `linear_geglu` are for dtypes of 16 bits or fewer.
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
    """One implementation of every operation; the signatures are those of the plain twins."""

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
        """The same kernels, which may run at the same time: Triton's attention gets counters of its own."""
        counts = isinstance(self.attend, attention.TritonAttention)
        return dataclasses.replace(self, attend=attention.TritonAttention()) if counts else self


PLAIN = Kernels(
    "plain", norms.rms_norm, norms.ada_rms_norm, norms.layer_norm, rope.split_rope_store, geglu.geglu,
    geglu.linear_geglu, attention.attend, fp8.to_fp8,
)  # fmt: skip
"""Runs on any device, with gradients (but for `split_rope_store`: there, `rope.split_rope` and `torch.cat`)."""


def triton_kernels() -> Kernels:
    """The Triton kernels, or a ModuleNotFoundError; for one stream at a time (`Kernels.for_another_stream`)."""
    require("triton", "gpu")
    return Kernels(
        "triton", norms.triton_rms_norm, norms.triton_ada_rms_norm, norms.triton_layer_norm,
        rope.triton_split_rope_store, geglu.triton_geglu, geglu.triton_linear_geglu,
        attention.TritonAttention(), fp8.triton_to_fp8,
    )  # fmt: skip
