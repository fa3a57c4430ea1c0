"""Grouped-query attention of prefix or suffix over a cache in which the prefix may end in padding.

    out = softmax(q·keysᵀ / √K over the allowed keys)·values

Key j of sample b is allowed if j < valid[b], or j ≥ num_prefix: the suffix. The first `num_state_tokens` queries (π₀'s
state) see of the suffix only themselves.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torchpi.model import layers


def attend(
    q: Float[Tensor, "B T Q K"],
    keys: Float[Tensor, "B slots G K"],
    values: Float[Tensor, "B slots G K"],
    valid: Int[Tensor, " B"],
    num_prefix: int,
    num_state_tokens: int = 0,
) -> Float[Tensor, "B T heads"]:
    """Attention of all query heads; every query needs a key that it may attend to.

    Args:
        valid: the number of each sample's prefix tokens that are no padding.
        num_prefix: slots of the prefix, padding included; all slots: there is no suffix.
    """
    mask = allowed_keys(valid, keys.shape[1], num_prefix)
    if num_state_tokens:
        mask = mask.repeat(1, q.shape[1], 1)
        mask[:, :num_state_tokens, num_prefix + num_state_tokens :] = False
    return layers.attend(q, keys, values, mask)


def allowed_keys(valid: Int[Tensor, " B"], slots: int, num_prefix: int) -> Bool[Tensor, "B 1 slots"]:
    """True for a sample's own prefix tokens, and for the suffix."""
    slot = torch.arange(slots, device=valid.device)
    return ((slot < valid[:, None]) | (slot >= num_prefix))[:, None]
