"""How arrays become a model's parameters: one at a time, and totally."""

import pathlib
from collections.abc import Sequence

import torch
from torch import nn


def materialized_parameter(model: nn.Module, name: str, device: str | torch.device) -> nn.Parameter:
    """The parameter of that name; if it is still on the meta device, it is allocated first, with undefined values."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    parameter = getattr(owner, leaf)
    if parameter.is_meta:
        parameter = nn.Parameter(torch.empty_like(parameter, device=device))
        setattr(owner, leaf, parameter)
    return parameter


def refuse_mismatch(
    source: pathlib.Path, missing: Sequence[str], extra: Sequence[str], misshapen: Sequence[str]
) -> None:
    """Raise a ValueError that names every array that a checkpoint lacks, has too many, or has in another shape."""
    if missing or extra or misshapen:
        raise ValueError(
            f"{source} does not fit the model:"
            + (f"\n  missing: {', '.join(missing)}" if missing else "")
            + (f"\n  left over: {', '.join(extra)}" if extra else "")
            + (f"\n  misshapen: {'; '.join(misshapen)}" if misshapen else "")
        )
