"""KV cache of a prefix, shared by several suffixes."""

import dataclasses

from jaxtyping import Bool, Float32
from torch import Tensor

from torchpi.model.gemma import KeyValue, Rope


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """Positions and attention mask of a suffix that follows a prefix; the same in all Euler steps."""

    rope: Rope
    mask: Bool[Tensor, "B #T keys"] | None
    """Rows: suffix tokens; columns: prefix and suffix tokens. None: every token attends to every token."""


@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the prefix, and the other inputs that the action expert needs for a suffix after it."""

    key_values: list[KeyValue]
    """Keys and values of each backbone layer."""
    suffix: AttentionInputs
    """Positions and mask of the suffix."""
    state: Float32[Tensor, "B A"]
    """State of the observation, for π₀'s suffix."""

    def repeat(self, times: int) -> "KVCache":
        """Repeat each sample `times` times in a row, for several suffixes per prefix."""
        if times == 1:
            return self
        (cos, sin), mask = self.suffix.rope, self.suffix.mask
        rope = cos.repeat_interleave(times, 0), sin.repeat_interleave(times, 0)
        suffix = AttentionInputs(rope, None if mask is None else mask.repeat_interleave(times, 0))
        key_values = [key_value.repeat(times) for key_value in self.key_values]
        return KVCache(key_values, suffix, self.state.repeat_interleave(times, 0))
