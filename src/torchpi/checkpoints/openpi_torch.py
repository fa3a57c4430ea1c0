"""The arrays of openpi's PyTorch port, which LeRobot's has as well, behind the prefix "model.".

Its modules are those of `transformers`: PaliGemma, and a second Gemma as the action expert.
"""

import dataclasses
import pathlib

import torch
from torch import Tensor

from torchpi.checkpoints.layout import (
    UNSET,
    CheckpointArray,
    Shapes,
    StoredArrays,
    projections,
    sizes_of,
    whole,
)
from torchpi.checkpoints.sizes import Heads
from torchpi.config import GEMMA_VARIANTS, VISION_VARIANTS, GemmaConfig, Pi0Config, VisionConfig
from torchpi.errors import CheckpointError

LEROBOT_PREFIX = "model."
_PALIGEMMA, _EXPERT = "paligemma_with_expert.paligemma", "paligemma_with_expert.gemma_expert"
_VISION, _LANGUAGE = f"{_PALIGEMMA}.model.vision_tower.vision_model", f"{_PALIGEMMA}.model.language_model"
EMBEDDING, TIED_EMBEDDING = f"{_LANGUAGE}.embed_tokens.weight", f"{_PALIGEMMA}.lm_head.weight"
EXPERT_LM_HEAD = f"{_EXPERT}.lm_head.weight"


