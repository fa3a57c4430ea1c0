"""Which array of an openpi JAX checkpoint goes where: one leaf there has the arrays of one kind of all layers.

Sources: openpi's modules, and the key listings of its published checkpoints.
"""

import dataclasses

from torchpi.checkpoints.layout import Leaf, Piece, Shapes
from torchpi.config import GemmaConfig, Pi0Config, VisionConfig
from torchpi.errors import CheckpointError
from torchpi.model.lora import LoraConfig


def jax_leaves(config: Pi0Config) -> dict[str, Leaf]:
    """Every array of an openpi checkpoint of these sizes, by its key path joined with '.'."""
    found = {
        "PaliGemma.llm.embedder.input_embedding": Leaf(
            (config.vocab_size, config.paligemma.width), (Piece("embedding"),)
        )
    }
    found |= _siglip_leaves(config)
    found |= _gemma_leaves(config.paligemma, "backbone", "", adaptive_norm=False)
    found |= _gemma_leaves(config.action_expert, "expert", "_1", adaptive_norm=config.pi05)
    width, action_dim = config.action_expert.width, config.action_dim
    found |= _dense("action_in_proj", "suffix.action_in_proj", action_dim, width)
    found |= _dense("action_out_proj", "action_out_proj", width, action_dim)
    if config.pi05:
        found |= _dense("time_mlp_in", "suffix.time_mlp_in", width, width)
        found |= _dense("time_mlp_out", "suffix.time_mlp_out", width, width)
    else:
        found |= _dense("state_proj", "suffix.state_proj", action_dim, width)
        found |= _dense("action_time_mlp_in", "suffix.action_time_mlp_in", 2 * width, width)
        found |= _dense("action_time_mlp_out", "suffix.action_time_mlp_out", width, width)
    return found


def _dense(leaf: str, module: str, num_in: int, num_out: int) -> dict[str, Leaf]:
    return {
        f"{leaf}.kernel": Leaf((num_in, num_out), (Piece(f"{module}.weight", axes=(1, 0)),)),
        f"{leaf}.bias": Leaf((num_out,), (Piece(f"{module}.bias"),)),
    }


