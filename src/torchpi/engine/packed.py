"""Packed weights of a model, and the forward pass over them.

The computation is that of `Pi0`, in fewer and larger operations (`engine.kernels`):

- 1 + scale of an RMSNorm is folded, in float32, into the weight of the matmul after it;
- a norm is fused with the residual before it, and RoPE with writing keys and values into the cache;
- inputs of an fp8 matmul are rounded by the operation that computes them;
- projections computed in float32 have float32 weights, while `Pi0` casts them in each call;
- shapes are static: the valid tokens of a prefix come first, then padding; `valid` is their number.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from torch.nn import functional as F

from torchpi.engine.kernels import PLAIN, Kernels
from torchpi.engine.kernels.rope import split_rope
from torchpi.engine.quantize import Fp8Linear, QuantizedLinear, folded_weight, takes_rounded
from torchpi.errors import ModelError
from torchpi.model.gemma import Gemma, Modulation, rope_table
from torchpi.model.layers import Linear, attend, gelu_tanh
from torchpi.model.lora import lora_config
from torchpi.model.pi0 import Pi0


@dataclasses.dataclass(frozen=True)
class PackedLayer:
    """Matrices of one layer, quantized or in the compute dtype."""

    qkv: Linear | Fp8Linear
    out: Linear | Fp8Linear
    first: Linear | Fp8Linear
    """Gate and up, or SigLIP's fc1."""
    second: Linear | Fp8Linear
    """Down, or SigLIP's fc2."""


@dataclasses.dataclass(frozen=True)
class Prefix:
    """KV cache of a prefix of static length, and the suffix's other attention inputs."""

    keys: list[Float[Tensor, "B slots G K"]]
    """Per layer. The slots from `length` on are for the suffix."""
    values: list[Float[Tensor, "B slots G K"]]
    valid: Int[Tensor, " B"]
    """Number of valid tokens; they come first."""
    length: int
    """S, including padding."""
    cos: Float32[Tensor, "B T half"]
    sin: Float32[Tensor, "B T half"]
    state: Float32[Tensor, "B A"]

    def repeat(self, times: int) -> "Prefix":
        """Repeat each sample `times` times in a row, because each suffix writes into its own slots."""
        if times == 1:
            return self
        keys, values = ([x.repeat_interleave(times, 0) for x in each] for each in (self.keys, self.values))
        valid, cos, sin, state = (x.repeat_interleave(times, 0) for x in (self.valid, self.cos, self.sin, self.state))
        return Prefix(keys, values, valid, self.length, cos, sin, state)


