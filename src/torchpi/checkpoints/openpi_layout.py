"""Table of openpi JAX checkpoints, in which one array stacks the weights of all layers.

Sources: openpi's modules, and the key listings of its published checkpoints.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torchpi.checkpoints.layout import UNSET, Shapes, Table, sizes_of, stored_as
from torchpi.config import GemmaConfig, Pi0Config, VisionConfig
from torchpi.model.lora import LoraConfig

Entries = Mapping[str, tuple[str, str] | tuple[str, str, tuple[int, int]]]
"""Stored name → parameter, axes (see `stored_as`), and the parameter's rows if the array fills only some of them.

Axes: D width, F hidden width, Q query heads, G key/value heads, K head_dim, R rank of LoRA, H and W pixels of a patch,
N patches, V vocabulary, A action_dim, d the expert's width; a number is an axis of that size.
"""
Sizes = Mapping[str, int]


def _stored(prefix: str, entries: Entries, params: str, sizes: Sizes, depth: int | None = None) -> Table:
    return {
        f"{prefix}{name}": stored_as(f"{params}{param}", axes, sizes, rows=rows[0] if rows else None, depth=depth)
        for name, (param, axes, *rows) in entries.items()
    }


def jax_table(config: Pi0Config) -> Table:
    """Every array of an openpi checkpoint of these sizes, by its key path joined with "."."""
    sizes = {"V": config.vocab_size, "D": config.paligemma.width}
    table = {"PaliGemma.llm.embedder.input_embedding": stored_as("embedding", "V D", sizes)}
    table |= _siglip_table(config)
    table |= _gemma_table(config.paligemma, "backbone", "", adaptive_norm=False)
    table |= _gemma_table(config.action_expert, "expert", "_1", adaptive_norm=config.pi05)
    width = config.action_expert.width
    sizes = {"A": config.action_dim, "d": width, "in": width, "2d": 2 * width}
    inputs = {"state_proj": "A", "action_time_mlp_in": "2d", "action_time_mlp_out": "in"}
    if config.pi05:
        inputs = {"time_mlp_in": "in", "time_mlp_out": "in"}
    for name, axis in {"action_in_proj": "A", **inputs}.items():
        table |= _stored("", _dense(name, name, axis, "d"), "suffix.", sizes)
    return table | _stored("", _dense("action_out_proj", "action_out_proj", "d", "A"), "", sizes)


def paligemma_table(config: Pi0Config) -> Table:
    """The arrays of `jax_table` that PaliGemma has."""
    parts = ("vision", "embedding", "backbone")
    return {name: array for name, array in jax_table(config).items() if array.slices[0].param.split(".")[0] in parts}


def _dense(stored: str, module: str, inputs: str, outputs: str) -> Entries:
    kernel = (f"{module}.weight", f"{inputs} {outputs} -> {outputs} {inputs}")
    return {f"{stored}.kernel": kernel, f"{stored}.bias": (f"{module}.bias", outputs)}


def _siglip_table(config: Pi0Config) -> Table:
    vit = config.siglip
    sizes = {"D": vit.width, "F": vit.mlp_dim, "Q": vit.num_heads, "K": vit.width // vit.num_heads}
    sizes |= {"H": vit.patch, "W": vit.patch, "N": config.num_patches, "out": config.paligemma.width, "1": 1, "3": 3}
    whole: dict[str, Any] = {
        **_dense("head", "head", "D", "out"),
        "embedding.kernel": ("patch_embed.weight", "H W 3 D -> D H W 3"),
        "embedding.bias": ("patch_embed.bias", "D"),
        "Transformer.encoder_norm.scale": ("norm.weight", "D"),
        "Transformer.encoder_norm.bias": ("norm.bias", "D"),
    }
    if vit.position == "learned":
        whole["pos_embedding"] = ("pos_embed", "1 N D")
    attention = "MultiHeadDotProductAttention_0"
    block: dict[str, Any] = {
        f"{attention}.out.kernel": ("out.weight", "Q K D -> D Q K"),
        f"{attention}.out.bias": ("out.bias", "D"),
        **_dense("MlpBlock_0.Dense_0", "fc1", "D", "F"),
        **_dense("MlpBlock_0.Dense_1", "fc2", "F", "D"),
    }
    for i, part in enumerate(("query", "key", "value")):
        rows = (i * vit.width, (i + 1) * vit.width)
        block[f"{attention}.{part}.kernel"] = ("qkv.weight", "D Q K -> Q K D", rows)
        block[f"{attention}.{part}.bias"] = ("qkv.bias", "Q K", rows)
    for i in (0, 1):
        block[f"LayerNorm_{i}.scale"] = (f"norm{i + 1}.weight", "D")
        block[f"LayerNorm_{i}.bias"] = (f"norm{i + 1}.bias", "D")
    table = _stored("PaliGemma.img.", whole, "vision.", sizes)
    return table | _stored("PaliGemma.img.Transformer.encoderblock.", block, "vision.blocks.*.", sizes, vit.depth)


def _gemma_sizes(gemma: GemmaConfig, rank: int = 0) -> Sizes:
    sizes = {"D": gemma.width, "F": gemma.mlp_dim, "Q": gemma.num_heads, "G": gemma.num_kv_heads, "K": gemma.head_dim}
    return {**sizes, "R": rank, "2": 2, "3": 3, "3D": 3 * gemma.width}


def _gemma_table(gemma: GemmaConfig, stack: str, suffix: str, *, adaptive_norm: bool) -> Table:
    norm: Entries = {".scale": (".scale", "D")}
    if adaptive_norm:
        norm = _dense(".Dense_0", ".dense", "D", "3D")
    llm, sizes = "PaliGemma.llm", _gemma_sizes(gemma)
    table = _stored(f"{llm}.layers.", _matrices(gemma, suffix), f"{stack}.layers.*.", sizes, gemma.depth)
    for name in ("pre_attention_norm", "pre_ffw_norm"):
        table |= _stored(f"{llm}.layers.{name}{suffix}", norm, f"{stack}.layers.*.{name}", sizes, gemma.depth)
    return table | _stored(f"{llm}.final_norm{suffix}", norm, f"{stack}.final_norm", sizes)


def _matrices(gemma: GemmaConfig, suffix: str, *, in_heads: bool = False) -> Entries:
    """The matrices of a layer; `in_heads` counts the rows of queries, keys and values in heads."""
    entries: dict[str, Any] = {
        f"attn.attn_vec_einsum{suffix}.w": ("attention.out.weight", "Q K D -> D Q K"),
        f"mlp{suffix}.gating_einsum": ("feed_forward.gate_up.weight", "2 D F -> 2 F D"),
        f"mlp{suffix}.linear": ("feed_forward.down.weight", "F D -> D F"),
    }
    qkv, row = "attention.qkv.weight", 1 if in_heads else gemma.head_dim
    if gemma.num_kv_heads == gemma.num_heads:  # openpi stores plain multi-head attention in one array
        return {**entries, f"attn.qkv_einsum{suffix}.w": (qkv, "3 Q D K -> 3 Q K D")}
    q_end, kv_end = gemma.num_heads * row, (gemma.num_heads + 2 * gemma.num_kv_heads) * row
    entries[f"attn.q_einsum{suffix}.w"] = (qkv, "Q D K -> Q K D", (0, q_end))
    entries[f"attn.kv_einsum{suffix}.w"] = (qkv, "2 G D K -> 2 G K D", (q_end, kv_end))
    return entries


def lora_table(config: Pi0Config, lora: LoraConfig) -> Table:
    """The LoRA arrays of an openpi checkpoint, to be added to `jax_table`."""
    table: Table = {}
    for gemma, rank, stack, suffix in (
        (config.paligemma, lora.backbone_rank, "backbone", ""),
        (config.action_expert, lora.expert_rank, "expert", "_1"),
    ):
        entries: dict[str, Any] = {}
        matrices = _matrices(gemma, suffix, in_heads=True) if rank else {}
        for name, (param, axes, *rows) in matrices.items():
            has_lora = lora.attention if name.startswith("attn.") else lora.feed_forward
            if not has_lora:
                continue
            # In A the rank replaces the axis of the outputs, which is the last, in B the axis of the inputs.
            *_, inputs, outputs = axes.partition(" -> ")[0].split()
            stored = f"{name.removesuffix('w')}lora" if name.endswith(".w") else f"{name}_lora"
            param = param.replace("weight", "lora")
            entries[f"{stored}_a"] = (f"{param}_a", axes.replace(outputs, "R"), *rows)
            b_axes = "Q R D -> Q D R" if param == "attention.out.lora" else axes.replace(inputs, "R")
            entries[f"{stored}_b"] = (f"{param}_b", b_axes, *rows)
        sizes = _gemma_sizes(gemma, rank)
        table |= _stored("PaliGemma.llm.layers.", entries, f"{stack}.layers.*.", sizes, gemma.depth)
    return table


def jax_config(shapes: Shapes) -> Pi0Config:
    """Sizes of a checkpoint's arrays. Fields that no array determines (horizon, prompt length and format) stay unset.

    The image size follows from the learned position embedding; without one it is 224, as in all published models.
    """
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
