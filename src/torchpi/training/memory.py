"""Activation checkpointing: what of a layer's forward pass is computed a second time instead of kept."""

import functools
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchpi.errors import TrainingError
from torchpi.model.pi0 import Pi0
from torchpi.training.config import Checkpointing

# Products with weights; attention's own products, whose results grow with the square of the tokens, are not kept.
_KEPT = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def layers(model: Pi0) -> Iterable[nn.Module]:
    """The layers of all stacks. Of the backbone's last one only keys and values are computed, not through itself."""
    return (*model.vision.blocks, *list(model.backbone.layers)[:-1], *model.expert.layers)


def checkpoint_activations(model: Pi0, how: Checkpointing) -> None:
    """Let the layers keep less for the backward pass, in place.

    Args:
        how: "full" keeps the layers' inputs only and runs each layer's forward a second time, a third more work;
            "selective" keeps the products with weights and computes what is cheap again.
    """
    if how not in get_args(Checkpointing):
        raise TrainingError(
            f"activation_checkpointing must be one of {', '.join(get_args(Checkpointing))}, got {how!r}."
        )
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn in a layer
    if how == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for layer in layers(model):
        layer.forward = functools.partial(checkpoint, layer.forward, **options)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
