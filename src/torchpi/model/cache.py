"""The cache of a prefix, behind which several suffixes may stand."""

import dataclasses

from jaxtyping import Bool, Float32
from torch import Tensor

from torchpi.model.gemma import KeyValue, Rope


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """Positions and mask of a suffix behind a prefix; the same in all Euler steps."""

    rope: Rope
    mask: Bool[Tensor, "B #T keys"] | None
    """Rows of suffix tokens, columns of prefix and suffix; None: every token attends to every token."""


@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the prefix, and what else the action expert needs for a suffix behind it."""

    key_values: list[KeyValue]
    """Keys and values of each backbone layer."""
    suffix: AttentionInputs
    """Positions and mask of the suffix that follows the prefix."""
    state: Float32[Tensor, "B A"]
    """State of the observation, which π₀'s suffix reads."""

    def repeat(self, times: int) -> "KVCache":
        """Repeat each sample `times` times in a row, for several suffixes behind one prefix."""
        if times == 1:
            return self
        (cos, sin), mask = self.suffix.rope, self.suffix.mask
        rope = cos.repeat_interleave(times, 0), sin.repeat_interleave(times, 0)
        suffix = AttentionInputs(rope, None if mask is None else mask.repeat_interleave(times, 0))
        key_values = [key_value.repeat(times) for key_value in self.key_values]
        return KVCache(key_values, suffix, self.state.repeat_interleave(times, 0))
