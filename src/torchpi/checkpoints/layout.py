"""Tables of checkpoint formats: for each stored array, the parameters that it fills.

Reading and writing use the same table, so that neither can miss anything: an array that is not in the table is an
error, and every parameter is filled.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from torchpi.config import Pi0Config
from torchpi.engine.quantize import Quantization, attach_quantization, check_device
from torchpi.errors import CheckpointError, first_of
from torchpi.model.lora import LoraConfig, attach_lora, is_lora, lora_layers
from torchpi.model.pi0 import Pi0

Shapes = Mapping[str, tuple[int, ...]]

UNSET = Pi0Config(action_horizon=None, max_token_len=None, discrete_state_input=None)
"""A config in which the fields that no array determines are unset."""
_MAX_NAMES = 24
"""Most names in an error message."""


@dataclasses.dataclass(frozen=True)
class ParamSlice:
    """A part of a stored array, and the rows of the parameter that it fills."""

    param: str
    """Name in `Pi0.state_dict()`."""
    layer: int | None = None
    """Index into the stored array's first axis; None: the whole array."""
    axes: tuple[int, ...] | None = None
    """Permutation from the stored order of axes to the parameter's (outputs first); None: the same order."""
    rows: tuple[int, int] | None = None
    """Start and end of the parameter's rows; None: all."""

    def of_array(self, array: Tensor) -> Tensor:
        """View of the part of the stored array, with the parameter's order of axes."""
        part = array if self.layer is None else array[self.layer]
        return part if self.axes is None else part.permute(self.axes)

    def of_parameter(self, parameter: Tensor) -> Tensor:
        """View of the parameter's rows."""
        return parameter.detach() if self.rows is None else parameter.detach()[slice(*self.rows)]


@dataclasses.dataclass(frozen=True)
class CheckpointArray:
    """One array of a checkpoint."""

    shape: tuple[int, ...]
    slices: tuple[ParamSlice, ...]
    """Together they cover the array."""

    @property
    def is_parameter(self) -> bool:
        """True if the array is one whole parameter, with the same order of axes."""
        return self.slices[0] == ParamSlice(self.slices[0].param)


Table = dict[str, CheckpointArray]


def whole(param: str, shape: tuple[int, ...], *, rows: tuple[int, int] | None = None) -> CheckpointArray:
    """Array that is a parameter, or some rows of it."""
    return CheckpointArray(shape, (ParamSlice(param, rows=rows),))


def stored_as(
    param: str, axes: str, sizes: Mapping[str, int], *, rows: tuple[int, int] | None = None, depth: int | None = None
) -> CheckpointArray:
    """Array that fills a parameter, or some rows of it, with permuted axes.

    `axes` names the axes as in einops, stored order first: "heads in out -> heads out in". With `depth`, that many
    layers are stacked on the array's first axis, and "*" in `param` stands for the layer.
    """
    stored, _, reordered = axes.partition(" -> ")
    names = stored.split()
    shape = tuple(sizes[name] for name in names)
    order = tuple(map(names.index, reordered.split())) if reordered else None
    if depth is None:
        return CheckpointArray(shape, (ParamSlice(param, axes=order, rows=rows),))
    slices = tuple(ParamSlice(param.replace("*", str(layer)), layer, order, rows) for layer in range(depth))
    return CheckpointArray((depth, *shape), slices)


@runtime_checkable
class StoredArrays(Protocol):
    """Arrays of a checkpoint on disk, read one by one."""

    source: pathlib.Path
    shapes: Shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Dtype in which each array is loaded: the stored one, but float32 for float16."""
        ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read an array in `dtype`, by default the stored one."""
        ...


