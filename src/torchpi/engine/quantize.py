"""Quantized layers with int8 or fp8 weights, which replace a model's `Linear` layers.

    int8    y = (q(x)·Wᵀ)·s_x·s_W    q(x) = round(x / s_x), s_x = max|x| / 127 per row, int32 accumulation; CPU
    fp8     y = (q(x)·Wᵀ)·s_x·s_W    q(x) = e4m3(x / s_x), s_x per matrix from calibration, float32 accumulation

s_W is max|w| / 127 or / 448 per output. `Pi0` and the engine run the same layers. A norm's 1 + scale is folded into the
matrix after it, so that the activations of all channels are of similar size.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from torchpi.engine.kernels.fp8 import LARGEST_E4M3, to_fp8
from torchpi.errors import ModelError
from torchpi.model.gemma import RMSNorm
from torchpi.model.layers import Linear
from torchpi.model.lora import lora_config
from torchpi.model.pi0 import Pi0

Kind = Literal["fp8", "int8"]
DTYPES: Mapping[Kind, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST: Mapping[torch.dtype, float] = {torch.float8_e4m3fn: LARGEST_E4M3, torch.int8: 127.0}
FP8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with fp8 matmuls (Ada)."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Description of a model's quantized matrices."""

    kind: Kind
    input_scales: dict[str, float | None]
    """s_x of each quantized layer, by its name; None for int8, which computes it per row."""

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of each quantized weight, by its name."""
        return {f"{name}.weight": DTYPES[self.kind] for name in self.input_scales}

    def __post_init__(self) -> None:
        for name, scale in self.input_scales.items():
            if (scale is None) != (self.kind == "int8") or not (scale is None or 0 < scale < math.inf):
                raise ModelError(
                    f"The input scale of {name} is {scale}; expected a positive number for fp8, and null for int8."
                )


class QuantizedLinear(Linear):
    """x·Wᵀ + b with a quantized weight, in x's dtype. The gradient is for x only, computed with the rounded weight."""

    weight: nn.Parameter
    """int8 or float8_e4m3fn [o, i]."""
    weight_scale: nn.Parameter
    """s_W, float32 [o]."""

    def __init__(self, base: Linear, kind: Kind, input_scale: float | None, *, emulated: bool = False) -> None:
        """Quantize a layer.

        Args:
            input_scale: s_x, for fp8.
            emulated: compute fp8 in float32, even on a CUDA device.
        """
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.bias = base.bias
        self.kind, self.input_scale, self.emulated = kind, input_scale, emulated
        # Hopper and data center Blackwell support scales per row and output. Compute capability 12 does not, at least
        # up to PyTorch 2.10 (its issue 192707), nor does 8.9 before 2.7 (130359). Queried here because torch.compile
        # does not trace it.
        on_gpu = kind == "fp8" and torch.cuda.is_available()
        self.row_scales = on_gpu and torch.cuda.get_device_capability()[0] in (9, 10)
        weight, scale = quantize_rows(base.weight.detach(), DTYPES[kind])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return self.rows(x, 0)

    def rows(self, x: Float[Tensor, "*batch i"], first: int) -> Float[Tensor, "*batch rows"]:
        """The outputs of `forward` from index `first` on."""
        y = self.matmul(x, first)
        return y if self.bias is None else y + self.bias[first:].to(x.dtype)

    def matmul(self, x: Float[Tensor, "*batch i"], first: int = 0) -> Float[Tensor, "*batch rows"]:
        tokens = x.flatten(0, -2)
        settings: tuple[Any, ...] = (self.input_scale, self.emulated, self.row_scales)
        run = _StraightThrough.apply if torch.is_grad_enabled() and x.requires_grad else quantized_matmul
        y: Tensor = run(tokens, self.weight[first:], self.weight_scale[first:], *settings)
        return y.unflatten(0, x.shape[:-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Apply changes of device, but not of dtype, to weight and scale."""
        device = fn(self.weight_scale.data).device
        self.weight.data, self.weight_scale.data = self.weight.data.to(device), self.weight_scale.data.to(device)
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.data), self.bias.requires_grad)
        return self


class _StraightThrough(torch.autograd.Function):
    """Quantized matmul with a straight-through gradient, which ignores the rounding of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return quantized_matmul(x, weight, scale, *settings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight, scale), (gradient,) = ctx.saved_tensors, gradients
        return (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype), *[None] * 5


def quantize_rows(weight: Float[Tensor, "o i"], dtype: torch.dtype) -> tuple[Tensor, Float32[Tensor, " o"]]:
    """Quantize a weight: the rounded weight [o, i] and the scale of each output."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1) / LARGEST[dtype]
    scale = torch.where(scale > 0, scale, 1.0)
    wide = wide / scale[:, None]
    return (wide.round().to(dtype) if dtype is torch.int8 else to_fp8(wide, 1.0)), scale


def quantized_matmul(
    x: Float[Tensor, "M i"],
    weight: Shaped[Tensor, "o i"],
    scale: Float32[Tensor, " o"],
    input_scale: float | None,
    emulated: bool = False,
    row_scales: bool = True,
) -> Float[Tensor, "M o"]:
    """x·Wᵀ in x's dtype. `emulated` fp8 rounds in the same way, on any device and for any sizes."""
    if input_scale is None:
        wide = x.float()
        row_scale = wide.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30) / LARGEST[weight.dtype]
        sums = torch._int_mm((wide / row_scale).round().to(torch.int8), weight.t())
        return sums.float().mul_(row_scale).mul_(scale).to(x.dtype)
    rounded = to_fp8(x, input_scale)
    return _fp8_matmul(rounded, weight, input_scale * scale, None, emulated, row_scales).to(x.dtype)


def _fp8_matmul(
    x: Float[Tensor, "M i"],
    weight: Float[Tensor, "o i"],
    scale: Float32[Tensor, " o"],
    bias: Float[Tensor, " o"] | None,
    emulated: bool,
    row_scales: bool,
    ones: Float32[Tensor, "rows 1"] | None = None,
) -> Float[Tensor, "M o"]:
    """(x·Wᵀ)·scale + bias for x and weight in e4m3, in float32, or in bfloat16 with a GPU's fp8 matmul.

    Args:
        scale: s_x·s_W.
        row_scales: pass the scale to the GPU's matmul instead of multiplying after it.
        ones: at least as many ones as x has rows.
    """
    if x.is_cpu or emulated or any(side % 16 for side in weight.shape):
        y = F.linear(x.float(), weight.float()) * scale
        return y if bias is None else y.to(bias.dtype) + bias
    ones = scale.new_ones(len(x), 1) if ones is None or len(ones) < len(x) else ones[: len(x)]
    if row_scales:
        bias = None if bias is None else bias.bfloat16()
        return torch._scaled_mm(x, weight.t(), ones, scale[None], bias=bias, out_dtype=torch.bfloat16)
    y = torch._scaled_mm(x, weight.t(), ones[0, 0], ones[0, 0], out_dtype=torch.bfloat16).mul_(scale)
    return y if bias is None else y + bias


class Fp8Linear:
    """fp8 layer that also takes inputs already rounded to e4m3 with its scale; then its outputs have dtype `dtype`."""

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        assert layer.input_scale is not None
        self.layer, self.dtype, self.input_scale = layer, dtype, layer.input_scale
        self.scale = layer.input_scale * layer.weight_scale.detach()
        self.ones = self.scale.new_ones(8192, 1)  # for 8 samples with three cameras and 200 prompt tokens; 32 KB
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def __call__(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return self.rows(x, 0)

    def rows(self, x: Float[Tensor, "*batch i"], first: int) -> Float[Tensor, "*batch rows"]:
        if x.dtype is not torch.float8_e4m3fn:
            return self.layer.rows(x, first)
        weight, bias = self.layer.weight.detach()[first:], None if self.bias is None else self.bias[first:]
        settings = False, self.layer.row_scales, self.ones
        y = _fp8_matmul(x.flatten(0, -2), weight, self.scale[first:], bias, *settings)
        return y.to(self.dtype).unflatten(0, x.shape[:-1])


def takes_rounded(layer: Linear, dtype: torch.dtype) -> Linear | Fp8Linear:
    """The layer as an `Fp8Linear` if it is fp8 and not emulated, otherwise unchanged."""
    if isinstance(layer, QuantizedLinear) and layer.kind == "fp8" and not layer.emulated:
        return Fp8Linear(layer, dtype)
    return layer


def quantize_model(model: Pi0, kind: Kind | str, observe: Callable[[], object] | None = None) -> Quantization:
    """Quantize the large matrices of a model in place.

    These are the matrices of SigLIP's and Gemma's layers. With fp8, matrices that calibration does not use stay as they
    are: three of the backbone's last layer, of which the actions only depend on keys and values.

    Args:
        observe: samples actions for real observations with the model, to calibrate fp8: s_x is the largest input / 448.
    """
    if kind not in DTYPES:
        raise ModelError(f"Unknown quantization {kind!r}; expected fp8 or int8.")
    current = quantization_of(model)
    if current is not None:
        raise ModelError(f"The model is already quantized to {current.kind}; quantize the original model instead.")
    if lora_config(model) is not None:
        raise ModelError("The model has LoRA, which is not quantized: merge_lora folds it into the weights first.")
    if kind == "fp8" and observe is None:
        raise ModelError(
            "fp8 needs the activations of real observations: give a dataset of the robot (--dataset), or choose int8."
        )
    layers = large_layers(model)
    if bad := [name for name, layer in layers.items() if not layer.weight.isfinite().all()]:
        raise ModelError(f"The weights of {', '.join(bad[:4])} contain NaN or infinity, which 8 bits can't represent.")
    _fold_norms(model)
    scales: dict[str, float | None] = dict.fromkeys(layers)
    if kind == "fp8" and observe is not None:
        peaks = largest_inputs(model, layers, observe)
        if bad := [name for name, peak in peaks.items() if not math.isfinite(peak)]:
            raise ModelError(f"The inputs of {', '.join(bad[:4])} became NaN or infinite during calibration.")
        scales = {name: peak / LARGEST[torch.float8_e4m3fn] for name, peak in peaks.items() if peak > 0}
        if not scales:
            raise ModelError("Calibration did not run the model; fp8 needs at least one observation.")
    quantization = Quantization(cast("Kind", kind), scales)
    attach_quantization(model, quantization)
    return quantization


def attach_quantization(model: Pi0, quantization: Quantization, *, emulate_fp8: bool = False) -> None:
    """Replace layers by quantized ones. Those of a model on "meta" can be loaded afterwards."""
    layers = large_layers(model)
    if unknown := sorted(set(quantization.input_scales) - set(layers)):
        raise ModelError(f"The model has no layer {', '.join(unknown[:4])} that can be quantized.")
    for name, input_scale in quantization.input_scales.items():
        layer = QuantizedLinear(layers[name], quantization.kind, input_scale, emulated=emulate_fp8)
        model.set_submodule(name, layer)


def quantization_of(model: Pi0) -> Quantization | None:
    """Quantization of a model, or None."""
    layers = quantized_layers(model)
    scales = {name: layer.input_scale for name, layer in layers.items()}
    return Quantization(next(iter(layers.values())).kind, scales) if layers else None


def quantized_layers(model: Pi0) -> dict[str, QuantizedLinear]:
    """The quantized layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def check_device(kind: Kind, device: torch.device, *, emulate_fp8: bool) -> None:
    """Raise an error if the quantization does not run on the device."""
    if device.type == "cpu" or (kind == "fp8" and emulate_fp8):
        return
    if kind == "int8" or device.type != "cuda":
        raise ModelError(f"The policy is quantized to {kind}, which does not run on {device}: choose device cpu.")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FP8_CAPABILITY:
        raise ModelError(
            f"fp8 needs a GPU of compute capability 8.9 or higher; {device}, {torch.cuda.get_device_name(device)}, has "
            f"{major}.{minor}: use the policy before quantization, or emulate_fp8=True (--emulate-fp8), which computes "
            "the same in float32, slower."
        )


def folded_weight(linear: Linear, norm: nn.Module | None) -> Float[Tensor, "o i"]:
    """The matrix after a norm; the 1 + scale of an RMSNorm is folded into it, in float32."""
    weight = linear.weight.detach()
    return weight.float() * (1 + norm.scale.detach().float()) if isinstance(norm, RMSNorm) else weight


@torch.no_grad()
def _fold_norms(model: Pi0) -> None:
    for layer in (*model.backbone.layers, *model.expert.layers):
        pairs = (layer.pre_attention_norm, layer.attention.qkv), (layer.pre_ffw_norm, layer.feed_forward.gate_up)
        for norm, linear in pairs:
            if isinstance(norm, RMSNorm):
                linear.weight.copy_(folded_weight(linear, norm))
                norm.scale.zero_()


def large_layers(model: Pi0) -> dict[str, Linear]:
    """The layers to quantize, by name; without the small ones in AdaRMSNorm."""
    stacks = ("vision.blocks.", "backbone.layers.", "expert.layers.")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.startswith(stacks) and not name.endswith(".dense")
    }


class AsWeight:
    """Stands in for a weight: `F.linear` with it is the matmul of a quantized layer."""

    def __init__(self, layer: QuantizedLinear) -> None:
        self.layer = layer

    def to(self, dtype: torch.dtype) -> "AsWeight":
        """Do nothing: the layer computes in the dtype of the activations."""
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        x, weight, bias = args
        assert function is F.linear
        y: Tensor = weight.layer.matmul(x)
        return y if bias is None else y + bias


class _Recorder(nn.Module):
    """Layer that records its largest absolute input."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base, self.peak = base, 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, 0)

    def rows(self, x: Tensor, first: int) -> Tensor:
        self.peak = float(np.maximum(self.peak, x.abs().max().item()))  # NaN if either is
        return self.base.rows(x, first)


def largest_inputs(model: Pi0, layers: Mapping[str, Linear], observe: Callable[[], object]) -> dict[str, float]:
    """Largest absolute input of each layer while `observe` runs; 0 for unused layers."""
    recorders = {name: _Recorder(layer) for name, layer in layers.items()}
    try:
        for name, recorder in recorders.items():
            model.set_submodule(name, recorder)
        observe()
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
    return {name: recorder.peak for name, recorder in recorders.items()}