@dataclasses.dataclass(frozen=True)
class _Stack:
    """The layers of one stack, whose arrays of a kind are one leaf."""

    modules: str
    depth: int

    def leaf(
        self,
        name: str,
        *shape: int,
        axes: tuple[int, ...] | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Leaf:
        pieces = (Piece(f"{self.modules}.{i}.{name}", layer=i, axes=axes, rows=rows) for i in range(self.depth))
        return Leaf((self.depth, *shape), tuple(pieces))


def _siglip_leaves(config: Pi0Config) -> dict[str, Leaf]:
    vit = config.siglip
    width, mlp, heads, patch = vit.width, vit.mlp_dim, vit.num_heads, vit.patch
    img, block = "PaliGemma.img", "PaliGemma.img.Transformer.encoderblock"
    attention = f"{block}.MultiHeadDotProductAttention_0"
    blocks = _Stack("vision.blocks", vit.depth)
    found = {
        f"{img}.embedding.kernel": Leaf(
            (patch, patch, 3, width), (Piece("vision.patch_embed.weight", axes=(3, 0, 1, 2)),)
        ),
        f"{img}.embedding.bias": Leaf((width,), (Piece("vision.patch_embed.bias"),)),
        f"{img}.Transformer.encoder_norm.scale": Leaf((width,), (Piece("vision.norm.weight"),)),
        f"{img}.Transformer.encoder_norm.bias": Leaf((width,), (Piece("vision.norm.bias"),)),
        f"{attention}.out.kernel": blocks.leaf("out.weight", heads, width // heads, width, axes=(2, 0, 1)),
        f"{attention}.out.bias": blocks.leaf("out.bias", width),
        f"{block}.MlpBlock_0.Dense_0.kernel": blocks.leaf("fc1.weight", width, mlp, axes=(1, 0)),
        f"{block}.MlpBlock_0.Dense_0.bias": blocks.leaf("fc1.bias", mlp),
        f"{block}.MlpBlock_0.Dense_1.kernel": blocks.leaf("fc2.weight", mlp, width, axes=(1, 0)),
        f"{block}.MlpBlock_0.Dense_1.bias": blocks.leaf("fc2.bias", width),
    }
    if vit.position == "learned":
        found[f"{img}.pos_embedding"] = Leaf((1, config.num_patches, width), (Piece("vision.pos_embed"),))
    for i, part in enumerate(("query", "key", "value")):
        rows, shape = (i * width, (i + 1) * width), (heads, width // heads)
        found[f"{attention}.{part}.kernel"] = blocks.leaf("qkv.weight", width, *shape, axes=(1, 2, 0), rows=rows)
        found[f"{attention}.{part}.bias"] = blocks.leaf("qkv.bias", *shape, rows=rows)
    for i in (0, 1):
        found[f"{block}.LayerNorm_{i}.scale"] = blocks.leaf(f"norm{i + 1}.weight", width)
        found[f"{block}.LayerNorm_{i}.bias"] = blocks.leaf(f"norm{i + 1}.bias", width)
    return found | _dense(f"{img}.head", "vision.head", width, config.paligemma.width)


def _gemma_leaves(gemma: GemmaConfig, stack: str, suffix: str, *, adaptive_norm: bool) -> dict[str, Leaf]:
    width, mlp, head_dim = gemma.width, gemma.mlp_dim, gemma.head_dim
    heads, kv_heads = gemma.num_heads, gemma.num_kv_heads
    llm = "PaliGemma.llm"
    attn, feed_forward = f"{llm}.layers.attn", f"{llm}.layers.mlp{suffix}"
    layers = _Stack(f"{stack}.layers", gemma.depth)
    found = {
        f"{attn}.attn_vec_einsum{suffix}.w": layers.leaf(
            "attention.out.weight", heads, head_dim, width, axes=(2, 0, 1)
        ),
        f"{feed_forward}.gating_einsum": layers.leaf("feed_forward.gate_up.weight", 2, width, mlp, axes=(0, 2, 1)),
        f"{feed_forward}.linear": layers.leaf("feed_forward.down.weight", mlp, width, axes=(1, 0)),
    }
    qkv = "attention.qkv.weight"
    if kv_heads == heads:  # plain multi-head attention is one leaf there
        found[f"{attn}.qkv_einsum{suffix}.w"] = layers.leaf(qkv, 3, heads, width, head_dim, axes=(0, 1, 3, 2))
    else:
        q_end, kv_end = heads * head_dim, (heads + 2 * kv_heads) * head_dim
        found[f"{attn}.q_einsum{suffix}.w"] = layers.leaf(qkv, heads, width, head_dim, axes=(0, 2, 1), rows=(0, q_end))
        found[f"{attn}.kv_einsum{suffix}.w"] = layers.leaf(
            qkv, 2, kv_heads, width, head_dim, axes=(0, 1, 3, 2), rows=(q_end, kv_end)
        )
    for norm in ("pre_attention_norm", "pre_ffw_norm"):
        leaf = f"{llm}.layers.{norm}{suffix}"
        if adaptive_norm:
            found[f"{leaf}.Dense_0.kernel"] = layers.leaf(f"{norm}.dense.weight", width, 3 * width, axes=(1, 0))
            found[f"{leaf}.Dense_0.bias"] = layers.leaf(f"{norm}.dense.bias", 3 * width)
        else:
            found[f"{leaf}.scale"] = layers.leaf(f"{norm}.scale", width)
    final = f"{llm}.final_norm{suffix}"
    if adaptive_norm:
        return found | _dense(f"{final}.Dense_0", f"{stack}.final_norm.dense", width, 3 * width)
    return found | {f"{final}.scale": Leaf((width,), (Piece(f"{stack}.final_norm.scale"),))}


def lora_leaves(config: Pi0Config, lora: LoraConfig) -> dict[str, Leaf]:
    """The arrays that a LoRA checkpoint of openpi has beside those of `jax_leaves`."""
    found: dict[str, Leaf] = {}
    if lora.backbone_rank:
        found |= _gemma_lora_leaves(config.paligemma, lora, lora.backbone_rank, "backbone", "")
    if lora.expert_rank:
        found |= _gemma_lora_leaves(config.action_expert, lora, lora.expert_rank, "expert", "_1")
    return found


def _gemma_lora_leaves(gemma: GemmaConfig, lora: LoraConfig, rank: int, stack: str, suffix: str) -> dict[str, Leaf]:
    width, mlp, head_dim = gemma.width, gemma.mlp_dim, gemma.head_dim
    heads, kv_heads = gemma.num_heads, gemma.num_kv_heads
    attn, feed_forward = "PaliGemma.llm.layers.attn", f"PaliGemma.llm.layers.mlp{suffix}"
    layers = _Stack(f"{stack}.layers", gemma.depth)
    found: dict[str, Leaf] = {}

    def add(
        leaf: str, module: str, a: tuple[int, ...], b: tuple[int, ...], rows: tuple[int, int] | None = None
    ) -> None:
        """A and B, whose last two axes are (in, out) there and (out, in) here."""
        for letter, shape in (("a", a), ("b", b)):
            axes = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
            found[f"{leaf}lora_{letter}"] = layers.leaf(f"{module}.lora_{letter}", *shape, axes=axes, rows=rows)

    if lora.attention:
        out, vec = "attention.out", f"{attn}.attn_vec_einsum{suffix}"
        found[f"{vec}.lora_a"] = layers.leaf(f"{out}.lora_a", heads, head_dim, rank, axes=(2, 0, 1))
        found[f"{vec}.lora_b"] = layers.leaf(f"{out}.lora_b", heads, rank, width, axes=(0, 2, 1))
        a, b = (width, rank), (rank, head_dim)
        if kv_heads == heads:
            add(f"{attn}.qkv_einsum{suffix}.", "attention.qkv", (3, heads, *a), (3, heads, *b))
        else:
            add(f"{attn}.q_einsum{suffix}.", "attention.qkv", (heads, *a), (heads, *b), (0, heads))
            add(
                f"{attn}.kv_einsum{suffix}.", "attention.qkv", (2, kv_heads, *a), (2, kv_heads, *b),
                (heads, heads + 2 * kv_heads),
            )  # fmt: skip
    if lora.feed_forward:
        add(f"{feed_forward}.gating_einsum_", "feed_forward.gate_up", (2, width, rank), (2, rank, mlp))
        add(f"{feed_forward}.linear_", "feed_forward.down", (mlp, rank), (rank, width))
    return found


def config_from_shapes(shapes: Shapes) -> Pi0Config:
    """The sizes that a checkpoint's arrays have; horizon, prompt length and format are in none and stay unset.

    The image size is in the learned position embedding; without one it is 224, as in all published models.
    """
    llm, img = "PaliGemma.llm.layers", "PaliGemma.img"
    block = f"{img}.Transformer.encoderblock"

    def shape(leaf: str, ndim: int) -> tuple[int, ...]:
        if leaf not in shapes:
            raise CheckpointError(
                f"The checkpoint has no array {leaf!r}, which every π₀ and π₀.₅ model has; "
                f"found {sorted(shapes)[:8] or 'none'}."
            )
        if len(shapes[leaf]) != ndim:
            raise CheckpointError(f"Array {leaf!r} must have {ndim} dimensions, its shape is {list(shapes[leaf])}.")
        return shapes[leaf]

    def gemma(suffix: str) -> GemmaConfig:
        depth, _, width, mlp_dim = shape(f"{llm}.mlp{suffix}.gating_einsum", 4)
        if f"{llm}.attn.qkv_einsum{suffix}.w" in shapes:
            _, _, heads, _, head_dim = shape(f"{llm}.attn.qkv_einsum{suffix}.w", 5)
            kv_heads = heads
        else:
            _, heads, _, head_dim = shape(f"{llm}.attn.q_einsum{suffix}.w", 4)
            kv_heads = shape(f"{llm}.attn.kv_einsum{suffix}.w", 5)[2]
        return GemmaConfig(width, depth, mlp_dim, heads, kv_heads, head_dim)

    patch, _, _, width = shape(f"{img}.embedding.kernel", 4)
    vit_depth, _, vit_heads, _ = shape(f"{block}.MultiHeadDotProductAttention_0.query.kernel", 4)
    vit_mlp = shape(f"{block}.MlpBlock_0.Dense_0.kernel", 3)[2]
    learned = f"{img}.pos_embedding" in shapes
    num_patches = shape(f"{img}.pos_embedding", 3)[1] if learned else (224 // patch) ** 2
    return Pi0Config(
        pi05="time_mlp_in.kernel" in shapes,
        paligemma_variant=gemma(""),
        action_expert_variant=gemma("_1"),
        siglip_variant=VisionConfig(width, vit_depth, vit_mlp, vit_heads, patch, "learned" if learned else "sincos2d"),
        action_dim=shape("action_in_proj.kernel", 2)[0],
        action_horizon=None,
        max_token_len=None,
        discrete_state_input=None,
        vocab_size=shape("PaliGemma.llm.embedder.input_embedding", 2)[0],
        image_size=patch * round(num_patches**0.5),
    )
