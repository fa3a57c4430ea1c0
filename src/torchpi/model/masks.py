"""Attention masks and positions."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def make_attn_mask(
    input_mask: Bool[Tensor, "B S"], ar_mask: Bool[Tensor, " S"], num_queries: int | None = None
) -> Bool[Tensor, "B T S"]:
    """Build the block-causal mask: a token attends to its own group and to all groups before it.

    `ar_mask` is True where a new group begins, so its cumulative sum numbers the groups. All False is bidirectional,
    all True is causal. With [False, False, True, False] the first two tokens attend to each other, and the last two to
    all four. Padding neither attends nor is attended to.

    Args:
        input_mask: True at valid tokens.
        ar_mask: True where earlier tokens must not attend to this one and those after it.
        num_queries: build only the rows of the last `num_queries` tokens; by default all S rows.

    Returns:
        True where the query (row) may attend to the key (column).

    Source: big_vision's PaliGemma, `make_attn_mask`.
    """
    first = 0 if num_queries is None else input_mask.shape[1] - num_queries
    group = torch.cumsum(ar_mask, dim=0)  # [S]
    in_order = group[None, :] <= group[first:, None]  # [T, S]
    return in_order & input_mask[:, None, :] & input_mask[:, first:, None]


def token_positions(input_mask: Bool[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """Number the valid tokens, so that padding shifts no position. (Padding before the first valid token gets −1.)"""
    return torch.cumsum(input_mask, dim=1) - 1
