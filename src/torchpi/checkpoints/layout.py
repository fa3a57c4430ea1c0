"""How the arrays of a format become a model's parameters and back: which part of which array goes where.

A format is a table of leaves. Reading and writing follow from it, so that both are total: what the table does not name
is an error, and what it names is filled.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from torchpi.config import Pi0Config
from torchpi.errors import CheckpointError
from torchpi.model.lora import LoraConfig, attach_lora
from torchpi.model.pi0 import Pi0

Shapes = Mapping[str, tuple[int, ...]]

_MOST_NAMED = 24


@dataclasses.dataclass(frozen=True)
class Piece:
    """One part of a leaf, and the rows of a parameter that it fills."""

    param: str
    """Name in `Pi0.state_dict()`."""
    layer: int | None = None
    """Index on the leaf's first axis, None: the whole leaf."""
    axes: tuple[int, ...] | None = None
    """Order of the part's axes in the parameter, where rows (outputs) come first; None: unchanged."""
    rows: tuple[int, int] | None = None
    """First row and end of the parameter's rows; None: all."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a checkpoint."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """Where its parts go; together they fill all that they touch."""


@runtime_checkable
class Arrays(Protocol):
    """The arrays of a checkpoint on disk, none of which is read yet."""

    source: pathlib.Path
    shapes: Shapes

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """An array in `dtype`, by default its stored one."""
        ...


def load_leaves(
    arrays: Arrays,
    leaves: Mapping[str, Leaf],
    config: Pi0Config,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    lora: LoraConfig | None = None,
) -> Pi0:
    """Build the model that `config` describes and fill every weight.

    The largest leaf is read first, when little else is allocated, so that the peak stays near the model's own size.

    Args:
        lora: the low-rank matrices that the model gets and `leaves` fills, in float32.
    """
    misshapen = [
        f"{name} is {list(arrays.shapes[name])}, expected {list(leaf.shape)}"
        for name, leaf in leaves.items()
        if name in arrays.shapes and arrays.shapes[name] != leaf.shape
    ]
    missing, extra = sorted(set(leaves) - set(arrays.shapes)), sorted(set(arrays.shapes) - set(leaves))
    refuse_mismatch(arrays.source, missing, extra, misshapen)
    model = Pi0(config, device="meta", dtype=dtype)
    if lora is not None:
        attach_lora(model, lora)
    for name, leaf in sorted(leaves.items(), key=lambda item: -math.prod(item[1].shape)):
        parameter = _parameter(model, leaf.pieces[0].param)[2]
        _fill(model, leaf, arrays.read(name, parameter.dtype), device)
    return model


def _fill(model: Pi0, leaf: Leaf, array: Tensor, device: str | torch.device) -> None:
    for piece in leaf.pieces:
        if piece == Piece(piece.param):  # the array is the parameter: no copy
            owner, attribute, parameter = _parameter(model, piece.param)
            setattr(owner, attribute, nn.Parameter(array.to(device).view(parameter.shape)))
            continue
        part = array if piece.layer is None else array[piece.layer]
        part = part if piece.axes is None else part.permute(piece.axes)
        rows = _rows(_materialized(model, piece.param, device), piece)
        rows.view(part.shape).copy_(part)


def leaf_array(model: Pi0, leaf: Leaf, dtype: torch.dtype | None = None) -> Tensor:
    """The array of a leaf, on the CPU, out of the parameters: the way back of `load_leaves`."""
    parameters = [_parameter(model, piece.param)[2] for piece in leaf.pieces]
    dtype = dtype or parameters[0].dtype
    if leaf.pieces[0] == Piece(leaf.pieces[0].param):
        return parameters[0].detach().to("cpu", dtype).reshape(leaf.shape)
    array = torch.empty(leaf.shape, dtype=dtype)
    for piece, parameter in zip(leaf.pieces, parameters, strict=True):
        part = array if piece.layer is None else array[piece.layer]
        part = part if piece.axes is None else part.permute(piece.axes)
        part.copy_(_rows(parameter, piece).reshape(part.shape))
    return array


def own_leaves(config: Pi0Config) -> dict[str, Leaf]:
    """The table of our own format: every parameter by its name."""
    model = Pi0(config, device="meta")
    return {name: Leaf(tuple(parameter.shape), (Piece(name),)) for name, parameter in model.named_parameters()}


def refuse_mismatch(
    source: pathlib.Path, missing: Sequence[str], extra: Sequence[str], misshapen: Sequence[str]
) -> None:
    """Raise a ValueError that names the arrays that a checkpoint lacks, has too many, or has in another shape."""
    if missing or extra or misshapen:
        raise CheckpointError(
            f"{source} does not fit the model:"
            + (f"\n  missing: {_listed(missing, ', ')}" if missing else "")
            + (f"\n  left over: {_listed(extra, ', ')}" if extra else "")
            + (f"\n  misshapen: {_listed(misshapen, '; ')}" if misshapen else "")
        )


def _listed(texts: Sequence[str], separator: str) -> str:
    more = len(texts) - _MOST_NAMED
    return separator.join(texts[:_MOST_NAMED]) + (f"{separator}and {more} more" if more > 0 else "")


def _parameter(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Parameter]:
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    return owner, attribute, getattr(owner, attribute)


def _materialized(model: nn.Module, name: str, device: str | torch.device) -> nn.Parameter:
    owner, attribute, parameter = _parameter(model, name)
    if parameter.is_meta:
        parameter = nn.Parameter(torch.empty_like(parameter, device=device))
        setattr(owner, attribute, parameter)
    return parameter


def _rows(parameter: nn.Parameter, piece: Piece) -> Tensor:
    return parameter.data if piece.rows is None else parameter.data[slice(*piece.rows)]