def loaded_dtypes(
    source: pathlib.Path, stored: Mapping[str, str], supported: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """Dtype in which each array is loaded, from the stored ones in the format's notation."""
    if unsupported := [f"{name} has {dtype}" for name, dtype in stored.items() if dtype not in supported]:
        raise CheckpointError(f"{source}: weights must be float32, bfloat16 or float16, but {first_of(unsupported)}.")
    return {name: supported[dtype] for name, dtype in stored.items()}


class Rounding(dict[str, float]):
    """Largest rounding error of each parameter that was cast to a narrower dtype."""

    def record(self, param: str, wide: Tensor, rounded: Tensor) -> None:
        if wide.dtype is not rounded.dtype and (change := float(torch.sub(wide, rounded).abs_().max())):
            self[param] = max(change, self.get(param, 0.0))


def load_arrays(
    arrays: StoredArrays,
    table: Table,
    config: Pi0Config,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
    dtypes: Mapping[str, torch.dtype] | None = None,
    lora: LoraConfig | None = None,
    fold: bool = False,
    quantization: Quantization | None = None,
    emulate_fp8: bool = False,
    rounding: Rounding | None = None,
) -> Pi0:
    """Build a model of the sizes in `config`, and fill every weight.

    Args:
        dtype: dtype of the weights; None: each keeps its stored dtype, or is float32 if LoRA is merged into it.
        dtypes: dtypes of single parameters, in place of `dtype`.
        lora: attach LoRA, whose arrays are in the table, in float32.
        fold: merge it into the base weights instead, before they are cast.
        rounding: records the rounding errors of the casts.
    """
    require_shapes(arrays, {name: array.shape for name, array in table.items()})
    model = with_lora = Pi0(config, device="meta", dtype=dtype or torch.float32)
    cast(model, dtypes or {})
    if quantization is not None:
        check_device(quantization.kind, torch.device(device), emulate_fp8=emulate_fp8)
        attach_quantization(model, quantization, emulate_fp8=emulate_fp8)
    updates = {}
    if lora is not None:
        with_lora = Pi0(config, device="meta") if fold else model
        attach_lora(with_lora, lora)
        updates = {f"{name}.weight": layer.update for name, layer in lora_layers(with_lora) if fold}
    if dtype is None:
        for param, stored_dtype in _stored_dtypes(arrays, table).items():
            if param not in updates:
                _set_parameter(model, param, torch.empty_like(model.get_parameter(param), dtype=stored_dtype))
    for name, entry in sorted(table.items(), key=_loading_order):
        param = entry.slices[0].param
        target = with_lora if is_lora(param) else model
        read_dtype = None if rounding is not None else target.get_parameter(param).dtype
        array = arrays.read(name, torch.float32 if param in updates else read_dtype)
        _fill(target, entry, array, device, updates, rounding)
    return model


def _fill(
    model: Pi0,
    entry: CheckpointArray,
    array: Tensor,
    device: str | torch.device,
    updates: Mapping[str, Callable[[], Tensor]],
    rounding: Rounding | None,
) -> None:
    """Copy a stored array into its parameters, with the LoRA updates of these added."""
    for part in entry.slices:
        parameter = model.get_parameter(part.param)
        if entry.is_parameter:  # no copy
            source = array.view(parameter.shape)
            filled = source.to(device, parameter.dtype)
            _set_parameter(model, part.param, filled)
        else:
            if parameter.is_meta:
                parameter = _set_parameter(model, part.param, torch.empty_like(parameter, device=device))
            source = part.of_array(array)
            if part.param in updates:
                source = source.to(device) + part.of_parameter(updates[part.param]()).view(source.shape)
            filled = part.of_parameter(parameter).view(source.shape)
            filled.copy_(source)
        if rounding is not None:
            rounding.record(part.param, source, filled)


def _stored_dtypes(arrays: StoredArrays, table: Table) -> dict[str, torch.dtype]:
    """For each parameter, the dtype that holds all arrays that fill it. LoRA's are left out: they are float32."""
    dtypes: dict[str, torch.dtype] = {}
    for name, entry in table.items():
        for param in {part.param for part in entry.slices if not is_lora(part.param)}:
            dtypes[param] = torch.promote_types(arrays.dtypes[name], dtypes.get(param, arrays.dtypes[name]))
    return dtypes


def _loading_order(item: tuple[str, CheckpointArray]) -> tuple[bool, int]:
    """Sort key: LoRA's small matrices first, then the largest arrays, while little is allocated, to keep peak memory
    near the model's size."""
    return not is_lora(item[1].slices[0].param), -math.prod(item[1].shape)


def cast(model: Pi0, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast parameters in place, one at a time."""
    for name, dtype in dtypes.items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)


def _set_parameter(model: Pi0, name: str, value: Tensor) -> nn.Parameter:
    owner, _, attribute = name.rpartition(".")
    # Quantized weights have no gradient.
    parameter = nn.Parameter(value, requires_grad=model.get_parameter(name).requires_grad)
    setattr(model.get_submodule(owner), attribute, parameter)
    return parameter


def array_dtype(model: Pi0, entry: CheckpointArray) -> torch.dtype:
    """Dtype that holds all parameters of an array."""
    return functools.reduce(torch.promote_types, (model.get_parameter(part.param).dtype for part in entry.slices))


def stored_array(model: Pi0, entry: CheckpointArray) -> Tensor:
    """Build a checkpoint's array from the model's parameters, on the CPU: the inverse of `load_arrays`."""
    parameters = [model.get_parameter(part.param) for part in entry.slices]
    dtype = array_dtype(model, entry)
    if entry.is_parameter:
        return parameters[0].detach().to("cpu", dtype).reshape(entry.shape)
    array = torch.empty(entry.shape, dtype=dtype)
    for part, parameter in zip(entry.slices, parameters, strict=True):
        target = part.of_array(array)
        target.copy_(part.of_parameter(parameter).reshape(target.shape))
    return array


def own_table(config: Pi0Config, quantization: Quantization | None = None) -> Table:
    """Table of the policy folder: every parameter by its name."""
    model = Pi0(config, device="meta")
    if quantization is not None:
        attach_quantization(model, quantization)
    return {name: whole(name, tuple(p.shape)) for name, p in model.named_parameters()}


def require_shapes(arrays: StoredArrays, expected: Shapes) -> None:
    """Raise an error that lists missing, additional and misshapen arrays."""
    found = arrays.shapes
    problems = {
        "missing": sorted(set(expected) - set(found)),
        "left over": sorted(set(found) - set(expected)),
        "misshapen": [
            f"{name} is {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    if any(problems.values()):
        message = f"{arrays.source} does not fit the model:"
        for problem, names in problems.items():
            separator = "; " if problem == "misshapen" else ", "
            message += f"\n  {problem}: {first_of(names, _MAX_NAMES, separator)}" if names else ""
        raise CheckpointError(message)


def require_writable(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(f"Weights are written in float32 or bfloat16, got {str(dtype).removeprefix('torch.')}.")


def sizes_of(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    """Shape of an array that every checkpoint of the format has."""
    if name not in shapes:
        raise CheckpointError(
            f"There is no array {name!r}, which every π₀ and π₀.₅ checkpoint has; found {sorted(shapes)[:8] or 'none'}."
        )
    if len(shapes[name]) != ndim:
        raise CheckpointError(f"Array {name!r} must have {ndim} dimensions, its shape is {list(shapes[name])}.")
    return shapes[name]
