"""Table of an openpi JAX checkpoint, in which one array holds the weights of one kind of all layers.

Sources: openpi's modules, and the key listings of its published checkpoints.
"""

import dataclasses

from torchpi.checkpoints.layout import (
    UNSET,
    CheckpointArray,
    ParamSlice,
    Shapes,
    StoredArrays,
    projections,
    sizes_of,
    whole,
)
from torchpi.config import GemmaConfig, Pi0Config, VisionConfig
from torchpi.errors import CheckpointError
from torchpi.model.lora import LoraConfig


def jax_table(config: Pi0Config) -> dict[str, CheckpointArray]:
    """Every array of an openpi checkpoint of these sizes, by its key path joined with '.'."""
    found = {"PaliGemma.llm.embedder.input_embedding": whole("embedding", config.vocab_size, config.paligemma.width)}
    found |= _siglip_table(config)
    found |= _gemma_table(config.paligemma, "backbone", "", adaptive_norm=False)
    found |= _gemma_table(config.action_expert, "expert", "_1", adaptive_norm=config.pi05)
    for name, module, num_in, num_out in projections(config):
        found |= _dense(name, module, num_in, num_out)
    return found


def _dense(stored: str, module: str, num_in: int, num_out: int) -> dict[str, CheckpointArray]:
    return {
        f"{stored}.kernel": whole(f"{module}.weight", num_in, num_out, axes=(1, 0)),
        f"{stored}.bias": whole(f"{module}.bias", num_out),
    }


@dataclasses.dataclass(frozen=True)
class _Stack:
    """The layers of one stack, whose weights of a kind are one array."""

    modules: str
    depth: int

    def array(
        self,
        name: str,
        *shape: int,
        axes: tuple[int, ...] | None = None,
        rows: tuple[int, int] | None = None,
    ) -> CheckpointArray:
        slices = (ParamSlice(f"{self.modules}.{i}.{name}", layer=i, axes=axes, rows=rows) for i in range(self.depth))
        return CheckpointArray((self.depth, *shape), tuple(slices))


