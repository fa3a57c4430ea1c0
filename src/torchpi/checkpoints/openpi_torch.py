"""Arrays of openpi's PyTorch port; LeRobot has the same ones, with the prefix "model.".

The modules are those of `transformers`: PaliGemma, and a second Gemma as the action expert.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from torchpi.checkpoints.layout import UNSET, Shapes, StoredArrays, Table, sizes_of, stored_as, whole
from torchpi.config import GEMMA_VARIANTS, VISION_VARIANTS, GemmaConfig, Pi0Config, VisionConfig
from torchpi.errors import CheckpointError
from torchpi.model.pi0 import Pi0

LEROBOT_PREFIX = "model."
_MODULE = "paligemma_with_expert."
_PALIGEMMA, _EXPERT = f"{_MODULE}paligemma", f"{_MODULE}gemma_expert"
_VISION, _LANGUAGE = f"{_PALIGEMMA}.model.vision_tower.vision_model", f"{_PALIGEMMA}.model.language_model"
EMBEDDING, TIED_EMBEDDING = f"{_LANGUAGE}.embed_tokens.weight", f"{_PALIGEMMA}.lm_head.weight"
EXPERT_LM_HEAD = f"{_EXPERT}.lm_head.weight"

EmbeddingChoice = Literal["embed_tokens", "lm_head"]
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts that torch.compile, DDP, FSDP and activation checkpointing insert into names."""


def unwrapped(name: str) -> str:
    """Name without the parts that wrapper modules insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _plain_names(arrays: StoredArrays) -> dict[str, str]:
    """openpi's names, which have no prefix → stored names."""
    plain = {unwrapped(name): name for name in arrays.shapes}
    if len(plain) < len(arrays.shapes):
        duplicates = sorted(set(arrays.shapes) - set(plain.values()))
        raise CheckpointError(
            f"{arrays.source} has {duplicates[0]} with and without the prefix of a wrapper; keep one."
        )
    prefix = next((name.partition(_MODULE)[0] for name in plain if _MODULE in name), "")
    if unprefixed := [stored for name, stored in plain.items() if not name.startswith(prefix)]:
        raise CheckpointError(f"{arrays.source}: some arrays have the prefix {prefix!r}, but {unprefixed[0]} does not.")
    return {name.removeprefix(prefix): stored for name, stored in plain.items()}


