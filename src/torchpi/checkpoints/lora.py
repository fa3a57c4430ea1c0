"""LoRA weights of an openpi JAX checkpoint: found beside the weights that they change, or written.

Their meaning stands in `torchpi.model.lora`.
"""

import pathlib

from torchpi.checkpoints.layout import StoredArrays, stored_array
from torchpi.checkpoints.openpi import write_params
from torchpi.checkpoints.openpi_layout import jax_table, lora_table
from torchpi.errors import CheckpointError, listed
from torchpi.model.lora import LoraConfig, lora_config
from torchpi.model.pi0 import Pi0

DEFAULT_ALPHA = (LoraConfig.backbone_alpha, LoraConfig.expert_alpha)
"""Alphas of backbone and action expert in openpi's variants gemma_2b_lora and gemma_300m_lora."""
_STACKS = {False: "backbone", True: "action expert"}


def lora_pairs(arrays: StoredArrays) -> dict[str, tuple[str, str]]:
    """A and B by the array that they change; empty without LoRA. All of them are complete and fit."""
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
    if alone := sorted(lora - {name for pair in pairs.values() for name in pair}):
        raise CheckpointError(f"{arrays.source} has LoRA arrays that belong to nothing: {', '.join(alone)}.")
    return pairs


def stored_lora(arrays: StoredArrays, alpha: tuple[float, float] | None = None) -> LoraConfig:
    """The LoRA of a checkpoint. Its alphas are in no array: None, where the ranks tell that they are openpi's."""
    shapes = arrays.shapes
    # The expert's are attn.q_einsum_1.lora_a, mlp_1.linear_lora_a.
    ranks = {n.split(".")[-2].endswith("_1"): shape[-1] for n, shape in shapes.items() if n.endswith("lora_a")}
    attention = any("lora_" in name and ".attn." in name for name in shapes)
    known = {False: LoraConfig.backbone_rank, True: LoraConfig.expert_rank}
    if alpha is None and attention and not ranks.items() <= known.items():
        found = listed(f"rank {ranks[i]} in the {stack}" for i, stack in _STACKS.items() if i in ranks)
        raise CheckpointError(
            f"{arrays.source} has LoRA of {found}, whose alpha, by which its update is scaled, is in no array; it is "
            f"known for openpi's ranks {known[False]} and {known[True]} only. Pass lora_alpha= with those of the "
            "backbone and of the expert, as in the training config that the checkpoint is of."
        )
    backbone_alpha, expert_alpha = DEFAULT_ALPHA if alpha is None else alpha
    return LoraConfig(
        backbone_rank=ranks.get(False, 0),
        backbone_alpha=backbone_alpha,
        expert_rank=ranks.get(True, 0),
        expert_alpha=expert_alpha,
        attention=attention,
        feed_forward=any("lora_" in name and ".mlp" in name for name in shapes),
    )


def write_lora_params(params: pathlib.Path, model: Pi0) -> None:
    """Write a model with LoRA as the `params` of an openpi JAX checkpoint, with names and shapes of its LoRA variants,
    into an empty folder.

    Ranks are in the shapes; the alphas are in no array, and have to be in the training config that restores it.
    """
    config = lora_config(model)
    if config is None:
        raise CheckpointError("The model has no LoRA; `torchpi convert --to openpi-jax` writes plain ones.")
    table = jax_table(model.config) | lora_table(model.config, config)
    shapes = {name: array.shape for name, array in table.items()}
    write_params(params, shapes, lambda name: stored_array(model, table[name]))