class PackedModel:
    """Forward pass of a `Pi0` over packed weights. Large weights that need no change are shared with the model."""

    def __init__(self, model: Pi0, kernels: Kernels = PLAIN) -> None:
        if lora_config(model) is not None:
            raise ModelError("The engine does not support LoRA layers; fold them into the weights with merge_lora.")
        self.config, self.kernels, self.dtype = model.config, kernels, model.compute_dtype
        self.num_state_tokens = model.suffix.num_state_tokens
        self.vision, self.patch_embed = model.vision, _as_dtype(model.vision.patch_embed, torch.float32)
        self.position = model.vision.position_embedding().detach()
        self.embedding = model.embedding.detach()
        # As in the original, the scale is rounded to the compute dtype before the multiplication.
        self.text_scale = torch.tensor(model.config.paligemma.width**0.5, dtype=self.dtype).item()
        self.blocks = [
            PackedLayer(*(takes_rounded(layer, self.dtype) for layer in (block.qkv, block.out, block.fc1, block.fc2)))
            for block in self.vision.blocks
        ]
        self.backbone = _pack(model.backbone, self.dtype)
        self.expert = _pack(model.expert, self.dtype)
        self.suffix = _as_dtype(model.suffix, torch.float32)
        out = model.action_out_proj
        self.out_weight = folded_weight(out, model.expert.final_norm).float()
        self.out_bias = out.bias.detach().float()

    def embed_images(self, images: Float32[Tensor, "N B h w 3"]) -> Float[Tensor, "B tokens D"]:
        """Image tokens of all cameras, one camera after another."""
        kernels, vision = self.kernels, self.vision
        num_cameras, batch = images.shape[:2]
        x = (self.patch_embed(vision.patchify(images.flatten(0, 1))) + self.position).to(self.dtype)  # [N·B, P, W]
        norms = [norm for block in vision.blocks for norm in (block.norm1, block.norm2)] + [vision.norm]
        x, n = kernels.layer_norm(x, norms[0].weight, norms[0].bias, fp8_scale=_scale(self.blocks[0].qkv))
        for i, block in enumerate(self.blocks):
            qkv = block.qkv(n).unflatten(-1, (3, vision.config.num_heads, -1))  # [N·B, P, 3, heads, K]
            q, k, v = qkv.unbind(dim=2)
            y = block.out(kernels.to_fp8(attend(q, k, v, mask=None), _scale(block.out)))
            norm, next_norm = norms[2 * i + 1 : 2 * i + 3]
            x, n = kernels.layer_norm(x, norm.weight, norm.bias, y, _scale(block.first))
            y = block.second(kernels.to_fp8(gelu_tanh(block.first(n)), _scale(block.second)))
            scale = _scale(self.blocks[i + 1].qkv) if i + 1 < len(self.blocks) else None
            x, n = kernels.layer_norm(x, next_norm.weight, next_norm.bias, y, scale)
        tokens: Tensor = vision.head(n)  # [N·B, P, D]
        return tokens.unflatten(0, (num_cameras, batch)).transpose(0, 1).flatten(1, 2)

    def prefill(
        self,
        images: Float32[Tensor, "N B h w 3"],
        tokens: Int[Tensor, "B L"],
        valid: Int[Tensor, " B"],
        state: Float32[Tensor, "B A"],
        horizon: int,
    ) -> Prefix:
        """Run vision tower and backbone, up to the keys and values of the last layer."""
        kernels, sizes = self.kernels, self.config.paligemma
        text = F.embedding(tokens, self.embedding).to(self.dtype) * self.text_scale
        x = torch.cat([self.embed_images(images), text], dim=1)  # [B, S, D]
        batch, length, _ = x.shape
        num_suffix = self.num_state_tokens + horizon
        position = torch.arange(length + num_suffix, device=x.device)
        cos, sin = (table[:, :, 0] for table in rope_table(position[None, :length], sizes.head_dim))  # [1, S, K/2]
        shape = (batch, length + num_suffix, sizes.num_kv_heads, sizes.head_dim)
        keys, values = ([x.new_empty(shape) for _ in self.backbone] for _ in range(2))
        x, n = kernels.rms_norm(x, fp8_scale=_scale(self.backbone[0].qkv))
        for i, layer in enumerate(self.backbone):
            if layer is self.backbone[-1]:  # the action expert only needs keys and values of the last layer
                first = sizes.num_heads * sizes.head_dim
                kernels.split_rope_store(layer.qkv.rows(n, first), cos, sin, keys[i], values[i], 0)
                break
            q = kernels.split_rope_store(layer.qkv(n), cos, sin, keys[i], values[i], 0)
            cache = keys[i][:, :length], values[i][:, :length]
            y = layer.out(kernels.attend(q, *cache, valid, length, fp8_scale=_scale(layer.out)))
            x, n = kernels.rms_norm(x, y, _scale(layer.first))
            y = layer.second(kernels.geglu(layer.first(n), _scale(layer.second)))
            x, n = kernels.rms_norm(x, y, _scale(self.backbone[i + 1].qkv))
        suffix_rope = rope_table(valid[:, None] + position[None, :num_suffix], self.config.action_expert.head_dim)
        cos, sin = (table[:, :, 0] for table in suffix_rope)  # [B, T, K/2]
        return Prefix(keys, values, valid, length, cos, sin, state)

    def velocity(
        self,
        prefix: Prefix,
        x_t: Float32[Tensor, "B H A"],
        time_features: Float32[Tensor, "#B d"] | Float32[Tensor, "#B H d"],
        modulations: Sequence[Modulation] | None,
    ) -> Float32[Tensor, "B H A"]:
        """Compute v_t as `Pi0.denoise_step`, with the features and modulations of a `TimeConditioning`."""
        # Guidance needs its gradient: plain operations have gradients and do not write into the cache.
        kernels = PLAIN if torch.is_grad_enabled() else self.kernels
        x = self.suffix(prefix.state, x_t, time_features).to(self.dtype)  # [B, T, d]
        x, n = _norm(kernels, x, None, modulations, 0, _scale(self.expert[0].qkv))
        for i, layer in enumerate(self.expert):
            y = layer.out(self._attend(prefix, i, layer.qkv(n), kernels))
            x, n = _norm(kernels, x, y, modulations, 2 * i + 1, _scale(layer.first))
            y = layer.second(_linear_geglu(kernels, n, layer))
            scale = _scale(self.expert[i + 1].qkv) if i + 1 < len(self.expert) else None
            x, n = _norm(kernels, x, y, modulations, 2 * i + 2, scale)
        return F.linear(n[:, self.num_state_tokens :].float(), self.out_weight, self.out_bias)

    def _attend(self, prefix: Prefix, i: int, qkv: Tensor, kernels: Kernels) -> Tensor:
        keys, values, length = prefix.keys[i], prefix.values[i], prefix.length
        if torch.is_grad_enabled():
            q, k, v = split_rope(qkv, prefix.cos, prefix.sin, keys.shape[2])
            keys, values = torch.cat([keys[:, :length], k], dim=1), torch.cat([values[:, :length], v], dim=1)
        else:
            q = kernels.split_rope_store(qkv, prefix.cos, prefix.sin, keys, values, length)
        scale = _scale(self.expert[i].out)
        return kernels.attend(q, keys, values, prefix.valid, length, self.num_state_tokens, fp8_scale=scale)