def _siglip_table(config: Pi0Config) -> dict[str, CheckpointArray]:
    vit = config.siglip
    width, mlp, heads, patch = vit.width, vit.mlp_dim, vit.num_heads, vit.patch
    img, block = "PaliGemma.img", "PaliGemma.img.Transformer.encoderblock"
    attention = f"{block}.MultiHeadDotProductAttention_0"
    blocks = _Stack("vision.blocks", vit.depth)
    found = {
        f"{img}.embedding.kernel": whole("vision.patch_embed.weight", patch, patch, 3, width, axes=(3, 0, 1, 2)),
        f"{img}.embedding.bias": whole("vision.patch_embed.bias", width),
        f"{img}.Transformer.encoder_norm.scale": whole("vision.norm.weight", width),
        f"{img}.Transformer.encoder_norm.bias": whole("vision.norm.bias", width),
        f"{attention}.out.kernel": blocks.array("out.weight", heads, width // heads, width, axes=(2, 0, 1)),
        f"{attention}.out.bias": blocks.array("out.bias", width),
        f"{block}.MlpBlock_0.Dense_0.kernel": blocks.array("fc1.weight", width, mlp, axes=(1, 0)),
        f"{block}.MlpBlock_0.Dense_0.bias": blocks.array("fc1.bias", mlp),
        f"{block}.MlpBlock_0.Dense_1.kernel": blocks.array("fc2.weight", mlp, width, axes=(1, 0)),
        f"{block}.MlpBlock_0.Dense_1.bias": blocks.array("fc2.bias", width),
    }
    if vit.position == "learned":
        found[f"{img}.pos_embedding"] = whole("vision.pos_embed", 1, config.num_patches, width)
    for i, part in enumerate(("query", "key", "value")):
        rows, shape = (i * width, (i + 1) * width), (heads, width // heads)
        found[f"{attention}.{part}.kernel"] = blocks.array("qkv.weight", width, *shape, axes=(1, 2, 0), rows=rows)
        found[f"{attention}.{part}.bias"] = blocks.array("qkv.bias", *shape, rows=rows)
    for i in (0, 1):
        found[f"{block}.LayerNorm_{i}.scale"] = blocks.array(f"norm{i + 1}.weight", width)
        found[f"{block}.LayerNorm_{i}.bias"] = blocks.array(f"norm{i + 1}.bias", width)
    return found | _dense(f"{img}.head", "vision.head", width, config.paligemma.width)


def _gemma_table(gemma: GemmaConfig, stack: str, suffix: str, *, adaptive_norm: bool) -> dict[str, CheckpointArray]:
    width, mlp, head_dim = gemma.width, gemma.mlp_dim, gemma.head_dim
    heads, kv_heads = gemma.num_heads, gemma.num_kv_heads
    llm = "PaliGemma.llm"
    attn, feed_forward = f"{llm}.layers.attn", f"{llm}.layers.mlp{suffix}"
    layers = _Stack(f"{stack}.layers", gemma.depth)
    found = {
        f"{attn}.attn_vec_einsum{suffix}.w": layers.array(
            "attention.out.weight", heads, head_dim, width, axes=(2, 0, 1)
        ),
        f"{feed_forward}.gating_einsum": layers.array("feed_forward.gate_up.weight", 2, width, mlp, axes=(0, 2, 1)),
        f"{feed_forward}.linear": layers.array("feed_forward.down.weight", mlp, width, axes=(1, 0)),
    }
    qkv = "attention.qkv.weight"
    if kv_heads == heads:  # plain multi-head attention is one array there
        found[f"{attn}.qkv_einsum{suffix}.w"] = layers.array(qkv, 3, heads, width, head_dim, axes=(0, 1, 3, 2))
    else:
        q_end, kv_end = heads * head_dim, (heads + 2 * kv_heads) * head_dim
        found[f"{attn}.q_einsum{suffix}.w"] = layers.array(qkv, heads, width, head_dim, axes=(0, 2, 1), rows=(0, q_end))
        found[f"{attn}.kv_einsum{suffix}.w"] = layers.array(
            qkv, 2, kv_heads, width, head_dim, axes=(0, 1, 3, 2), rows=(q_end, kv_end)
        )
    for norm in ("pre_attention_norm", "pre_ffw_norm"):
        stored = f"{llm}.layers.{norm}{suffix}"
        if adaptive_norm:
            found[f"{stored}.Dense_0.kernel"] = layers.array(f"{norm}.dense.weight", width, 3 * width, axes=(1, 0))
            found[f"{stored}.Dense_0.bias"] = layers.array(f"{norm}.dense.bias", 3 * width)
        else:
            found[f"{stored}.scale"] = layers.array(f"{norm}.scale", width)
    final = f"{llm}.final_norm{suffix}"
    if adaptive_norm:
        return found | _dense(f"{final}.Dense_0", f"{stack}.final_norm.dense", width, 3 * width)
    return found | {f"{final}.scale": whole(f"{stack}.final_norm.scale", width)}


def lora_table(config: Pi0Config, lora: LoraConfig) -> dict[str, CheckpointArray]:
    """The arrays that a LoRA checkpoint of openpi has beside those of `jax_table`."""
    found: dict[str, CheckpointArray] = {}
    if lora.backbone_rank:
        found |= _gemma_lora_table(config.paligemma, lora, lora.backbone_rank, "backbone", "")
    if lora.expert_rank:
        found |= _gemma_lora_table(config.action_expert, lora, lora.expert_rank, "expert", "_1")
    return found


def _gemma_lora_table(
    gemma: GemmaConfig, lora: LoraConfig, rank: int, stack: str, suffix: str
) -> dict[str, CheckpointArray]:
    width, mlp, head_dim = gemma.width, gemma.mlp_dim, gemma.head_dim
    heads, kv_heads = gemma.num_heads, gemma.num_kv_heads
    attn, feed_forward = "PaliGemma.llm.layers.attn", f"PaliGemma.llm.layers.mlp{suffix}"
    layers = _Stack(f"{stack}.layers", gemma.depth)
    found: dict[str, CheckpointArray] = {}

    def add(
        stored: str, module: str, a: tuple[int, ...], b: tuple[int, ...], rows: tuple[int, int] | None = None
    ) -> None:
        """A and B, whose last two axes are (in, out) there and (out, in) here."""
        for letter, shape in (("a", a), ("b", b)):
            axes = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
            found[f"{stored}lora_{letter}"] = layers.array(f"{module}.lora_{letter}", *shape, axes=axes, rows=rows)

    if lora.attention:
        out, vec = "attention.out", f"{attn}.attn_vec_einsum{suffix}"
        found[f"{vec}.lora_a"] = layers.array(f"{out}.lora_a", heads, head_dim, rank, axes=(2, 0, 1))
        found[f"{vec}.lora_b"] = layers.array(f"{out}.lora_b", heads, rank, width, axes=(0, 2, 1))
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


def jax_config(arrays: StoredArrays) -> Pi0Config:
    """The sizes that a checkpoint's arrays have; horizon, prompt length and format are in none and stay unset.

    The image size is in the learned position embedding; without one it is 224, as in all published models.
    """
    try:
        return _config(arrays.shapes)
    except ValueError as error:
        raise CheckpointError(f"{arrays.source}: {error}") from error


def _config(shapes: Shapes) -> Pi0Config:
    llm, img = "PaliGemma.llm.layers", "PaliGemma.img"
    block = f"{img}.Transformer.encoderblock"

    def gemma(suffix: str) -> GemmaConfig:
        depth, _, width, mlp_dim = sizes_of(shapes, f"{llm}.mlp{suffix}.gating_einsum", 4)
        if f"{llm}.attn.qkv_einsum{suffix}.w" in shapes:
            _, _, heads, _, head_dim = sizes_of(shapes, f"{llm}.attn.qkv_einsum{suffix}.w", 5)
            kv_heads = heads
        else:
            _, heads, _, head_dim = sizes_of(shapes, f"{llm}.attn.q_einsum{suffix}.w", 4)
            kv_heads = sizes_of(shapes, f"{llm}.attn.kv_einsum{suffix}.w", 5)[2]
        return GemmaConfig(width, depth, mlp_dim, heads, kv_heads, head_dim)

    patch, _, _, width = sizes_of(shapes, f"{img}.embedding.kernel", 4)
    depth, _, heads, _ = sizes_of(shapes, f"{block}.MultiHeadDotProductAttention_0.query.kernel", 4)
    mlp_dim = sizes_of(shapes, f"{block}.MlpBlock_0.Dense_0.kernel", 3)[2]
    learned = f"{img}.pos_embedding" in shapes
    num_patches = sizes_of(shapes, f"{img}.pos_embedding", 3)[1] if learned else (224 // patch) ** 2
    return dataclasses.replace(
        UNSET,
        pi05="time_mlp_in.kernel" in shapes,
        paligemma_variant=gemma(""),
        action_expert_variant=gemma("_1"),
        siglip_variant=VisionConfig(width, depth, mlp_dim, heads, patch, "learned" if learned else "sincos2d"),
        action_dim=sizes_of(shapes, "action_in_proj.kernel", 2)[0],
        vocab_size=sizes_of(shapes, "PaliGemma.llm.embedder.input_embedding", 2)[0],
        image_size=patch * round(num_patches**0.5),
    )