class TorchArrays:
    """Arrays of openpi's or LeRobot's port by openpi's names, without unused ones; see `StoredArrays`."""

    def __init__(self, arrays: StoredArrays, embedding: EmbeddingChoice | None = None) -> None:
        """Match the names; `embedding` chooses the array to read if the tied embedding is stored under both names."""
        self.source: pathlib.Path = arrays.source
        self._arrays = arrays
        self._stored = _plain_names(arrays)
        self.dropped: dict[str, str] = {}
        """Stored arrays that are not loaded, each with the reason."""
        self.tied = ""
        """Stored name of the embedding, if it is the name of the tied text head."""
        if stored := self._stored.pop(EXPERT_LM_HEAD, None):
            self.dropped[stored] = "the action expert predicts no tokens"
        self._copy = ""
        """The other stored name of the embedding, whose values must be equal."""
        self.has_both = EMBEDDING in self._stored and TIED_EMBEDDING in self._stored
        """The embedding is stored under both of its names."""
        if self.has_both:
            chosen, other = self._stored.pop(EMBEDDING), self._stored.pop(TIED_EMBEDDING)
            if embedding == "lm_head":
                chosen, other = other, chosen
            self._stored[EMBEDDING] = chosen
            if embedding:
                self.dropped[other] = f"{embedding} is used"
            else:
                self.dropped[other], self._copy = "a copy of the embedding, for the text head", other
        elif TIED_EMBEDDING in self._stored:
            self.tied = self._stored[EMBEDDING] = self._stored.pop(TIED_EMBEDDING)
        self.shapes: Shapes = {name: arrays.shapes[stored] for name, stored in self._stored.items()}
        self.dtypes = {name: arrays.dtypes[stored] for name, stored in self._stored.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name == EMBEDDING and self._copy:
            stored = self._arrays.read(self._stored[name]).view(torch.uint8)
            if not torch.equal(stored, self._arrays.read(self._copy).view(torch.uint8)):
                raise CheckpointError(
                    f"{self.source} stores the embedding twice, and {self._stored[name]} differs from {self._copy}; "
                    'only one of them was trained. Choose it with embedding="embed_tokens" or embedding="lm_head" '
                    "(for a training, convert the checkpoint with that option first)."
                )
        return self._arrays.read(self._stored[name], dtype)


_KEPT_FLOAT32 = ("vision_tower", "multi_modal_projector", "input_layernorm", "post_attention_layernorm", "model.norm")


def stated_dtype(dtypes: Mapping[str, torch.dtype]) -> str:
    """Dtype to state in config.json: "bfloat16" only if LeRobot, which casts the weights to it, then rounds no array.

    Source: LeRobot 0.6, which keeps `_KEPT_FLOAT32` in float32; older versions also round the vision tower.
    """
    cast = [
        dtype
        for name, dtype in dtypes.items()
        if _MODULE in name and name != EXPERT_LM_HEAD and not any(part in name for part in _KEPT_FLOAT32)
    ]
    return "float32" if torch.float32 in cast else "bfloat16"


# Regular expressions of torchpi's names, and their replacements in the port. The joined projections gate_up_proj and
# qkv_proj are several arrays there, see `torch_table`.
_RENAMED = (
    (r"^embedding$", EMBEDDING),
    (r"^suffix\.", ""),
    (r"^backbone", _LANGUAGE),
    (r"^expert", f"{_EXPERT}.model"),
    (r"^vision\.patch_embed", f"{_VISION}.embeddings.patch_embedding"),
    (r"^vision\.pos_embed", f"{_VISION}.embeddings.position_embedding.weight"),
    (r"^vision\.norm", f"{_VISION}.post_layernorm"),
    (r"^vision\.head", f"{_PALIGEMMA}.model.multi_modal_projector.linear"),
    (r"^vision\.blocks\.(\d+)\.out", rf"{_VISION}.encoder.layers.\1.self_attn.out_proj"),
    (r"^vision\.blocks", f"{_VISION}.encoder.layers"),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.fc([12])\.", r".mlp.fc\1."),
    (r"\.final_norm\.", ".norm."),
    (r"\.pre_attention_norm\.", ".input_layernorm."),
    (r"\.pre_ffw_norm\.", ".post_attention_layernorm."),
    (r"\.scale$", ".weight"),
    (r"\.attention\.out\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.down\.", ".mlp.down_proj."),
    (r"\.feed_forward\.gate_up\.", ".mlp.gate_up_proj."),
    (r"(\.attention)?\.qkv\.", ".self_attn.qkv_proj."),
)


def torch_table(config: Pi0Config) -> Table:
    """Every array of openpi's PyTorch port that is used, by its name."""
    table: Table = {}
    for param, parameter in Pi0(config, device="meta").named_parameters():
        name, shape, patch = param, tuple(parameter.shape), config.siglip.patch
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if param == "vision.patch_embed.weight":
            sizes = {"out": shape[0], "3": 3, "h": patch, "w": patch}
            table[name] = stored_as(param, "out 3 h w -> out h w 3", sizes)
        elif joined := re.search("qkv|gate_up", name):
            parts = ("q", "k", "v") if joined[0] == "qkv" else ("gate", "up")
            gemma = config.paligemma  # the expert has the same numbers of heads
            is_grouped = ".attention.qkv" in param
            shares = (gemma.num_heads, gemma.num_kv_heads, gemma.num_kv_heads) if is_grouped else (1,) * len(parts)
            end = 0
            for part, share in zip(parts, shares, strict=True):
                start, end = end, end + shape[0] * share // sum(shares)
                table[name.replace(joined[0], part)] = whole(param, (end - start, *shape[1:]), rows=(start, end))
        else:
            table[name] = whole(param, shape)
    return table


def torch_config(shapes: Shapes, num_heads: tuple[int, int, int] | None) -> Pi0Config:
    """Sizes of the arrays; `num_heads` as from `stated_heads`, or None for the published models'.

    Fields that no array determines (horizon, prompt length and format) stay unset.
    """
    width, _, patch, _ = sizes_of(shapes, f"{_VISION}.embeddings.patch_embedding.weight", 4)
    backbone_width = sizes_of(shapes, f"{_LANGUAGE}.layers.0.self_attn.q_proj.weight", 2)[1]
    vision, backbone = VISION_VARIANTS["so400m/14"], GEMMA_VARIANTS["gemma_2b"]
    if not num_heads and (width, backbone_width) != (vision.width, backbone.width):
        raise CheckpointError(
            f"The arrays do not determine the numbers of heads of a vision tower of width {width} and a backbone of "
            f"width {backbone_width}, which are not the published model's: pass config= with siglip.num_heads, "
            "paligemma.num_heads and paligemma.num_kv_heads (a Pi0Config or a JSON file)."
        )
    vision_heads, heads, kv_heads = num_heads or (vision.num_heads, backbone.num_heads, backbone.num_kv_heads)

    def depth(layers: str) -> int:
        return 1 + max(int(name[len(layers) + 1 :].split(".")[0]) for name in shapes if name.startswith(f"{layers}."))

    def gemma(stored: str) -> GemmaConfig:
        q_width, width = sizes_of(shapes, f"{stored}.layers.0.self_attn.q_proj.weight", 2)
        kv_width = sizes_of(shapes, f"{stored}.layers.0.self_attn.k_proj.weight", 2)[0]
        head_dim = q_width // heads
        if q_width % heads or kv_width != kv_heads * head_dim:
            raise CheckpointError(
                f"{stored} has {q_width} rows of queries and {kv_width} of keys, which are not {heads} and {kv_heads} "
                "heads."
            )
        mlp = sizes_of(shapes, f"{stored}.layers.0.mlp.gate_proj.weight", 2)[0]
        return GemmaConfig(width, depth(f"{stored}.layers"), mlp, heads, kv_heads, head_dim)

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
            width, depth(layers), mlp_dim, vision_heads, patch, "learned" if learned else "sincos2d"
        ),
        action_dim=sizes_of(shapes, "action_in_proj.weight", 2)[1],
        vocab_size=sizes_of(shapes, EMBEDDING, 2)[0],
        image_size=patch * round(num_patches**0.5),
    )