def _norm(
    kernels: Kernels, x: Tensor, y: Tensor | None, modulations: Sequence[Modulation] | None, i: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Norm `i` of the expert, fused with the residual of the sublayer after norm i − 1."""
    if modulations is None:
        return kernels.rms_norm(x, y, scale)
    gate = None if y is None else modulations[i - 1]
    return kernels.ada_rms_norm(x, modulations[i], y, gate, scale)


def _linear_geglu(kernels: Kernels, x: Tensor, layer: PackedLayer) -> Tensor:
    """Gate, up and activation of the expert, in one operation except for int8, and for fp8 without Triton."""
    gate_up, scale = layer.first, _scale(layer.second)
    if isinstance(gate_up, Fp8Linear) and scale is not None and kernels is not PLAIN:
        return kernels.linear_geglu(x, gate_up.layer.weight.detach(), gate_up.scale, scale)
    if isinstance(gate_up, Fp8Linear | QuantizedLinear):
        return kernels.geglu(gate_up(x), scale)
    return kernels.linear_geglu(x, gate_up.weight, fp8_scale=scale)


def _scale(layer: Linear | Fp8Linear) -> float | None:
    """Scale s_x for the operation before an fp8 layer to round with; None: it does not round. With gradients, the layer
    itself rounds."""
    return layer.input_scale if isinstance(layer, Fp8Linear) and not torch.is_grad_enabled() else None


def _pack(stack: Gemma, dtype: torch.dtype) -> list[PackedLayer]:
    return [
        PackedLayer(
            _fold(layer.attention.qkv, layer.pre_attention_norm, dtype),
            _fold(layer.attention.out, None, dtype),
            _fold(layer.feed_forward.gate_up, layer.pre_ffw_norm, dtype),
            _fold(layer.feed_forward.down, None, dtype),
        )
        for layer in stack.layers
    ]


def _fold(linear: Linear, norm: nn.Module | None, dtype: torch.dtype) -> Linear | Fp8Linear:
    """Fold the 1 + scale of a norm into the matrix after it; in quantized layers it is folded already."""
    if isinstance(linear, QuantizedLinear):
        return takes_rounded(linear, dtype)
    packed = Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    packed.weight = nn.Parameter(folded_weight(linear, norm).to(dtype), requires_grad=False)
    return packed


def _as_dtype(module: Any, dtype: torch.dtype) -> Any:
    """The module itself, or a copy in the dtype."""
    if all(parameter.dtype is dtype for parameter in module.parameters()):
        return module
    converted = copy.deepcopy(module)  # not `.to`, which may swap tensors and fails for tensors in use
    for submodule in converted.modules():
        for name, parameter in submodule.named_parameters(recurse=False):
            setattr(submodule, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    return converted
