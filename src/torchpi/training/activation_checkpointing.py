"""Activation checkpointing: parts of a layer's forward pass are recomputed in the backward pass instead of kept."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchpi.model.pi0 import Pi0
from torchpi.training.config import Checkpointing

# Matmuls with weights; those of attention, whose results grow with the square of the tokens, are not kept.
_KEPT = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def layers(model: Pi0) -> Iterable[nn.Module]:
    """The layers of all stacks. The backbone's last one is left out: only its keys and values are computed."""
    return (*model.vision.blocks, *list(model.backbone.layers)[:-1], *model.expert.layers)


def checkpoint_activations(model: Pi0, kind: Checkpointing) -> None:
    """Let the layers keep less for the backward pass, in place.

    Args:
        kind: "full" keeps the layers' inputs only and runs each layer's forward a second time, a third more work;
            "selective" keeps the results of matmuls with weights and recomputes what is cheap.
    """
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn in a layer
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for layer in layers(model):
        layer.forward = _checkpointed(layer.forward, options)


def _checkpointed(forward: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    def recomputed(*args: Any) -> Any:  # torch.compile would not look into a partial
        return checkpoint(forward, *args, **options)

    return recomputed


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
