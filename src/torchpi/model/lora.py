"""LoRA: the two stacks are trained through low-rank matrices that are added to their frozen ones.

The meaning is openpi's code, not the paper's (arXiv:2106.09685). Every head has an A and a B of its own; attention's
update is scaled by alpha / rank; the output projection sums over the heads between A and B, so that each head's A meets
the sum of all heads' B; the feed-forward's update is not scaled; A and B both begin as N(0, 0.01²), so that training
does not begin at exactly the base model.
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
    """x·Wᵀ + scale·(x·A)·B, in x's dtype; W keeps the name and the place that it has in the plain model.

    The outputs are in equal groups, one behind the other (heads, or the feed-forward's gate and up), each with an A and
    a B of its own.
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
        """Shapes of lora_a and lora_b."""
        return {
            "lora_a": (groups, rank, self.in_features),
            "lora_b": (groups, self.out_features // groups, rank),
        }

    def init_lora(self, generator: torch.Generator | None) -> None:
        """N(0, 0.01²), A and B alike."""
        nn.init.normal_(self.lora_a, std=INIT_STD, generator=generator)
        nn.init.normal_(self.lora_b, std=INIT_STD, generator=generator)

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """The matmul with the updated weight, in x's dtype."""
        tokens = x.flatten(0, -2)
        return self._add_update(super().forward(tokens), tokens, first=0).unflatten(0, x.shape[:-1])

    def rows(self, x: Float[Tensor, "*batch i"], first: int) -> Float[Tensor, "*batch rows"]:
        """`forward` from its output `first` on, without what stands before."""
        tokens = x.flatten(0, -2)
        return self._add_update(super().rows(tokens, first), tokens, first).unflatten(0, x.shape[:-1])

    def _add_update(self, out: Tensor, x: Tensor, first: int) -> Tensor:
        a, b = self._matrices()
        # One matmul for all groups. Not in place: activation checkpointing may keep the base's result.
        return torch.addmm(out, F.linear(x, a.to(x.dtype)), b[first:].T.to(x.dtype), alpha=self.scale)

    def _matrices(self) -> tuple[Float[Tensor, "R i"], Float[Tensor, "o R"]]:
        """All groups' A, one below the other, and their B, each in a block of its own."""
        groups = torch.eye(len(self.lora_b), dtype=self.lora_b.dtype, device=self.lora_b.device)
        blocks = self.lora_b[:, :, None, :] * groups[:, None, :, None]  # [groups, outputs / groups, groups, rank]
        return self.lora_a.flatten(0, 1), blocks.flatten(2).flatten(0, 1)

    def update(self) -> Float32[Tensor, "o i"]:
        """The update of the whole weight."""
        a, b = self._matrices()
        return self.scale * (b.float() @ a.float())


class HeadSumLoraLinear(LoraLinear):
    """The output projection's: its inputs are the heads, and what comes out of their A is summed before B.

    So only the sum of all B matters; they are kept apart as in the original's files.
    """

    lora_a: nn.Parameter
    """float32 [rank, inputs]: the heads' A side by side."""
    lora_b: nn.Parameter
    """float32 [heads, outputs, rank]."""

    def shapes(self, groups: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of lora_a and lora_b, for as many heads as groups."""
        return {"lora_a": (rank, self.in_features), "lora_b": (groups, self.out_features, rank)}

    def _matrices(self) -> tuple[Float[Tensor, "R i"], Float[Tensor, "o R"]]:
        return self.lora_a, self.lora_b.sum(dim=0)


def add_lora(model: Pi0, config: LoraConfig, generator: torch.Generator | None) -> None:
    """Attach low-rank matrices to a model, in place, and fill them as the original does.

    They are float32, whatever dtype the base has, and on the base's device. The base's parameters stay the same
    objects under the same names.

    Args:
        generator: on the model's device; None: PyTorch's own.
    """
    attach_lora(model, config)
    for _, layer in lora_layers(model):
        layer.init_lora(generator)


def attach_lora(model: Pi0, config: LoraConfig) -> None:
    """`add_lora` without values: for a checkpoint to fill."""
    if (found := lora_config(model)) is not None:
        raise ModelError(f"The model has LoRA already, {found}; merge_lora folds it into the weights.")
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
    """Add the low-rank updates to the weights, in float32 before any cast, and leave a plain model, in place."""
    if lora_config(model) is None:
        raise ModelError("The model has no LoRA to merge.")
    for name, layer in list(lora_layers(model)):
        layer.weight.copy_(layer.weight.float() + layer.update())
        plain = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = layer.weight
        model.set_submodule(name, plain)


def lora_layers(model: Pi0) -> Iterator[tuple[str, LoraLinear]]:
    """Every layer with low-rank matrices, and its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def lora_config(model: Pi0) -> LoraConfig | None:
    """The LoRA of a model, or None."""
    return next((layer.config for _, layer in lora_layers(model)), None)


def is_lora(name: str) -> bool:
    """True for the name of a low-rank matrix."""
    return name.rpartition(".")[2] in ("lora_a", "lora_b")


_PROJECTIONS = ("suffix.", "action_out_proj.")
_BACKBONE = ("backbone.", "embedding")


def trainable_parameters(model: Pi0, what: Finetune) -> dict[str, bool]:
    """Parameters by name, True for those that a training changes.

    Args:
        what: "full"; "frozen_vision": all but the vision tower with its head; "expert": the action expert and the
            projections of actions, time and state; "lora": openpi's rule, which freezes of each stack with LoRA
            everything else (of the backbone also the embedding), and trains the rest: vision tower, projections, and a
            stack without LoRA; "lora_strict": the low-rank matrices and the projections alone.
    """
    config = lora_config(model)
    if what not in get_args(Finetune):
        raise ModelError(f"finetune must be one of {', '.join(get_args(Finetune))}, got {what!r}.")
    if what in ("lora", "lora_strict") and config is None:
        raise ModelError(f"{what!r} trains low-rank matrices, and the model has none; add_lora adds them.")
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
    frozen = (*(_BACKBONE if config.backbone_rank else ()), *(("expert.",) if config.expert_rank else ()))
    return {name: is_lora(name) or not name.startswith(frozen) for name in names}
