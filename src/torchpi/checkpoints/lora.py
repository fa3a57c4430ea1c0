"""LoRA weights in openpi JAX checkpoints, read and written; see `torchpi.model.lora` for how they are applied."""

import pathlib

from torchpi.checkpoints.layout import StoredArrays, stored_array
from torchpi.checkpoints.openpi import write_params
from torchpi.checkpoints.openpi_layout import jax_table, lora_table
from torchpi.errors import CheckpointError, listed
from torchpi.model.lora import LoraConfig, lora_config
from torchpi.model.pi0 import Pi0

DEFAULT_ALPHA = (LoraConfig.backbone_alpha, LoraConfig.expert_alpha)
"""Alphas of the backbone and the action expert in openpi's variants gemma_2b_lora and gemma_300m_lora."""


def lora_pairs(arrays: StoredArrays) -> dict[str, tuple[str, str]]:
    """Names of A and B by the array that they update, after checking their shapes; empty without LoRA."""
    lora, pairs = {name for name in arrays.shapes if "lora_" in name}, {}
    for a in sorted(name for name in lora if name.endswith("lora_a")):
        b = f"{a.removesuffix('a')}b"
        # attn.q_einsum.lora_a changes attn.q_einsum.w, mlp.linear_lora_a changes mlp.linear.
        base = f"{a.removesuffix('lora_a')}w" if a.endswith(".lora_a") else a.removesuffix("_lora_a")
        if b not in lora or base not in arrays.shapes:
            raise CheckpointError(f"{arrays.source} has {a}, but not {b if b not in lora else base}.")
        a_shape, b_shape, base_shape = (arrays.shapes[name] for name in (a, b, base))
        rank = a_shape[-1]
        if a_shape != (*base_shape[:-1], rank) or b_shape != (*base_shape[:-2], rank, base_shape[-1]):
            raise CheckpointError(
                f"{arrays.source}: the LoRA arrays {a} {list(a_shape)} and {b} {list(b_shape)} do not fit {base} "
                f"{list(base_shape)}."
            )
        pairs[base] = (a, b)
    if unpaired := sorted(lora - {name for pair in pairs.values() for name in pair}):
        raise CheckpointError(f"{arrays.source} has LoRA arrays without a counterpart: {', '.join(unpaired)}.")
    return pairs


def stored_lora(arrays: StoredArrays, alpha: tuple[float, float] | None = None) -> LoraConfig:
    """LoRA config of a checkpoint. It does not store `alpha`; None: openpi's, if the ranks are openpi's."""
    shapes = arrays.shapes
    ranks: dict[str, int] = {}
    for name, shape in shapes.items():
        if name.endswith("lora_a"):  # the expert's are attn.q_einsum_1.lora_a and mlp_1.linear_lora_a
            ranks["action expert" if name.split(".")[-2].endswith("_1") else "backbone"] = shape[-1]
    attention = any("lora_" in name and ".attn." in name for name in shapes)
    openpi_ranks = {"backbone": LoraConfig.backbone_rank, "action expert": LoraConfig.expert_rank}
    if alpha is None and attention and not ranks.items() <= openpi_ranks.items():
        found = listed(f"rank {ranks[stack]} in the {stack}" for stack in openpi_ranks if stack in ranks)
        raise CheckpointError(
            f"{arrays.source} has LoRA of {found}, and does not store alpha, which scales the update; it is known only "
            f"for openpi's ranks {LoraConfig.backbone_rank} and {LoraConfig.expert_rank}. Pass lora_alpha= with the "
            "alphas of the backbone and the expert in the training config of this checkpoint."
        )
    backbone_alpha, expert_alpha = DEFAULT_ALPHA if alpha is None else alpha
    return LoraConfig(
        backbone_rank=ranks.get("backbone", 0),
        backbone_alpha=backbone_alpha,
        expert_rank=ranks.get("action expert", 0),
        expert_alpha=expert_alpha,
        attention=attention,
        feed_forward=any("lora_" in name and ".mlp" in name for name in shapes),
    )


def write_lora_params(params: pathlib.Path, model: Pi0) -> None:
    """Write a model with LoRA as the `params` of an openpi JAX checkpoint of its LoRA variants, into an empty folder.

    The checkpoint does not store the alphas: the training config that restores it must have the same ones.
    """
    config = lora_config(model)
    if config is None:
        raise CheckpointError("The model has no LoRA; `torchpi convert --to openpi-jax` writes models without it.")
    table = jax_table(model.config) | lora_table(model.config, config)
    shapes = {name: array.shape for name, array in table.items()}
    write_params(params, shapes, lambda name: stored_array(model, table[name]))
