"""LoRA weights of an openpi JAX checkpoint, folded into the weights that they change.

What they mean is openpi's code, not the paper's (arXiv:2106.09685): in attention the product is scaled by alpha / rank;
the output projection multiplies each head's A with the sum of all heads' B; in the feed-forward nothing is scaled.
"""

import pathlib

import torch
from torch import Tensor

from torchpi.checkpoints.layout import Arrays, Shapes

DEFAULT_ALPHA = (16.0, 32.0)
"""Of the backbone and of the action expert: openpi's variants gemma_2b_lora and gemma_300m_lora."""


class FoldedArrays:
    """The arrays of a LoRA checkpoint as those of a plain one; see `Arrays`."""

    def __init__(self, arrays: Arrays, alpha: tuple[float, float] = DEFAULT_ALPHA) -> None:
        """
        Args:
            alpha: of the backbone and of the action expert.

        Raises:
            ValueError: a LoRA array without its pair or without the array that it changes, or of another shape.
        """
        self.source: pathlib.Path = arrays.source
        self._arrays, self._alpha = arrays, alpha
        self.pairs: dict[str, tuple[str, str]] = {}
        """By the array that is changed, its A and B."""
        lora = {name for name in arrays.shapes if "lora_" in name}
        for a in sorted(name for name in lora if name.endswith("lora_a")):
            b = f"{a.removesuffix('a')}b"
            # attn.q_einsum.lora_a changes attn.q_einsum.w, mlp.linear_lora_a changes mlp.linear.
            base = f"{a.removesuffix('lora_a')}w" if a.endswith(".lora_a") else a.removesuffix("_lora_a")
            if b not in lora or base not in arrays.shapes:
                raise ValueError(f"{arrays.source} has {a}, but not {b if b not in lora else base}")
            self._check(base, a, b)
            self.pairs[base] = (a, b)
        if alone := sorted(lora - {name for pair in self.pairs.values() for name in pair}):
            raise ValueError(f"{arrays.source} has LoRA arrays that belong to nothing: {', '.join(alone)}")
        self.shapes: Shapes = {name: shape for name, shape in arrays.shapes.items() if name not in lora}

    def _check(self, base: str, a: str, b: str) -> None:
        shapes = self._arrays.shapes
        base_shape, a_shape, b_shape = shapes[base], shapes[a], shapes[b]
        rank = a_shape[-1]
        if a_shape != (*base_shape[:-1], rank) or b_shape != (*base_shape[:-2], rank, base_shape[-1]):
            raise ValueError(
                f"{self.source}: the LoRA arrays {a} {list(a_shape)} and {b} {list(b_shape)} do not fit {base} "
                f"{list(base_shape)}"
            )

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """An array in `dtype`, with its LoRA product added in float32 before any cast."""
        if name not in self.pairs:
            return self._arrays.read(name, dtype)
        weight = self._arrays.read(name, torch.float32)
        a, b = (self._arrays.read(part, torch.float32) for part in self.pairs[name])
        scale = 1.0
        if ".attn." in name:
            expert = name.split(".")[-2].endswith("_1")  # attn.q_einsum_1.w
            scale = self._alpha[expert] / a.shape[-1]
        if "attn_vec_einsum" in name:
            b = b.sum(dim=1, keepdim=True)  # over the heads
        for layer in range(len(weight)):  # one by one: the whole product may be as large as the model
            weight[layer] += scale * (a[layer] @ b[layer])
        return weight.to(dtype)