class TorchArrays:
    """The arrays of either port by openpi's names, without those that no computation reads; see `StoredArrays`."""

    def __init__(self, arrays: StoredArrays) -> None:
        """"""
        self.source: pathlib.Path = arrays.source
        self._arrays = arrays
        prefixed = [name.startswith(LEROBOT_PREFIX) for name in arrays.shapes]
        if any(prefixed) and not all(prefixed):
            some = next(name for name, is_prefixed in zip(arrays.shapes, prefixed, strict=True) if not is_prefixed)
            raise CheckpointError(
                f"{arrays.source}: some arrays have the prefix {LEROBOT_PREFIX!r}, but {some} has not."
            )
        self.prefix = LEROBOT_PREFIX if all(prefixed) and prefixed else ""
        self._stored = {name.removeprefix(self.prefix): name for name in arrays.shapes}
        self.dropped: dict[str, str] = {}
        """Stored arrays that are not loaded, and why."""
        self.tied = ""
        """The stored name of the embedding, where it is that of the text head it is tied to."""
        if stored := self._stored.pop(EXPERT_LM_HEAD, None):
            self.dropped[stored] = "the action expert predicts no tokens"
        if EMBEDDING in self._stored and TIED_EMBEDDING in self._stored:
            self.dropped[self._stored.pop(TIED_EMBEDDING)] = "a copy of the embedding, for the text head"
        elif TIED_EMBEDDING in self._stored:
            self.tied = self._stored[EMBEDDING] = self._stored.pop(TIED_EMBEDDING)
        self.shapes: Shapes = {name: arrays.shapes[stored] for name, stored in self._stored.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """An array by openpi's name."""
        return self._arrays.read(self._stored[name], dtype)


def torch_table(config: Pi0Config) -> dict[str, CheckpointArray]:
    """Every array of openpi's PyTorch port that a computation reads, by its name."""
    found = {EMBEDDING: whole("embedding", config.vocab_size, config.paligemma.width)}
    found |= _vision_table(config)
    found |= _gemma_table(config.paligemma, _LANGUAGE, "backbone", adaptive_norm=False)
    found |= _gemma_table(config.action_expert, f"{_EXPERT}.model", "expert", adaptive_norm=config.pi05)
    for name, module, num_in, num_out in projections(config):
        found |= _linear(name, module, num_in, num_out)
    return found


def _linear(
    stored: str, module: str, num_in: int, num_out: int, rows: tuple[int, int] | None = None
) -> dict[str, CheckpointArray]:
    return {
        f"{stored}.weight": whole(f"{module}.weight", num_out, num_in, rows=rows),
        f"{stored}.bias": whole(f"{module}.bias", num_out, rows=rows),
    }


def _vision_table(config: Pi0Config) -> dict[str, CheckpointArray]:
    vit = config.siglip
    width, patch = vit.width, vit.patch
    found = {
        f"{_VISION}.embeddings.patch_embedding.weight": whole(
            "vision.patch_embed.weight", width, 3, patch, patch, axes=(0, 2, 3, 1)
        ),
        f"{_VISION}.embeddings.patch_embedding.bias": whole("vision.patch_embed.bias", width),
        f"{_VISION}.post_layernorm.weight": whole("vision.norm.weight", width),
        f"{_VISION}.post_layernorm.bias": whole("vision.norm.bias", width),
    }
    if vit.position == "learned":
        position = whole("vision.pos_embed", config.num_patches, width)
        found[f"{_VISION}.embeddings.position_embedding.weight"] = position
    for i in range(vit.depth):
        stored, block = f"{_VISION}.encoder.layers.{i}", f"vision.blocks.{i}"
        for norm in (1, 2):
            for part in ("weight", "bias"):
                found[f"{stored}.layer_norm{norm}.{part}"] = whole(f"{block}.norm{norm}.{part}", width)
        for j, part in enumerate(("q", "k", "v")):
            rows = (j * width, (j + 1) * width)
            found |= _linear(f"{stored}.self_attn.{part}_proj", f"{block}.qkv", width, width, rows)
        found |= _linear(f"{stored}.self_attn.out_proj", f"{block}.out", width, width)
        found |= _linear(f"{stored}.mlp.fc1", f"{block}.fc1", width, vit.mlp_dim)
        found |= _linear(f"{stored}.mlp.fc2", f"{block}.fc2", vit.mlp_dim, width)
    return found | _linear(
        f"{_PALIGEMMA}.model.multi_modal_projector.linear", "vision.head", width, config.paligemma.width
    )


def _gemma_table(gemma: GemmaConfig, stored: str, stack: str, *, adaptive_norm: bool) -> dict[str, CheckpointArray]:
    width, mlp = gemma.width, gemma.mlp_dim
    q, kv = gemma.num_heads * gemma.head_dim, gemma.num_kv_heads * gemma.head_dim
    found: dict[str, CheckpointArray] = {}

    def add(name: str, param: str, num_out: int, num_in: int, rows: tuple[int, int] | None = None) -> None:
        found[f"{name}.weight"] = whole(f"{param}.weight", num_out, num_in, rows=rows)

    def add_norm(name: str, param: str) -> None:
        if adaptive_norm:
            found.update(_linear(f"{name}.dense", f"{param}.dense", width, 3 * width))
        else:
            found[f"{name}.weight"] = whole(f"{param}.scale", width)

    for i in range(gemma.depth):
        layer, ours = f"{stored}.layers.{i}", f"{stack}.layers.{i}"
        add_norm(f"{layer}.input_layernorm", f"{ours}.pre_attention_norm")
        add_norm(f"{layer}.post_attention_layernorm", f"{ours}.pre_ffw_norm")
        attention = f"{ours}.attention"
        add(f"{layer}.self_attn.q_proj", f"{attention}.qkv", q, width, (0, q))
        add(f"{layer}.self_attn.k_proj", f"{attention}.qkv", kv, width, (q, q + kv))
        add(f"{layer}.self_attn.v_proj", f"{attention}.qkv", kv, width, (q + kv, q + 2 * kv))
        add(f"{layer}.self_attn.o_proj", f"{attention}.out", width, q)
        add(f"{layer}.mlp.gate_proj", f"{ours}.feed_forward.gate_up", mlp, width, (0, mlp))
        add(f"{layer}.mlp.up_proj", f"{ours}.feed_forward.gate_up", mlp, width, (mlp, 2 * mlp))
        add(f"{layer}.mlp.down_proj", f"{ours}.feed_forward.down", width, mlp)
    add_norm(f"{stored}.norm", f"{stack}.final_norm")
    return found


def torch_config(arrays: StoredArrays, heads: Heads | None) -> Pi0Config:
    """The sizes that the arrays have; horizon, prompt length and format are in none and stay unset.

    Args:
        heads: the numbers of heads, which the shapes do not say; None: those of the published models.
    """
    try:
        return _config(arrays.shapes, heads)
    except ValueError as error:
        raise CheckpointError(f"{arrays.source.parent}: {error}") from error


def _config(shapes: Shapes, heads: Heads | None) -> Pi0Config:
    width, _, patch, _ = sizes_of(shapes, f"{_VISION}.embeddings.patch_embedding.weight", 4)
    heads = heads or _published_heads(width, sizes_of(shapes, f"{_LANGUAGE}.layers.0.self_attn.q_proj.weight", 2)[1])

    def depth(layers: str) -> int:
        return 1 + max(int(name[len(layers) + 1 :].split(".")[0]) for name in shapes if name.startswith(f"{layers}."))

    def gemma(stored: str) -> GemmaConfig:
        q_width, width = sizes_of(shapes, f"{stored}.layers.0.self_attn.q_proj.weight", 2)
        kv_width = sizes_of(shapes, f"{stored}.layers.0.self_attn.k_proj.weight", 2)[0]
        head_dim = q_width // heads.paligemma
        if q_width % heads.paligemma or kv_width != heads.paligemma_kv * head_dim:
            raise CheckpointError(
                f"{stored} has {q_width} rows of queries and {kv_width} of keys, which are not {heads.paligemma} and "
                f"{heads.paligemma_kv} heads."
            )
        mlp = sizes_of(shapes, f"{stored}.layers.0.mlp.gate_proj.weight", 2)[0]
        return GemmaConfig(width, depth(f"{stored}.layers"), mlp, heads.paligemma, heads.paligemma_kv, head_dim)

    position = f"{_VISION}.embeddings.position_embedding.weight"
    learned = position in shapes
    num_patches = sizes_of(shapes, position, 2)[0] if learned else (224 // patch) ** 2
    layers = f"{_VISION}.encoder.layers"
    mlp_dim = sizes_of(shapes, f"{layers}.0.mlp.fc1.weight", 2)[0]
    return dataclasses.replace(
        UNSET,
        pi05="time_mlp_in.weight" in shapes,
        paligemma_variant=gemma(_LANGUAGE),
        action_expert_variant=gemma(f"{_EXPERT}.model"),
        siglip_variant=VisionConfig(
            width, depth(layers), mlp_dim, heads.siglip, patch, "learned" if learned else "sincos2d"
        ),
        action_dim=sizes_of(shapes, "action_in_proj.weight", 2)[1],
        vocab_size=sizes_of(shapes, EMBEDDING, 2)[0],
        image_size=patch * round(num_patches**0.5),
    )


def _published_heads(vit_width: int, backbone_width: int) -> Heads:
    vision, backbone = VISION_VARIANTS["so400m/14"], GEMMA_VARIANTS["gemma_2b"]
    if (vit_width, backbone_width) != (vision.width, backbone.width):
        raise CheckpointError(
            f"The arrays do not say how many heads a vision tower of width {vit_width} and a backbone of width "
            f"{backbone_width} have, which are not the published model's: pass config= with siglip.num_heads, "
            "paligemma.num_heads and paligemma.num_kv_heads (a Pi0Config or a JSON file)."
        )
    return Heads(vision.num_heads, backbone.num_heads, backbone.num_kv_heads)
