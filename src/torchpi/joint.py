"""The joint forward of the papers, literally: one attention over the tokens of both experts, in every layer.

No working path uses it. It shows what prefill + velocity (`torchpi.model.pi0`) compute, in the form of the papers'
figures: `torchpi trace` draws it, and the tests hold the working path against it. Where that one has one fast kernel,
this one has every tensor: one mask over prefix and suffix, explicit logits, an explicit softmax.

In shapes, J = S + T is the number of tokens of both.

Source: π₀ (arXiv:2410.24164), appendix B; padding rows attend uniformly to everything, as in the original code.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from torchpi.model.gemma import Block, Modulation, Rope, add_residual, apply_rope, rope_table
from torchpi.model.masks import make_attn_mask, token_positions
from torchpi.model.pi0 import Pi0
from torchpi.types import Observation

Record = Callable[[str, Tensor], None]
"""Called with the name of a tensor and the tensor."""

MASKED_LOGIT = -2.3819763e38  # the original's: float32's lowest number but for a margin; −inf would make NaN of rows


@dataclasses.dataclass(frozen=True)
class JointOutput:
    """What the joint forward computes."""

    attn_mask: Bool[Tensor, "B J J"]
    """True where a query (row) may attend to a key (column)."""
    positions: Int[Tensor, "B J"]
    """Position of every token, over prefix and suffix."""
    prefix_out: Float[Tensor, "B S D"]
    """The backbone's output behind its final norm; rows of padding mean nothing."""
    suffix_out: Float[Tensor, "B T d"]
    """The action expert's output behind its final norm."""
    v_t: Float[Tensor, "B H A"]
    """The velocity."""


def joint_forward(
    model: Pi0,
    observation: Observation,
    x_t: Float32[Tensor, "B H A"],
    time: Float32[Tensor, " B"],
    *,
    record: Record | None = None,
) -> JointOutput:
    """Run both experts side by side, layer by layer, with the weights of `model`.

    Args:
        x_t: noisy actions.
        time: of the flow.
        record: is handed what the first layer's attention computes: q, k, v, logits, probs, attn_out.
    """
    prefix_tokens, prefix_mask, prefix_ar_mask = model.embed_prefix(observation)
    suffix_tokens, suffix_mask, suffix_ar_mask, _ = model.embed_suffix(observation, x_t, time)
    return joint_transformer(
        model,
        (prefix_tokens, suffix_tokens.to(model.compute_dtype)),
        torch.cat([prefix_mask, suffix_mask], dim=1),
        torch.cat([prefix_ar_mask, suffix_ar_mask]),
        model.time_conditioning(time).modulations,
        record=record,
    )


def joint_transformer(
    model: Pi0,
    tokens: tuple[Float[Tensor, "B S D"], Float[Tensor, "B T d"]],
    input_mask: Bool[Tensor, "B J"],
    ar_mask: Bool[Tensor, " J"],
    modulations: Sequence[Modulation] | None,
    *,
    record: Record | None = None,
) -> JointOutput:
    """What `joint_forward` does behind the embedding.

    Args:
        tokens: of prefix and suffix.
        input_mask, ar_mask: over prefix and suffix, see `make_attn_mask`.
        modulations: scale, shift and gate of the action expert's norms in their order; None for π₀.
        record: as in `joint_forward`.
    """
    mask = make_attn_mask(input_mask, ar_mask)  # [B, J, J]
    positions = token_positions(input_mask)  # [B, J]
    rope = rope_table(positions, model.config.paligemma.head_dim)
    of_suffix: Sequence[Modulation | None] = modulations or [None] * len(model.expert.norms())
    for i, (backbone, expert) in enumerate(zip(model.backbone.layers, model.expert.layers, strict=True)):
        assert isinstance(backbone, Block)
        assert isinstance(expert, Block)
        at_layer = (of_suffix[2 * i], of_suffix[2 * i + 1])
        tokens = joint_layer((backbone, expert), tokens, rope, mask, at_layer, record if i == 0 else None)
    prefix_out, _ = model.backbone.final_norm(tokens[0], None)
    suffix_out, _ = model.expert.final_norm(tokens[1], of_suffix[-1])
    v_t = model.action_out_proj(suffix_out[:, model.suffix.num_state_tokens :].float())
    return JointOutput(mask, positions, prefix_out, suffix_out, v_t)


