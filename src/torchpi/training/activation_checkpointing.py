"""Activation checkpointing: the backward pass recomputes activations of a layer instead of keeping them in memory."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchpi.model.pi0 import Pi0
from torchpi.training.config import Checkpointing

# Matmuls with weights. Attention matmuls are not kept: their results grow with the square of the number of tokens.
_KEPT_OPERATIONS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def layers(model: Pi0) -> Iterable[nn.Module]:
    """The layers of all stacks, without the backbone's last layer, of which only keys and values are computed."""
    return (*model.vision.blocks, *list(model.backbone.layers)[:-1], *model.expert.layers)


def checkpoint_activations(model: Pi0, kind: Checkpointing) -> None:
    """Apply activation checkpointing to the layers, in place.

    Args:
        kind: "full" keeps only each layer's input and runs its forward pass a second time, which costs a third more
            compute; "selective" keeps the results of matmuls with weights and recomputes the cheap operations.
    """
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # layers use no random numbers
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for layer in layers(model):
        layer.forward = _checkpointed(layer.forward, options)


def _checkpointed(forward: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    def checkpointed(*args: Any) -> Any:  # not a functools.partial, which torch.compile does not trace
        return checkpoint(forward, *args, **options)

    return checkpointed


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE
