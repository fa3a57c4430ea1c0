"""LoRA: train backbone and action expert through low-rank updates of their frozen weights.

This follows openpi's code, which differs from the paper (arXiv:2106.09685):

- Every attention head has its own A and B. The attention update is scaled by alpha / rank.
- The output projection sums over the heads between A and B, so each head's A is multiplied by the sum of all heads' B.
- The feed-forward update is not scaled.
- A and B are both initialized with N(0, 0.01²), so training does not start exactly at the base model.
"""

from collections.abc import Iterator
from typing import get_args

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from torchpi.config import Finetune, LoraConfig
from torchpi.errors import ModelError
from torchpi.model.gemma import Gemma
from torchpi.model.layers import Linear
from torchpi.model.pi0 import Pi0

INIT_STD = 0.01


class LoraLinear(Linear):
    """x·Wᵀ + scale·(x·A)·B, in x's dtype. W keeps its parameter name from the plain model.

    The outputs are divided into equal groups (heads, or the feed-forward's gate and up), each with its own A and B.
    """

    lora_a: nn.Parameter
    """float32 [groups, rank, inputs]."""
    lora_b: nn.Parameter
    """float32 [groups, outputs / groups, rank]."""

    def __init__(self, base: Linear, config: LoraConfig, *, groups: int, rank: int, scale: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.config, self.scale = config, scale
        for name, shape in self.shapes(groups, rank).items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, dtype=torch.float32, device=base.weight.device))
            )

    def shapes(self, groups: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Compute the shapes of lora_a and lora_b."""
        return {
            "lora_a": (groups, rank, self.in_features),
            "lora_b": (groups, self.out_features // groups, rank),
        }

    def init_lora(self, generator: torch.Generator | None) -> None:
        """Initialize A and B with N(0, 0.01²)."""
        nn.init.normal_(self.lora_a, std=INIT_STD, generator=generator)
        nn.init.normal_(self.lora_b, std=INIT_STD, generator=generator)

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """Multiply by the updated weight, in x's dtype."""
        tokens = x.flatten(0, -2)
        return self._add_update(super().forward(tokens), tokens, first=0).unflatten(0, x.shape[:-1])

    def rows(self, x: Float[Tensor, "*batch i"], first: int) -> Float[Tensor, "*batch rows"]:
        """Compute the outputs of `forward` from index `first` on."""
        tokens = x.flatten(0, -2)
        return self._add_update(super().rows(tokens, first), tokens, first).unflatten(0, x.shape[:-1])

    def _add_update(self, out: Tensor, x: Tensor, first: int) -> Tensor:
        a, b = self._matrices()
        # One matmul for all groups. Not in place: activation checkpointing may save the output of the base layer.
        return torch.addmm(out, F.linear(x, a.to(x.dtype)), b[first:].T.to(x.dtype), alpha=self.scale)

    def _matrices(self) -> tuple[Float[Tensor, "rank i"], Float[Tensor, "o rank"]]:
        """A of all groups, stacked, and the block-diagonal matrix of their B."""
        groups = torch.eye(len(self.lora_b), dtype=self.lora_b.dtype, device=self.lora_b.device)
        blocks = self.lora_b[:, :, None, :] * groups[:, None, :, None]  # [groups, outputs / groups, groups, rank]
        return self.lora_a.flatten(0, 1), blocks.flatten(2).flatten(0, 1)

    def update(self) -> Float32[Tensor, "o i"]:
        """Compute the update of the whole weight matrix."""
        a, b = self._matrices()
        return self.scale * (b.float() @ a.float())


class HeadSumLoraLinear(LoraLinear):
    """LoRA of the output projection: its inputs are the heads, and the outputs of their A are summed before B.

    Only the sum of all B matters; they are stored separately as in openpi's files.
    """

    lora_a: nn.Parameter
    """float32 [rank, inputs]: A of all heads, side by side."""
    lora_b: nn.Parameter
    """float32 [heads, outputs, rank]."""

    def shapes(self, groups: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Compute the shapes of lora_a and lora_b; the groups are the heads."""
        return {"lora_a": (rank, self.in_features), "lora_b": (groups, self.out_features, rank)}

    def _matrices(self) -> tuple[Float[Tensor, "rank i"], Float[Tensor, "o rank"]]:
        return self.lora_a, self.lora_b.sum(dim=0)


def add_lora(model: Pi0, config: LoraConfig, generator: torch.Generator | None) -> None:
    """Attach low-rank matrices to a model, in place, and initialize them as openpi does.

    They are float32 whatever the dtype of the base, and on its device. The base parameters remain the same objects
    under the same names.

    Args:
        generator: on the model's device; None: PyTorch's default generator.
    """
    attach_lora(model, config)
    for _, layer in lora_layers(model):
        layer.init_lora(generator)


def attach_lora(model: Pi0, config: LoraConfig) -> None:
    """Attach uninitialized low-rank matrices, to be filled from a checkpoint."""
    if (existing := lora_config(model)) is not None:
        raise ModelError(f"The model has LoRA already, {existing}; merge_lora folds it into the weights.")
    if config.backbone_rank:
        _attach(model.backbone, config, config.backbone_rank, config.backbone_alpha)
    if config.expert_rank:
        _attach(model.expert, config, config.expert_rank, config.expert_alpha)


def _attach(stack: Gemma, config: LoraConfig, rank: int, alpha: float) -> None:
    heads, key_value_heads = stack.config.num_heads, 2 * stack.config.num_kv_heads
    for block in stack.layers:
        attention, feed_forward = block.attention, block.feed_forward
        if config.attention:
            scale = alpha / rank
            attention.qkv = LoraLinear(attention.qkv, config, groups=heads + key_value_heads, rank=rank, scale=scale)
            attention.out = HeadSumLoraLinear(attention.out, config, groups=heads, rank=rank, scale=scale)
        if config.feed_forward:
            feed_forward.gate_up = LoraLinear(feed_forward.gate_up, config, groups=2, rank=rank, scale=1.0)
            feed_forward.down = LoraLinear(feed_forward.down, config, groups=1, rank=rank, scale=1.0)


@torch.no_grad()
def merge_lora(model: Pi0) -> None:
    """Add the low-rank updates to the weights (in float32, before any cast) and restore plain layers, in place."""
    if lora_config(model) is None:
        raise ModelError("The model has no LoRA to merge.")
    for name, layer in list(lora_layers(model)):
        layer.weight.copy_(layer.weight.float() + layer.update())
        plain = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = layer.weight
        model.set_submodule(name, plain)


def lora_layers(model: Pi0) -> Iterator[tuple[str, LoraLinear]]:
    """Iterate over the layers with low-rank matrices, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def lora_config(model: Pi0) -> LoraConfig | None:
    """Return the LoRA config of a model, or None."""
    return next((layer.config for _, layer in lora_layers(model)), None)


def is_lora(name: str) -> bool:
    """Test whether a parameter name is that of a low-rank matrix."""
    return name.rpartition(".")[2] in ("lora_a", "lora_b")


_PROJECTIONS = ("suffix.", "action_out_proj.")


def trainable_parameters(model: Pi0, what: Finetune) -> dict[str, bool]:
    """Select the trainable parameters; True for each name that training updates.

    Args:
        what: "full": all. "frozen_vision": all but the vision tower and its head. "expert": the action expert and the
            projections of actions, time and state. "lora": openpi's rule, which freezes the base weights of each stack
            with LoRA (with the backbone also the embedding) and trains the rest: low-rank matrices, vision tower,
            projections, and a stack without LoRA. "lora_strict": only the low-rank matrices and the projections.
    """
    config = lora_config(model)
    if what not in get_args(Finetune):
        raise ModelError(f"finetune must be one of {', '.join(get_args(Finetune))}, got {what!r}.")
    if what in ("lora", "lora_strict") and config is None:
        raise ModelError(f"{what!r} trains low-rank matrices, but the model has none; add_lora adds them.")
    names = [name for name, _ in model.named_parameters()]
    if what == "full":
        return dict.fromkeys(names, True)
    if what == "frozen_vision":
        return {name: not name.startswith("vision.") for name in names}
    if what == "expert":
        return {name: name.startswith(("expert.", *_PROJECTIONS)) for name in names}
    if what == "lora_strict":
        return {name: is_lora(name) or name.startswith(_PROJECTIONS) for name in names}
    assert config is not None
    frozen: tuple[str, ...] = ()
    if config.backbone_rank:
        frozen += ("backbone.", "embedding")
    if config.expert_rank:
        frozen += ("expert.",)
    return {name: is_lora(name) or not name.startswith(frozen) for name in names}