def joint_layer(
    blocks: tuple[Block, Block],
    tokens: tuple[Float[Tensor, "B S D"], Float[Tensor, "B T d"]],
    rope: Rope,
    mask: Bool[Tensor, "B J J"],
    modulations: tuple[Modulation | None, Modulation | None],
    record: Record | None = None,
) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B T d"]]:
    """One layer of both experts: their queries, keys and values meet in one attention, all else is each one's own.

    Args:
        blocks: the layer of the backbone and that of the action expert.
        tokens: the two residual streams.
        rope: `rope_table` of the positions of all J tokens.
        mask: True where a query may attend to a key.
        modulations: of the action expert's two norms; None for π₀.
        record: is handed what no module returns: q, k, v over both experts' tokens, logits, probs, attn_out.

    Returns:
        The two residual streams behind the layer.
    """
    sides = list(zip(blocks, tokens, ((None, None), modulations), strict=True))

    # Each expert's own norm and projections …
    gates, projected = [], []
    for block, x, (modulation, _) in sides:
        y, gate = block.pre_attention_norm(x, modulation)
        gates.append(gate)
        projected.append(_project(block, y))

    # … one sequence, with the positions of one sequence, and one attention …
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*projected, strict=True))  # [B, J, Q or G, K]
    q, k = apply_rope(q, rope) * q.shape[-1] ** -0.5, apply_rope(k, rope)
    attn_out, logits, probs = explicit_attention(q, k, v, mask)
    if record is not None:
        for name, tensor in {"q": q, "k": k, "v": v, "logits": logits, "probs": probs, "attn_out": attn_out}.items():
            record(name, tensor)

    # … and each expert's own output projection, residual, norm, feed-forward and residual.
    outputs = []
    attended = attn_out.split([x.shape[1] for x in tokens], dim=1)
    for (block, x, (_, modulation)), part, gate in zip(sides, attended, gates, strict=True):
        x = add_residual(x, block.attention.out(part), gate)
        y, gate = block.pre_ffw_norm(x, modulation)
        outputs.append(add_residual(x, block.feed_forward(y), gate))
    return outputs[0], outputs[1]


def explicit_attention(
    q: Float[Tensor, "B R Q K"],
    k: Float[Tensor, "B C G K"],
    v: Float[Tensor, "B C G K"],
    mask: Bool[Tensor, "B #R C"],
) -> tuple[Float[Tensor, "B R Q*K"], Float[Tensor, "B G Q//G R C"], Float[Tensor, "B G Q//G R C"]]:
    """Grouped-query attention without a kernel: product, mask, softmax in float32, product.

    Args:
        q: queries, already scaled by K^-0.5.

    Returns:
        The output; the logits before the mask; the attention weights. A row that may attend to nothing attends to
        everything alike, as in the original.
    """
    groups = k.shape[2]
    q = q.unflatten(2, (groups, -1))  # [B, R, G, Q/G, K]
    exact = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("brghk,bcgk->bghrc", q.to(exact), k.to(exact))
    probs = torch.softmax(logits.masked_fill(~mask[:, None, None], MASKED_LOGIT), dim=-1)
    out = torch.einsum("bghrc,bcgk->brghk", probs.to(v.dtype), v)
    return out.flatten(2), logits, probs


def _project(block: Block, y: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values before RoPE, with a head axis."""
    attention, config = block.attention, block.attention.config
    kv_width = config.num_kv_heads * config.head_dim
    parts = attention.qkv(y).split([attention.q_width, kv_width, kv_width], dim=-1)
    return tuple(part.unflatten(-1, (-1, config.head_dim)) for part in parts)
